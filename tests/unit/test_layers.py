"""The folders are the architecture: who may import whom, and what lives in one place only."""

import ast
import re
from collections.abc import Iterator, Sequence
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import sutra_tasks

ROOT = Path(sutra_tasks.__file__).parent
TREES = {
    str(path.relative_to(ROOT)): ast.parse(path.read_text("utf-8"))
    for path in sorted(ROOT.rglob("*.py"))
}
ENVIRONMENT_FOR_CHILDREN = {"fleet/local.py", "fleet/supervisor.py"}  # handed on, not interpreted
TRAINING = ("batches", "losses", "speed", "students", "trainer")
HEAVY = ("torch", "transformers", "sentence_transformers", "tokenizers")

BASE = ("errors.py", "keys.py", "settings.py", "calls.py", "vectors.py", "configuration.py")
CLIENT = ("__init__.py", "app.py", "tasks.py", "bulk.py", "admission.py", "results.py", "transport.py")
FORBIDDEN = {
    **dict.fromkeys(BASE, ("app", "tasks", "bulk", "testing", "encoding", "fleet", "streaming", "cli")),
    **dict.fromkeys(CLIENT, ("testing", "encoding", "fleet", "cli")),
    "testing.py": ("fleet", "cli"),
    "documents/": ("app", "tasks", "bulk", "testing", "encoding", "fleet", "streaming", "cli"),
    "models/": ("app", "tasks", "bulk", "testing", "encoding", "fleet", "streaming", "cli"),
    "distillation/": ("testing", "fleet", "streaming", "cli"),
    "encoding/": ("app", "tasks", "bulk", "testing", "fleet", "streaming", "cli"),
    "streaming/": ("app", "tasks", "bulk", "testing", "fleet", "cli"),
    "fleet/": ("testing", "cli"),
    "cli/": ("testing",),
}


def module_of(file: str) -> str:
    name = "sutra_tasks." + file.removesuffix(".py").replace("/", ".")
    return name.removesuffix(".__init__")


MODULES = {module_of(file) for file in TREES}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def nodes(tree: ast.AST, *, at_import: bool) -> Iterator[ast.AST]:
    """Yield nodes; with ``at_import``, only those that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if at_import and (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            or is_type_checking(node)
        ):
            continue
        yield node
        yield from nodes(node, at_import=at_import)


def imports(tree: ast.AST, *, at_import: bool) -> Iterator[str]:
    """Yield the modules a file imports; ``from package import module`` is that module."""
    for node in nodes(tree, at_import=at_import):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else str(node.module)


def test_the_layers_name_every_file() -> None:
    assert [file for file in TREES if not file.startswith(tuple(FORBIDDEN))] == []
    assert [layer for layer in FORBIDDEN if not any(f.startswith(layer) for f in TREES)] == []


@pytest.mark.parametrize(("layer", "others"), FORBIDDEN.items())
def test_a_layer_imports_only_itself_and_those_below(layer: str, others: Sequence[str]) -> None:
    above = {f"sutra_tasks.{name}" for name in others}
    offences = {
        (file, name)
        for file, tree in TREES.items()
        if file.startswith(layer)
        for name in imports(tree, at_import=False)
        if name in above or ".".join(name.split(".")[:2]) in above
    }
    assert offences == set()


def test_only_what_the_torch_engine_is_made_of_imports_torch_with_its_module() -> None:
    importers = {
        file
        for file, tree in TREES.items()
        if any(name.split(".")[0] in HEAVY for name in imports(tree, at_import=True))
    }
    engine = {f"encoding/{name}.py" for name in ("attention", "kernels", "passes", "torch_engine")}
    training = {f"distillation/{name}.py" for name in TRAINING}
    assert importers == engine | training


def test_what_decides_about_documents_and_attention_knows_no_torch() -> None:
    offences = {
        (file, name)
        for file, tree in TREES.items()
        if file.startswith("documents/")
        for name in imports(tree, at_import=False)
        if name.split(".")[0] in HEAVY
    }
    assert offences == set()


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {
        module_of(file): {
            name
            for name in imports(tree, at_import=True)
            # What the package itself re-exports is imported before any module inside it.
            if name in MODULES - {"sutra_tasks"}
        }
        for file, tree in TREES.items()
    }
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_one_module_reads_the_environment() -> None:
    readers = {
        file
        for file, tree in TREES.items()
        for node in nodes(tree, at_import=False)
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "environb", "getenv"}
        if isinstance(node.value, ast.Name) and node.value.id == "os"
    }
    assert readers == {"settings.py", *ENVIRONMENT_FOR_CHILDREN}


def test_one_module_knows_the_names_of_redis_keys() -> None:
    holders = {
        file
        for file, tree in TREES.items()
        for node in nodes(tree, at_import=False)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if re.match(r"sutra:\S|sutra\.(embed$|device\.)", node.value)
    }
    assert holders == {"keys.py"}
