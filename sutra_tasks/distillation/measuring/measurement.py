"""All measurements of a student: quality on held-out text, speed and size, beside its teacher."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from safetensors import safe_open

from sutra_tasks.distillation.config import DistillationMetrics
from sutra_tasks.distillation.data.local_embedding import embed_locally
from sutra_tasks.distillation.measuring.quality import LabelledRetrieval, measure_quality
from sutra_tasks.distillation.measuring.ranking import cosines, padded, squared_errors
from sutra_tasks.distillation.measuring.speed import speed_ratio
from sutra_tasks.distillation.training.projection import lift, project

if TYPE_CHECKING:
    from sutra_tasks.engines.encoder import Encoder
    from sutra_tasks.vectors import Floats

__all__ = ["bytes_on_disk", "count_parameters", "labelled_retrieval", "measure_student"]

BATCH: Final = 256
TIMED_TEXTS: Final = 128
TIMED_TURNS: Final = 5
BYTES_PER_FLOAT: Final = 4
WEIGHTS: Final = (".safetensors", ".bin")


def measure_student(
    teacher: Encoder,
    student: Encoder,
    *,
    held_out: Sequence[str],
    teacher_held_out: Floats,
    pairs: Sequence[tuple[str, str]],
    teacher_labelled: Mapping[str, Floats],
    matrix: Floats,
    folders: tuple[Path, Path],
    seed: int,
) -> dict[str, Any]:
    """Return quality, speed, sizes and :class:`DistillationMetrics`, as JSON.

    Args:
        teacher: its engine.
        student: the engine that will serve it.
        held_out: texts to measure on.
        teacher_held_out: the teacher's unit vectors of them.
        pairs: labelled (query, answer) pairs that were not learned from.
        teacher_labelled: the teacher's unit vectors of the texts in ``pairs``.
        matrix: the projection.
        folders: of the teacher and the student.
        seed: of resampling.
    """
    vectors = embed_locally(student, held_out)
    quality = measure_quality(
        teacher_held_out,
        vectors,
        matrix,
        rng=np.random.default_rng(seed),
        labelled=labelled_retrieval(pairs, teacher_labelled, student),
    )
    timed = list(held_out[:TIMED_TEXTS])
    speed = speed_ratio(
        lambda texts: embed_locally(teacher, texts),
        lambda texts: embed_locally(student, texts),
        timed,
        TIMED_TURNS,
    )
    sizes = {
        "parameters": [count_parameters(folder) for folder in folders],
        "bytes_on_disk": [bytes_on_disk(folder) for folder in folders],
        "bytes_per_vector": [BYTES_PER_FLOAT * one.info.width for one in (teacher, student)],
    }
    teacher_bytes, student_bytes = sizes["bytes_on_disk"]
    targets = project(matrix, teacher_held_out)
    lifted = cosines(teacher_held_out, lift(matrix, vectors))
    metrics = DistillationMetrics.over(
        DistillationMetrics(
            lifted_cosine=float(np.mean(lifted[part])),
            cosine_similarity=float(np.mean(cosines(targets[part], vectors[part]))),
            mse=float(np.mean(squared_errors(targets[part], vectors[part]))),
            ndcg_preservation=quality.ndcg_ratio.value if quality.ndcg_ratio is not None else None,
            compression_ratio=teacher_bytes / student_bytes,
            speed_improvement=speed,
            texts=len(vectors[part]),
        )
        for part in (slice(at, at + BATCH) for at in range(0, len(vectors), BATCH))
    )
    return {
        "metrics": metrics.to_json(),
        "quality": quality.to_json(),
        "cosines": [round(float(value), 4) for value in lifted],
        "speed": {"speed_improvement": speed, "texts": len(timed), "repeats": TIMED_TURNS},
        "sizes": sizes,
    }


def labelled_retrieval(
    pairs: Sequence[tuple[str, str]], teacher_vectors: Mapping[str, Floats], student: Encoder
) -> LabelledRetrieval | None:
    """Return labelled pairs as retrieval of each query's answers among all answers; None without pairs.

    Args:
        pairs: (query, answer).
        teacher_vectors: the teacher's unit vector of each text in ``pairs``.
        student: computes the student's vectors.
    """
    if not pairs:
        return None
    queries = list(dict.fromkeys(query for query, _ in pairs))
    documents = list(dict.fromkeys(answer for _, answer in pairs))
    index = {text: number for number, text in enumerate(documents)}
    answers: dict[str, list[int]] = {query: [] for query in queries}
    for query, answer in pairs:
        answers[query].append(index[answer])
    relevant, gains = padded([sorted(set(found)) for found in answers.values()])
    return LabelledRetrieval(
        np.stack([teacher_vectors[text] for text in queries]),
        np.stack([teacher_vectors[text] for text in documents]),
        embed_locally(student, queries),
        embed_locally(student, documents),
        relevant,
        gains,
    )


def bytes_on_disk(folder: Path) -> int:
    """Return the size of a model's files of weights."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.suffix in WEIGHTS)


def count_parameters(folder: Path) -> int:
    """Return the number of weights in a model's files."""
    count = 0
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "np") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - no mapping
    return count
