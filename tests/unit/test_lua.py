"""Scripts are read with their headers, called by keyword, and sent by their hash."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import NoScriptError

import sutra_tasks
from sutra_tasks import lua

ROOT = Path(sutra_tasks.__file__).parent
FILES = {
    str(path.relative_to(ROOT).with_suffix("")): path.read_text("utf-8")
    for path in sorted(ROOT.rglob("*.lua"))
}
INCLUDED = {
    name for text in FILES.values() for kind, name in lua._declarations(text) if kind == "include"
}

MOVE = """\
--- Move a message.
---
--- @flags    allow-oom  it frees memory
--- @key      source     list: where it is
--- @args     messages   bytes of each
--- @keys     targets    lists: where each goes
--- @arg      now_s      Unix time in seconds
--- @family   record     strings: record .. id
--- @constant MOST       at most
--- @include  shared
--- @returns  how many moved

return shared(source, MOST)
"""
SHARED = """\
--- Count in a load.
---
--- @constant NAME  a name

local function shared(key, most) return NAME end
"""


@pytest.fixture(autouse=True)
def _files(monkeypatch: pytest.MonkeyPatch) -> None:
    read = lua._source
    made = {"move": MOVE, "shared": SHARED, "plain": "--- Do it.\nreturn 1\n"}
    monkeypatch.setattr(lua, "_source", lambda name: made[name] if name in made else read(name))


class Client:
    """A server that may not have the script yet."""

    def __init__(self, *, knows: bool) -> None:
        self.knows, self.sent = knows, list[tuple[Any, ...]]()

    def evalsha(self, *command: Any) -> str:
        self.sent.append(("EVALSHA", *command))
        if not self.knows:
            raise NoScriptError
        return "answer"

    def eval(self, *command: Any) -> str:
        self.sent.append(("EVAL", *command))
        return "answer"


VALUES: dict[str, Any] = {
    "source": "s",
    "messages": [b"\0\xff", b"2"],
    "targets": ("t1", "t2", "t3"),
    "now_s": 1.5,
    "record": "r:",
}
BOUND = (4, "s", "t1", "t2", "t3", 2, 3, b"\0\xff", b"2", 1.5, "r:")
"""How many keys; the keys; the size of each group, in the header's order; the arguments."""


def test_a_header_becomes_locals_behind_flags_and_constants_and_before_what_is_included() -> None:
    text = lua.script("move", MOST=16, NAME="it's \\").text
    lines = text.splitlines()
    assert lines[:3] == ["#!lua flags=allow-oom", "local MOST = 16", "local NAME = 'it\\'s \\\\'"]
    assert [line for line in lines if "KEYS" in line or "ARGV" in line] == [
        "local source = KEYS[0 + 1]",
        "local messages = take_group(ARGV, 2, ARGV[1])",
        "local targets = take_group(KEYS, 0 + 1, ARGV[2])",
        "local now_s = ARGV[2 + #messages + 1]",
        "local record = ARGV[2 + #messages + 1 + 1]",
    ]
    assert text.index("record = ") < text.index("function shared") < text.index("return shared(")


def test_a_script_without_a_header_is_sent_as_it_is() -> None:
    assert lua.script("plain").text == "--- Do it.\nreturn 1\n"


def test_a_script_is_called_by_its_hash() -> None:
    client: Any = Client(knows=True)
    move = lua.script("move", MOST=1, NAME="n")
    assert move(client, **VALUES) == "answer"
    assert client.sent == [("EVALSHA", move.sha, *BOUND)]


def test_a_server_that_does_not_have_a_script_gets_it() -> None:
    client: Any = Client(knows=False)
    move = lua.script("move", MOST=1, NAME="n")
    assert move(client, **VALUES) == "answer"
    assert client.sent == [("EVALSHA", move.sha, *BOUND), ("EVAL", move.text, *BOUND)]


