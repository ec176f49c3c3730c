"""The documents say what the code does."""

import importlib.util
import re
from pathlib import Path

from sutra_tasks import errors
from sutra_tasks.health.states import DeviceState

DOCS = Path(__file__).parents[2] / "docs"


def rendered(script: str) -> str:
    spec = importlib.util.spec_from_file_location(f"docs_{script}", DOCS / f"{script}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text: str = module.render()
    return text


def test_the_page_of_settings_is_the_settings() -> None:
    assert (DOCS / "settings.md").read_text() == rendered("settings"), "run python docs/settings.py"


def test_the_acl_file_is_the_table_of_rights() -> None:
    assert (DOCS / "acl" / "sutra.acl").read_text() == rendered("acl"), "run python docs/acl.py"


def test_the_files_that_the_architecture_names_exist() -> None:
    package = DOCS.parent / "sutra_tasks"
    missing = []
    for line in (DOCS / "architecture.md").read_text().splitlines():
        folder = package
        for name in re.findall(r"`([\w/]+\.(?:py|lua)|\w[\w/]*/)`", line):
            # A name without a folder is in the folder of the name before it, or at the top.
            near, top = folder / name, package / name
            found = top if top.exists() else near
            if not found.exists() and not (DOCS.parent / name).exists():
                missing.append(name)
            folder = found.parent if found.is_file() else found
    assert missing == []


def test_operations_has_a_row_for_each_error_and_each_state() -> None:
    rows = re.findall(r"^\| `(\w+)`", (DOCS / "operations.md").read_text(), re.MULTILINE)
    named = {*errors.__all__, *DeviceState} - {"SutraError"}
    assert {name for name in named if name not in rows} == set()
    assert len(rows) == len(set(rows))
