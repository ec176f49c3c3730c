"""A BERT of MiniLM's shape with 4,096 positions and random weights, to time long texts.

Its vectors mean nothing.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Final

__all__ = ["POSITIONS", "build", "text_of"]

POSITIONS: Final = 4096
SEED: Final = 7


def build(folder: Path) -> Path:
    """Write the model as a sentence-transformers folder below ``folder``; return its path."""
    import torch  # noqa: PLC0415 - seconds to import, and only some benchmarks need it
    from sentence_transformers import SentenceTransformer  # noqa: PLC0415 - the same
    from sentence_transformers.sentence_transformer.modules import (  # noqa: PLC0415 - the same
        Pooling,
        Transformer,
    )
    from transformers import AutoTokenizer, BertConfig, BertModel  # noqa: PLC0415 - the same

    from sutra_tasks.engines.model_folder import locate  # noqa: PLC0415 - the same

    torch.manual_seed(SEED)
    config = BertConfig(
        vocab_size=30522,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        max_position_embeddings=POSITIONS,
    )
    bare = folder / "bare"
    BertModel(config).save_pretrained(bare)
    tokenizer = AutoTokenizer.from_pretrained(locate("all-MiniLM-L6-v2"))
    tokenizer.model_max_length = POSITIONS
    tokenizer.save_pretrained(bare)
    transformer = Transformer(str(bare), max_seq_length=POSITIONS)
    width = transformer.get_embedding_dimension()
    model = SentenceTransformer(modules=[transformer, Pooling(width, "mean")], device="cpu")
    saved = folder / "model"
    model.save(str(saved), create_model_card=False)
    return saved


def text_of(tokens: int) -> str:
    """Return prose-like text of ``tokens`` tokens, two special tokens included."""
    words = ("river", "stone", "evening", "letter", "garden", "window", "market", "winter", "house")
    chosen = random.Random(SEED)  # noqa: S311 - the same text every time
    return " ".join("." if at % 17 == 16 else chosen.choice(words) for at in range(tokens - 2))