def test_a_raw_command_is_the_same_command() -> None:
    move = lua.script("move", MOST=1, NAME="n")
    assert move.command(**VALUES) == ("EVALSHA", move.sha, *BOUND)
    assert move.command_with_text(**VALUES) == ("EVAL", move.text, *BOUND)


def test_scripts_of_other_constants_are_other_scripts() -> None:
    assert lua.script("move", MOST=1, NAME="n").sha != lua.script("move", MOST=2, NAME="n").sha


def test_an_empty_group_is_passed_as_one() -> None:
    values = VALUES | {"messages": (), "targets": []}
    found = lua.script("move", MOST=1, NAME="n").command(**values)
    assert found[2:] == (1, "s", 0, 0, 1.5, "r:")


@pytest.mark.parametrize("wrong", [{"sourc": "s"}, {"MOST": 1}])
def test_a_name_that_is_not_declared_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=next(iter(wrong))):
        lua.script("move", MOST=1, NAME="n").command(**VALUES, **wrong)


@pytest.mark.parametrize("missing", VALUES)
def test_a_name_that_is_missing_is_named(missing: str) -> None:
    values = {name: value for name, value in VALUES.items() if name != missing}
    with pytest.raises(TypeError, match=f"script move .*{missing}"):
        lua.script("move", MOST=1, NAME="n").command(**values)


@pytest.mark.parametrize("constants", [{}, {"MOST": 1}, {"MOST": 1, "NAME": "n", "OTHER": 1}])
def test_constants_are_exactly_those_that_are_declared_also_by_what_is_included(
    constants: dict[str, Any],
) -> None:
    with pytest.raises(TypeError, match="script move"):
        lua.script("move", **constants)


# --- every file of the package -------------------------------------------------------------------


def body(text: str) -> str:
    """Return a file without its comments."""
    return "\n".join(line.partition("--")[0] for line in text.splitlines())


def header(text: str) -> list[str]:
    """Return the comment lines at the beginning of a file, without their dashes."""
    lines = text.splitlines()
    end = next(at for at, line in enumerate(lines) if not line.startswith("---"))
    return [line[3:].strip() for line in lines[:end]]


@pytest.mark.parametrize("name", FILES)
def test_a_file_begins_with_what_it_does_and_declares_what_the_loader_knows(name: str) -> None:
    description, *others = header(FILES[name])
    assert re.match(r"[A-Z].*\.$", description)
    declared = [line for line in others if line.startswith("@")]
    known = {"constant"} if name in INCLUDED else {kind for kind, _ in lua._declarations(MOVE)}
    assert {line.split()[0][1:] for line in declared} <= known
    assert len(declared) == len(lua._declarations(FILES[name])), "a declaration has no name"
    returns = re.search(r"^return \S", body(FILES[name]), re.MULTILINE) is not None
    assert any(line.startswith("@returns") for line in declared) == returns


@pytest.mark.parametrize("name", FILES)
def test_every_declared_name_is_used_and_nothing_else_is_read(name: str) -> None:
    text = body(FILES[name])
    names = [
        one
        for kind, one in lua._declarations(FILES[name])
        if kind not in ("flags", "include", "returns")
    ]
    assert len(set(names)) == len(names)
    assert [one for one in names if not re.search(rf"\b{one}\b", text)] == []
    assert not re.search(r"\b(KEYS|ARGV)\b", text)


@pytest.mark.parametrize("name", sorted(INCLUDED))
def test_what_is_included_has_functions_only(name: str) -> None:
    assert [line for line in body(FILES[name]).splitlines() if re.match(r"[^\s]", line)] == [
        line
        for line in body(FILES[name]).splitlines()
        if re.match(r"local function \w+\(|local \w+ = |end$", line)
    ]


def test_every_file_is_loaded_or_included_and_what_is_loaded_exists() -> None:
    loaded = {
        node.args[0].value
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call)
        if ast.unparse(node.func) in ("lua.script", "script")
        if node.args and isinstance(node.args[0], ast.Constant)
    }
    assert loaded | INCLUDED == FILES.keys()
    assert not loaded & INCLUDED
