"""What a loaded model says of itself: its width, the name of its space, and how it pools."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from sutra_tasks.errors import ModelError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer

__all__ = ["fingerprint", "pools_mean", "width_of"]


def pools_mean(modules: Iterable[torch.nn.Module]) -> bool:
    """Return whether the module after the transformer takes the mean of the tokens' states."""
    # A module between them would be applied twice in late chunking.
    _, *rest = modules
    return bool(rest) and getattr(rest[0], "pooling_mode", None) == "mean"


def width_of(name: str, model: SentenceTransformer) -> int:
    """Return the width of a model's vectors: that of its ``truncate_dim``, if it has one."""
    if model.truncate_dim is not None and (
        type(model.truncate_dim) is not int or model.truncate_dim < 1
    ):
        raise ModelError(
            name, f"its truncate_dim is {model.truncate_dim!r}, and not a number of 1 or more"
        )
    width = model.get_embedding_dimension()
    if width is None:
        raise ModelError(name, "does not say how wide its vectors are")
    return width


def fingerprint(
    model: SentenceTransformer, tokenizer: Tokenizer, prompts: dict[str, str], default_prompt: str | None
) -> str:
    """Return a digest of everything that decides what a vector means.

    That is weights, tokenizer, modules and prompts, as loaded, before any change of precision. So the
    same model has the same space in a folder, a cache and a package.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).contiguous().view(torch.uint8).numpy().data)
    digest.update(tokenizer.to_str().encode())
    for module in model:
        describe: Any = getattr(module, "get_config_dict", dict)
        described = json.dumps(describe(), sort_keys=True, default=str)
        digest.update(f"{type(module).__name__}:{described}".encode())
    digest.update(json.dumps(prompts, sort_keys=True).encode())
    if default_prompt is not None:
        digest.update(f"default prompt {default_prompt}".encode())
    return digest.hexdigest()[:16]
