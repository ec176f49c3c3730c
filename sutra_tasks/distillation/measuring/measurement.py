"""What a student is worth: measured as it will serve, beside its teacher, on text it has not seen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from safetensors import safe_open

from sutra_tasks.distillation.config import DistillationMetrics
from sutra_tasks.distillation.data.local_embedding import embed_locally
from sutra_tasks.distillation.measuring.quality import (
    LabelledRetrieval,
    cosines,
    measure_quality,
    squared_errors,
)
from sutra_tasks.distillation.measuring.ranking import padded
from sutra_tasks.distillation.measuring.speed import speed_ratio
from sutra_tasks.distillation.training.projection import project
from sutra_tasks.distillation.training.students import bytes_on_disk

if TYPE_CHECKING:
    from sutra_tasks.engines.encoder import Encoder
    from sutra_tasks.vectors import Floats

__all__ = ["count_parameters", "labelled_retrieval", "measure_student"]

BATCH: Final = 256
TIMED_TEXTS: Final = 128
TIMED: Final = 5
BYTES_PER_FLOAT: Final = 4


def labelled_retrieval(
    pairs: Sequence[tuple[str, str]], teacher_of: Mapping[str, Floats], student: Encoder
) -> LabelledRetrieval | None:
    """Return pairs as retrieval: each query among the texts of all pairs; None without pairs."""
    if not pairs:
        return None
    queries = list(dict.fromkeys(query for query, _ in pairs))
    documents = list(dict.fromkeys(positive for _, positive in pairs))
    at = {text: number for number, text in enumerate(documents)}
    answers: dict[str, list[int]] = {query: [] for query in queries}
    for query, positive in pairs:
        answers[query].append(at[positive])
    relevant, gains = padded([sorted(set(found)) for found in answers.values()])
    return LabelledRetrieval(
        np.stack([teacher_of[text] for text in queries]),
        np.stack([teacher_of[text] for text in documents]),
        embed_locally(student, queries),
        embed_locally(student, documents),
        relevant,
        gains,
    )


def measure_student(
    teacher: Encoder,
    student: Encoder,
    *,
    held_out: Sequence[str],
    rows: Floats,
    pairs: Sequence[tuple[str, str]],
    teacher_of: Mapping[str, Floats],
    matrix: Floats,
    folders: tuple[Path, Path],
    seed: int,
) -> dict[str, Any]:
    """Return quality, speed, sizes, and :class:`DistillationMetrics`, as JSON.

    Args:
        teacher: the engine that serves it.
        student: the engine that will.
        held_out: texts to measure on.
        rows: the teacher's unit vectors of them.
        pairs: labelled queries and texts, none learned from.
        teacher_of: the teacher's unit vectors of the texts in ``pairs``.
        matrix: the projection between them.
        folders: where teacher and student are.
        seed: of resampling.
    """
    ours = embed_locally(student, held_out)
    quality = measure_quality(
        rows,
        ours,
        matrix,
        rng=np.random.default_rng(seed),
        labelled=labelled_retrieval(pairs, teacher_of, student),
    )
    timed = list(held_out[:TIMED_TEXTS])
    speed = speed_ratio(
        lambda some: embed_locally(teacher, some),
        lambda some: embed_locally(student, some),
        timed,
        TIMED,
    )
    sizes = {
        "parameters": [count_parameters(folder) for folder in folders],
        "bytes_on_disk": [bytes_on_disk(folder) for folder in folders],
        "bytes_per_vector": [BYTES_PER_FLOAT * one.info.width for one in (teacher, student)],
    }
    before, after = sizes["bytes_on_disk"]
    ratio = quality.ndcg_ratio.value if quality.ndcg_ratio is not None else None
    target = project(matrix, rows)
    metrics = DistillationMetrics.over(
        DistillationMetrics(
            cosine_similarity=float(np.mean(cosines(target[part], ours[part]))),
            mse=float(np.mean(squared_errors(target[part], ours[part]))),
            ndcg_preservation=ratio,
            compression_ratio=before / after,
            speed_improvement=speed,
            texts=len(ours[part]),
        )
        for part in (slice(at, at + BATCH) for at in range(0, len(ours), BATCH))
    )
    return {
        "metrics": metrics.to_json(),
        "quality": quality.to_json(),
        "cosines": [round(float(value), 4) for value in cosines(target, ours)],
        "speed": {"speed_improvement": speed, "texts": len(timed), "repeats": TIMED},
        "sizes": sizes,
    }


def count_parameters(folder: Path) -> int:
    """Return how many weights the files of a model hold."""
    count = 0
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "np") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - no mapping
    return count
