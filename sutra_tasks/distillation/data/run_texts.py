"""The texts of a run: read, drawn, and divided into texts to learn from and texts to measure on."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from sutra_tasks.distillation.data.corpus import read_corpus, read_pairs, split_corpus
from sutra_tasks.distillation.data.row_readers import BadRows, shown
from sutra_tasks.distillation.data.traffic_sample import priority
from sutra_tasks.distillation.names import fingerprint
from sutra_tasks.errors import InvalidOptionError, SettingsError

if TYPE_CHECKING:
    from sutra_tasks.distillation.config import DistillationConfig
    from sutra_tasks.settings import Settings

    Pairs = tuple[tuple[str, str], ...]

__all__ = ["RunTexts", "read_run_texts"]

MEASURED_SHARE: Final = 5
"""With a task loss, the pairs of one answer in five are measured on; the others may be learned from."""
MOST_CHARS: Final = 100_000
"""Characters of a text; longer rows are bad. No model sees as much."""


@dataclass(frozen=True, slots=True, repr=False)
class RunTexts:
    """The texts of a run.

    Attributes:
        train: to learn from.
        held_out: to measure on.
        pairs: labelled (query, answer) pairs to measure on; none of their texts is in ``train``.
        task_pairs: pairs to learn from, if the recipe has a task loss; none of their texts is measured
            on.
        facts: counts and bad rows for the report; no text.
        fingerprint: digest of all the texts.
    """

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    pairs: Pairs
    task_pairs: Pairs
    facts: Mapping[str, Any]
    fingerprint: str


def read_run_texts(config: DistillationConfig, options: Settings, sample: Sequence[str]) -> RunTexts:
    """Read the texts that a recipe names.

    Args:
        config: the recipe.
        options: with the folder of the files.
        sample: texts of real traffic; used only if the recipe says so.

    Raises:
        SettingsError: the recipe names files, and no folder is set.
        InvalidInputError: a file is missing or has no texts, there are too few texts, or no pair is left
            to learn from.
    """
    if options.data_dir is None and (config.texts or config.pairs):
        raise SettingsError("SUTRA_DATA_DIR", "", "not set: the folder with the texts to learn from")
    folder = Path(options.data_dir or ".")
    corpus = read_corpus(
        folder,
        config.texts,
        most_chars=MOST_CHARS,
        sample=sample if config.sample else (),
        most_texts=config.max_texts + config.held_out,
        rng=np.random.default_rng(config.seed),
    )
    bad = BadRows(corpus.bad_rows, list(corpus.bad))
    rows = read_pairs(folder, config.pairs, most_chars=MOST_CHARS, bad=bad) if config.pairs else []
    labelled = tuple(dict.fromkeys(rows))
    pairs = _measured(labelled, config.seed) if config.task_weight else labelled
    measured = set(chain.from_iterable(pairs))
    texts = tuple(text for text in corpus.texts if text not in measured)
    left_out = len(corpus.texts) - len(texts)
    train, held_out = split_corpus(
        replace(corpus, texts=texts), config.held_out, config.seed, left_out=left_out
    )
    task_pairs = _learned(labelled, measured.union(held_out), config) if config.task_weight else ()
    facts = {
        "files": list(config.texts),
        "texts": len(train),
        "held_out": len(held_out),
        "sampled": len(sample) if config.sample else 0,
        "pairs": len(labelled),
        "pairs_measured_on": len(pairs),
        "pairs_learned_from": len(task_pairs),
        "texts_of_pairs_left_out": left_out,
        "bad_rows": bad.count,
        "bad": [f"{row.file}:{row.line}: {row.reason}" for row in bad.first],
        "duplicates": corpus.duplicates,
    }
    digest = fingerprint([train, held_out, pairs, task_pairs])
    return RunTexts(train, held_out, pairs, task_pairs, facts, digest)


def _measured(labelled: Pairs, seed: int) -> Pairs:
    """Return the pairs to measure on: all pairs of a fifth of the answers, drawn by a hash."""
    # Drawn by answer: if many queries share few answers, a fifth of the pairs would have every answer.
    answers, key = {answer for _, answer in labelled}, f"measured {seed}".encode()
    count = math.ceil(len(answers) / MEASURED_SHARE)
    drawn = set(heapq.nsmallest(count, answers, key=lambda text: (priority(text, key), text)))
    return tuple(pair for pair in labelled if pair[1] in drawn)


def _learned(labelled: Pairs, measured: set[str], config: DistillationConfig) -> Pairs:
    """Return the pairs that share no text with the texts to measure on.

    Raises:
        InvalidOptionError: there are none.
    """
    found = tuple(pair for pair in labelled if measured.isdisjoint(pair))
    if not found:
        raise InvalidOptionError(
            "pairs",
            shown(config.pairs or ""),
            f"pairs to learn from beside those that are measured on, for task_weight: each of its "
            f"{len(labelled):,} shares a text with those or with the held-out texts",
        )
    return found
