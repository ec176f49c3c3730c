"""Needle retrieval: a fact from elsewhere in a long document, and a question that only it answers.

Every document has one fact, at a random place. For each question, all documents are ranked by the cosine
of one vector each (``best_chunk``: of the best of their chunks' vectors). It is a hit if the document
with the question's fact is first, or among the first ten. All methods share the chunks' vectors;
``truncation`` is the first chunk, the only one that the model alone sees.

``over_4k`` and ``under_4k`` are the questions about documents of that length, ranked among all;
``over_4k_alone`` ranks only the long documents. Intervals are Wilson's, at 95 %.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from scripts.benchmarks import corpus
from sutra_tasks.chunking.chunker import Chunker
from sutra_tasks.chunking.weights import aggregate, chunk_weights
from sutra_tasks.host.hardware import count_cores
from sutra_tasks.settings import Settings

if TYPE_CHECKING:
    from sutra_tasks.chunking.weights import Spans
    from sutra_tasks.engines.encoder import TokenizedText
    from sutra_tasks.engines.torch_engine.encoder import TorchEncoder
    from sutra_tasks.vectors import Floats

Hits = NDArray[np.bool_]

MODEL: Final = "all-MiniLM-L6-v2"
LONG: Final = 4000
"""Tokens from which a document counts as long."""

LENGTHS: Final = ((115, 1000, LONG), (85, LONG, 20_000))
QUICK: Final = ((10, 300, 600), (2, LONG, 4200))
"""Numbers of documents, and bounds of their tokens; the logarithms of lengths are evenly spread."""

AGGREGATED: Final = ("mean", "positional", "overlap_aware", "max")
TRUNCATION: Final = "truncation"
BEST_CHUNK: Final = "best_chunk"
FIRST: Final = {"hit1": 1, "hit10": 10}
BATCH: Final = 16
Z: Final = 1.96
RESAMPLED: Final = 2000


@dataclass(frozen=True, slots=True)
class Embedded:
    """A document's chunks, as spans of its tokens, and their unit vectors."""

    spans: Spans
    rows: Floats

    @property
    def tokens(self) -> int:
        """Tokens of the document, its fact included."""
        return self.spans[-1][1]


def run(*, quick: bool) -> dict[str, Any]:
    """Run the benchmark."""
    from sutra_tasks.engines.torch_engine.encoder import TorchEncoder  # noqa: PLC0415 - takes seconds

    encoder = TorchEncoder(MODEL, threads=count_cores())
    special = encoder.tokenize([""], None)[0].tokens
    made = corpus.documents(
        _lengths(QUICK if quick else LENGTHS),
        lambda texts: [text.tokens - special for text in encoder.tokenize(texts, None)],
    )
    chunker = Chunker(encoder.info.window - special, Settings().overlap_tokens)
    embedded = _embedded(encoder, chunker, [document.text for document in made])
    questions = _unit(encoder.encode(encoder.tokenize([document.question for document in made], None)))
    facts = encoder.tokenize([document.fact for document in made], None)
    scores = _scores(questions, embedded)
    lengths = np.array([document.tokens for document in embedded])
    everything, over = np.full(len(made), fill_value=True), lengths > LONG
    return {
        "corpus": corpus.sources(),
        "model": MODEL,
        "documents": len(made),
        "tokens": {
            "documents": int(lengths.sum()),
            "fact": _median(text.tokens - special for text in facts),
        },
        "chunks": {
            "tokens": chunker.block,
            "overlap": chunker.overlap,
            "count": sum(len(document.spans) for document in embedded),
        },
        "all": _hits(scores, everything, everything),
        "under_4k": _hits(scores, ~over, everything),
        "over_4k": _hits(scores, over, everything),
        "over_4k_alone": _hits(scores, over, over),
        "late_chunking": f"none: the model sees {encoder.info.window} tokens at once, one chunk",
    }


