"""The texts of a run: read, drawn, and divided into those to learn from and those to measure on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from sutra_tasks.distillation.corpus import read, read_pairs, split
from sutra_tasks.distillation.shards import digest
from sutra_tasks.errors import SettingsError

if TYPE_CHECKING:
    from sutra_tasks.distillation.config import DistillationConfig
    from sutra_tasks.settings import Settings

    Pairs = tuple[tuple[str, str], ...]

__all__ = ["Material", "gather"]

LABELLED_EVERY: Final = 5
"""With a task loss, of so many labelled pairs one is measured on and the others are learned from."""
MOST_CHARS: Final = 100_000
"""Of a text: more than models see; longer rows are bad ones."""


@dataclass(frozen=True, slots=True, repr=False)
class Material:
    """The texts of a run.

    Attributes:
        train: to learn from.
        held_out: to measure on.
        pairs: labelled queries and their texts, to measure on; no text of theirs is in ``train``.
        task_pairs: those to learn from, where the recipe has a task loss.
        facts: for the report: counts and what was wrong, no text.
        fingerprint: of all of it.
    """

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    pairs: Pairs
    task_pairs: Pairs
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
    labelled = tuple(dict.fromkeys(read_pairs(folder, config.pairs))) if config.pairs else ()
    task_pairs, pairs = _divided(labelled) if config.task_weight else ((), labelled)
    found = dict.fromkeys([*corpus.texts, *(sample if config.sample else ())])
    measured = set(chain.from_iterable(pairs))
    texts = tuple(text for text in found if text not in measured)
    train, held_out = split(replace(corpus, texts=texts), config.held_out, config.seed)
    facts = {
        "files": list(config.texts),
        "texts": len(train),
        "held_out": len(held_out),
        "sampled": len(sample) if config.sample else 0,
        "pairs": len(labelled),
        "texts_of_pairs_left_out": len(found) - len(texts),
        "bad_rows": corpus.bad_rows,
        "bad": [f"{row.file}:{row.line}: {row.reason}" for row in corpus.bad],
        "duplicates": corpus.duplicates,
    }
    fingerprint = digest([train, held_out, pairs, task_pairs])
    return Material(train, held_out, pairs, task_pairs, facts, fingerprint)


def _divided(labelled: Pairs) -> tuple[Pairs, Pairs]:
    """Return the pairs to learn from, and those to measure on."""
    measured = labelled[::LABELLED_EVERY]
    texts = set(chain.from_iterable(measured))
    return tuple(pair for pair in labelled if texts.isdisjoint(pair)), measured
