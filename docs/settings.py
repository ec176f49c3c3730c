"""Writes docs/settings.md from the settings themselves: ``python docs/settings.py``."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from sutra_tasks.settings import PREFIX, Settings

__all__ = ["render"]

HEAD = """# Settings

All are environment variables, read once when they are first needed. An unknown `SUTRA_*` variable and a
value that cannot be used are refused by name. Written by `python docs/settings.py`.

| variable | default | meaning |
| --- | --- | --- |
"""


def render() -> str:
    """Return the page."""
    rows = [
        f"| `{PREFIX}{option.name.upper()}` | {_shown(option.default)} | {option.metadata['about']} |"
        for option in fields(Settings)
    ]
    return HEAD + "\n".join(rows) + "\n"


def _shown(default: object) -> str:
    return "not set" if default is None else f"`{default}`"


if __name__ == "__main__":
    Path(__file__).with_name("settings.md").write_text(render())