def _lengths(strata: Sequence[tuple[int, int, int]]) -> list[float]:
    lengths = [
        least * (most / least) ** ((at + 0.5) / count)
        for count, least, most in strata
        for at in range(count)
    ]
    random.Random(corpus.SEED).shuffle(lengths)  # noqa: S311 - the same documents every time
    return lengths


def _embedded(encoder: TorchEncoder, chunker: Chunker, texts: Sequence[str]) -> list[Embedded]:
    spans, windows = [], []
    for text in texts:
        whole = encoder.tokenize([text], None)[0]
        offsets = encoder.offsets(whole)
        spans.append(chunker.spans(text, offsets))
        windows += encoder.windows(whole, offsets, spans[-1])
    rows = _encode(encoder, windows)
    stops = np.cumsum([len(found) for found in spans])
    return [Embedded(*pair) for pair in zip(spans, np.split(rows, stops[:-1]), strict=True)]


def _encode(encoder: TorchEncoder, windows: Sequence[TokenizedText]) -> Floats:
    # Sorted by length, because the model computes padding, too.
    order = sorted(range(len(windows)), key=lambda at: windows[at].tokens)
    rows = np.empty((len(windows), encoder.info.width), dtype=np.float32)
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        rows[batch] = encoder.encode([windows[at] for at in batch])
    return _unit(rows)


def _scores(questions: Floats, embedded: Sequence[Embedded]) -> dict[str, Floats]:
    """Return, by method, each document's score for each question, shape (questions, documents)."""

    def against(rows: Sequence[Floats]) -> Floats:
        scores: Floats = questions @ _unit(np.stack(rows)).T
        return scores

    scores = {TRUNCATION: against([document.rows[0] for document in embedded])}
    for method in AGGREGATED:
        scores[method] = against(
            [
                aggregate(document.rows, chunk_weights(document.spans, method), method)
                for document in embedded
            ]
        )
    best = [(questions @ document.rows.T).max(axis=1) for document in embedded]
    return scores | {BEST_CHUNK: np.stack(best, axis=1)}


def _hits(scores: Mapping[str, Floats], asked: Hits, among: Hits) -> dict[str, Any]:
    """Return the rates of hits for the questions ``asked`` when the documents ``among`` are ranked."""
    count = int(asked.sum())
    found: dict[str, Any] = {"questions": count, "ranked": int(among.sum())}
    for name, first in FIRST.items():
        hits = {method: _is_hit(table, first, among)[asked] for method, table in scores.items()}
        found[name] = {method: float(hit.mean()) for method, hit in hits.items()}
        found[f"{name}_interval"] = {
            method: _wilson(int(hit.sum()), count) for method, hit in hits.items()
        }
        found[f"{name}_by_chance"] = min(1.0, first / found["ranked"])
        found[f"{name}_over_truncation"] = _ratio(hits["overlap_aware"], hits[TRUNCATION])
    return found


def _is_hit(scores: Floats, first: int, among: Hits) -> Hits:
    own = np.diag(scores)[:, None]
    hit: Hits = (scores[:, among] > own).sum(axis=1) < first
    return hit


def _wilson(hits: int, count: int) -> list[float]:
    share, spread = hits / count, Z * Z / count
    middle = share + spread / 2
    half = Z * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return [max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))]


def _ratio(hits: Hits, others: Hits) -> dict[str, Any]:
    """Return the ratio of two rates of hits; its interval is by bootstrap over the questions."""
    drawn = np.random.default_rng(corpus.SEED).integers(0, len(hits), (RESAMPLED, len(hits)))
    # The divisor is one hit at least, so it is never zero.
    ratios = hits[drawn].sum(axis=1) / np.maximum(1, others[drawn].sum(axis=1))
    return {
        "ratio": float(hits.sum() / max(1, others.sum())),
        "interval": [float(edge) for edge in np.percentile(ratios, [2.5, 97.5])],
    }


def _unit(rows: Floats) -> Floats:
    unit: Floats = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def _median(counts: Any) -> float:
    return float(statistics.median(counts))
