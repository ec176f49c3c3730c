"""Which extra of this package installs what only some processes need."""

from __future__ import annotations

from typing import Final

__all__ = ["how_to_install"]

_EXTRAS: Final = {
    "worker": (
        "hiredis",
        "huggingface_hub",
        "psutil",
        "pybase64",
        "safetensors",
        "sentence_transformers",
        "tokenizers",
        "torch",
        "transformers",
    ),
    "distill": ("matplotlib", "pyarrow"),
    "cli": ("rich",),
    "flower": ("flower",),
}


def how_to_install(error: ModuleNotFoundError) -> str | None:
    """Return what to install for a module that was not found; None: it is no dependency of ours."""
    missing = (error.name or "").partition(".")[0]
    for extra, modules in _EXTRAS.items():
        if missing in modules:
            return f"{missing} is not installed: pip install 'sutra-tasks[{extra}]'"
    return None
