"""The table of rights has what the code uses."""

import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

import sutra_tasks
from sutra_tasks import keys
from sutra_tasks.rights import ROLES, rights_of

ROOT = Path(sutra_tasks.__file__).parent
OF_READERS = {
    f"streaming/lua/{name}.lua"
    for name in ("acknowledge_responses", "begin_reading", "requeue_responses", "set_aside_responses")
}
SUBCOMMANDS = {"xgroup", "xinfo"}


def called(path: Path) -> set[str]:
    found = re.findall(r"redis\.p?call\(\s*['\"](\w+)['\"](?:,\s*['\"](\w+)['\"])?", path.read_text())
    return {
        f"{name}|{sub}".lower() if name.lower() in SUBCOMMANDS and sub else name.lower()
        for name, sub in found
    }


def scripts(folder: str = "") -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.lua"))


def roles_of(script: str) -> list[str]:
    if script in OF_READERS:
        return ["reader", "operator"]
    if script == "streaming/lua/add_entries.lua":
        return ["client", "device"]
    if script.startswith("streaming/"):
        return ["device"]
    if script.startswith("distillation/"):
        return ["distill"]
    return ["router", "device", "distill", "operator"]


@pytest.mark.parametrize("script", scripts())
def test_whoever_runs_a_script_may_run_its_commands(script: str) -> None:
    for role in roles_of(script):
        assert called(ROOT / script) - set(rights_of(role).commands) == set(), role


def test_the_operator_may_use_every_key() -> None:
    patterns = rights_of("operator").keys
    made = [getattr(keys, name) for name in keys.__all__ if callable(getattr(keys, name))]
    names = [one(*(["0"] * one.__code__.co_argcount)) for one in made if one != keys.prefix]
    unknown = [name for name in names if not any(fnmatchcase(name, one) for one in patterns)]
    assert unknown == [keys.named("0")]


@pytest.mark.parametrize("role", ROLES)
def test_no_role_may_do_what_endangers_others(role: str) -> None:
    rights = rights_of(role)
    forbidden = {"flushall", "flushdb", "keys", "config", "debug", "shutdown", "script|flush", "acl"}
    assert forbidden & {one.partition("|")[0] for one in rights.commands} == set()
    assert "*" not in rights.keys
    assert "*" not in rights.channels
    assert rights.rules[:2] == ("+@connection", "-@dangerous")


def test_channels_have_the_number_of_the_database() -> None:
    assert "/3.celery.pidbox" in rights_of("router", db=3).channels
