"""The texts of a run: read, drawn, and divided into those to learn from and those to measure on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from sutra_tasks.distillation.corpus import read, read_pairs, split
from sutra_tasks.distillation.shards import digest
from sutra_tasks.errors import SettingsError

if TYPE_CHECKING:
    from sutra_tasks.distillation.config import DistillationConfig
    from sutra_tasks.settings import Settings

__all__ = ["Material", "gather"]

MOST_CHARS: Final = 100_000
"""Of a text: more than models see; longer rows are bad ones."""


@dataclass(frozen=True, slots=True, repr=False)
class Material:
    """The texts of a run.

    Attributes:
        train: to learn from.
        held_out: to measure on.
        pairs: labelled queries and their texts.
        facts: for the report: counts and what was wrong, no text.
        fingerprint: of all of it.
    """

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    facts: Mapping[str, Any]
    fingerprint: str


def gather(config: DistillationConfig, options: Settings, sample: Sequence[str]) -> Material:
    """Read the texts that a recipe names.

    Args:
        config: the recipe.
        options: says in which folder.
        sample: texts of real traffic; used if the recipe says so.

    Raises:
        SettingsError: no folder is set.
        InvalidInputError: a file is not there or holds no texts, or too few.
    """
    if options.data_dir is None and (config.texts or config.pairs):
        raise SettingsError("SUTRA_DATA_DIR", "", "not set: the folder with the texts to learn from")
    folder = Path(options.data_dir or ".")
    rng = np.random.default_rng(config.seed)
    wanted = config.max_texts + config.held_out
    corpus = read(folder, config.texts, most_chars=MOST_CHARS, most_texts=wanted, rng=rng)
    texts = tuple(dict.fromkeys([*corpus.texts, *(sample if config.sample else ())]))
    corpus = replace(corpus, texts=texts)
    train, held_out = split(corpus, config.held_out, config.seed)
    pairs = tuple(read_pairs(folder, config.pairs)) if config.pairs else ()
    facts = {
        "files": list(config.texts),
        "texts": len(train),
        "held_out": len(held_out),
        "sampled": len(sample) if config.sample else 0,
        "pairs": len(pairs),
        "bad_rows": corpus.bad_rows,
        "bad": [f"{row.file}:{row.line}: {row.reason}" for row in corpus.bad],
        "duplicates": corpus.duplicates,
    }
    return Material(train, held_out, pairs, facts, digest([train, held_out, pairs]))
