"""The folders are the architecture: who may import whom, and what lives in one place only."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import sutra_tasks

ROOT = Path(sutra_tasks.__file__).parent
TREES = {
    str(path.relative_to(ROOT)): ast.parse(path.read_text("utf-8"))
    for path in sorted(ROOT.rglob("*.py"))
}
ENVIRONMENT_FOR_CHILDREN = {"host/local_fleet.py", "host/supervisor.py"}  # handed on, not interpreted
HEAVY = ("torch", "transformers", "sentence_transformers", "tokenizers")
HEAVY_MODULES = {
    *(
        f"engines/torch_engine/{name}.py"
        for name in (
            "encoder",
            "facts",
            "forward_pass",
            "introspection",
            "modules",
            "sdpa_kernels",
            "window",
        )
    ),
    *(
        f"distillation/training/{name}.py"
        for name in ("batches", "losses", "optimizer", "students", "trainer")
    ),
}
LAYERS = (
    (
        "decoding.py",
        "errors.py",
        "extras.py",
        "files.py",
        "keys.py",
        "server_address.py",
        "server_options.py",
        "settings.py",
        "vectors.py",
    ),
    ("connections.py", "lua.py", "rights.py", "server_check.py", "server_errors.py"),
    ("celery_settings.py",),
    ("app.py",),
    ("models/registry/names.py",),
    ("client/",),
    ("engines/",),
    ("chunking/",),
    ("batching/",),
    ("health/",),
    ("broker/",),
    ("membership/",),
    ("host/",),
    ("routing/",),
    ("fanout/",),
    ("models/",),
    ("streaming/",),
    ("distillation/",),
    ("__init__.py", "testing.py"),
    ("device/",),
    ("roles/",),
    ("cli/",),
)
"""From the bottom up: a file imports only from its own layer and from those above it in this list."""


def layer_of(file: str) -> int:
    """Return the layer of a file: that of the longest name in LAYERS with which it begins."""
    found = [
        (len(name), at) for at, names in enumerate(LAYERS) for name in names if file.startswith(name)
    ]
    return max(found)[1]


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


FILES = {module_of(file): file for file in TREES}


def test_every_file_is_in_a_layer_and_every_layer_has_files() -> None:
    named = [name for names in LAYERS for name in names]
    assert [file for file in TREES if not file.startswith(tuple(named))] == []
    assert [name for name in named if not any(file.startswith(name) for file in TREES)] == []


@pytest.mark.parametrize("file", TREES)
def test_a_file_imports_nothing_from_a_layer_above_its_own(file: str) -> None:
    upward = {
        name
        for name in imports(TREES[file], at_import=False)
        if name in FILES and name != "sutra_tasks" and layer_of(FILES[name]) > layer_of(file)
    }
    assert upward == set()


def test_only_the_torch_engine_and_training_import_torch_with_their_modules() -> None:
    importers = {
        file
        for file, tree in TREES.items()
        if any(name.split(".")[0] in HEAVY for name in imports(tree, at_import=True))
    }
    assert importers == HEAVY_MODULES


@pytest.mark.parametrize("folder", ["chunking/", "engines/attention.py", "engines/capability.py"])
def test_what_decides_about_chunks_and_attention_knows_no_torch(folder: str) -> None:
    offences = {
        (file, name)
        for file, tree in TREES.items()
        if file.startswith(folder)
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


def test_one_module_makes_clients_of_the_server() -> None:
    makers = {
        file
        for file, tree in TREES.items()
        for node in nodes(tree, at_import=False)
        if isinstance(node, ast.Call) and re.search(r"\bRedis(\.from_\w+)?$", ast.unparse(node.func))
    }
    assert makers == {"connections.py", "host/embedded_server.py"}  # the latter starts its own server
