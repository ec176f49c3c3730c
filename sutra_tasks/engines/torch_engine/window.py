"""The window of a model: the most tokens of a text that all of its limits allow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from torch import nn

from sutra_tasks.engines.torch_engine.introspection import transformer_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedModel

__all__ = ["window_of"]

UNLIMITED: Final = 8192
"""The window of a model that names no limit: relative positions have none, but memory has."""

MOST: Final = 2**23
"""A larger limit means that there is none: transformers writes 1e30 for a tokenizer that names none."""

POSITION_TABLES: Final = ("position_embeddings", "position_embedding", "embed_positions", "wpe")
"""Names of the modules that hold a vector for each position, in the models of transformers."""

OTHER_INPUTS: Final = ("vision", "visual", "audio")


def window_of(model: SentenceTransformer) -> int:
    """Return how many tokens of a text a model computes, special tokens and prompt included.

    The smallest of: the tokenizer's ``model_max_length``, which sentence-transformers has already
    replaced by ``max_seq_length`` if the model's folder names one; the tokens up to which its
    configuration has the tokenizer cut; and the positions for which the transformer has a vector.
    RoBERTa and its relatives reserve the first of these: of 514 positions texts get 512.
    """
    first: Any = model[0]
    options = getattr(first, "processing_kwargs", None) or {}
    limits = [model.max_seq_length, (options.get("text") or {}).get("max_length")]
    inner = transformer_of(model)
    if inner is not None:
        limits += _positions(inner)
    known = [int(limit) for limit in limits if limit is not None and 0 < limit <= MOST]
    return min(known, default=UNLIMITED)


def _positions(inner: PreTrainedModel) -> Iterator[int]:
    """Yield the limits of a transformer's tables of positions; rotary and relative ones set none."""
    for path, table in inner.named_modules():
        *parents, name = path.split(".")
        if name not in POSITION_TABLES or not isinstance(table, nn.Embedding):
            continue
        if any(word in parent for parent in parents for word in OTHER_INPUTS):
            continue
        # RoBERTa counts from padding_idx + 1, and BART's class of tables from its own offset.
        reserved = table.padding_idx + 1 if table.padding_idx is not None else 0
        yield table.num_embeddings - max(reserved, getattr(table, "offset", 0))
        yield from filter(None, [getattr(inner.config, "max_position_embeddings", None)])
