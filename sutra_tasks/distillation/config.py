"""The recipe of a distillation and its metrics, as JSON in messages and results.

Clients import this module; it needs no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final

from sutra_tasks.errors import InvalidOptionError, UnsupportedVersionError
from sutra_tasks.models.registry.names import check_model_name

__all__ = [
    "PROJECTIONS",
    "STUDENTS",
    "VERSION",
    "DistillationConfig",
    "DistillationMetrics",
]

VERSION: Final = 1
STUDENTS: Final = ("layers", "named", "static", "projection")
PROJECTIONS: Final = ("svd", "jl")
BY_STUDENT: Final[dict[str, tuple[float, float]]] = {
    "alpha": (0.5, 0.0),
    "similarity_weight": (1.0, 0.0),
    "learning_rate": (5e-4, 5e-3),
    "batch_size": (32, 256),
}
"""Defaults of options, for students with a transformer and for static ones. A static student needs a
higher learning rate, and the length of its vectors before normalising means nothing, so it has no
squared error; docs/distillation.md has figures."""


def _within(default: Any, least: float | None = None, most: float | None = None) -> Any:
    return field(default=default, metadata={"least": least, "most": most})


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillationConfig:
    """One recipe; creating it checks every option.

    Attributes:
        teacher: name of the model to learn from, as in ``SUTRA_MODEL`` or in the registry.
        texts: names of files in ``SUTRA_DATA_DIR`` (``.jsonl``, ``.txt``, ``.csv``, ``.parquet``).
        sample: whether to learn from the sample of real traffic as well (``SUTRA_SAMPLE_TEXTS``); its
            texts count towards ``max_texts``.
        pairs: a JSONL file in ``SUTRA_DATA_DIR`` with labelled retrieval pairs, on each line an object
            with ``query`` and ``positive``: for NDCG@10, and for the task loss.
        name: model in the registry that gets the student as a new version; None: a name made of teacher,
            student and width.
        student: ``layers`` (the teacher with fewer layers), ``named`` (another model), ``static`` (a
            vector for each token, no transformer) or ``projection`` (the teacher with narrower vectors).
        student_model: the model to start from, for ``named``.
        layers: number of the teacher's layers that are kept, for ``layers``; None: half.
        output_dim: width of the student's vectors; None: the teacher's.
        projection: ``svd`` (leading right singular vectors of the teacher's vectors) or ``jl``
            (Johnson-Lindenstrauss, orthonormalised).
        alpha: share of the squared error in the distillation loss; the rest is the cosine loss. None:
            0.5, for a static student 0.
        task_weight: share of a contrastive loss on ``pairs`` in the whole loss; the pairs of a fifth of
            the answers are then measured on.
        similarity_weight: weight of the term on similarities within a batch; None: 1, for a static
            student 0.
        matryoshka: narrower widths at which the vectors should be good as well.
        learning_rate: of AdamW after the warm-up; None: 5e-4, for a static student 5e-3.
        warmup_share: share of all steps in which the learning rate rises.
        weight_decay: of AdamW.
        batch_size: texts in one step; None: 32, for a static student 256.
        max_epochs: passes over the texts, at most.
        quality_threshold: mean cosine to the projected teacher on held-out text at which training ends.
        patience: evaluations without improvement after which training ends.
        eval_steps: steps between two evaluations; None: an epoch.
        held_out: number of texts that are measured on and never learned from.
        max_texts: number of texts to learn from, at most; of more texts a uniform draw is used.
        checkpoint_steps: steps between two checkpoints, at most.
        checkpoint_minutes: minutes between two checkpoints, at most.
        half_precision: whether to store the student in float16.
        seed: of everything random.
    """

    teacher: str
    texts: tuple[str, ...] = ()
    sample: bool = False
    pairs: str | None = None
    name: str | None = None
    student: str = "layers"
    student_model: str | None = None
    layers: int | None = _within(None, 1)
    output_dim: int | None = _within(None, 1)
    projection: str = "svd"
    alpha: float = _within(None, 0, 1)
    task_weight: float = _within(0.0, 0, 1)
    similarity_weight: float = _within(None, 0)
    matryoshka: tuple[int, ...] = ()
    learning_rate: float = _within(None, 1e-9, 1)
    warmup_share: float = _within(0.1, 0, 1)
    weight_decay: float = _within(0.01, 0)
    batch_size: int = _within(None, 1)
    max_epochs: int = _within(3, 1)
    quality_threshold: float = _within(0.98, 0, 1)
    patience: int = _within(3, 1)
    eval_steps: int | None = _within(None, 1)
    held_out: int = _within(1_000, 20)
    max_texts: int = _within(200_000, 1)
    checkpoint_steps: int = _within(200, 1)
    checkpoint_minutes: float = _within(5.0, 0.01)
    half_precision: bool = True
    seed: int = _within(0, 0)

    def __post_init__(self) -> None:
        self._fill_in()
        self._check_kinds()
        self._check_bounds()
        for name, known in (("student", STUDENTS), ("projection", PROJECTIONS)):
            if getattr(self, name) not in known:
                raise _refused(name, getattr(self, name), f"one of {', '.join(known)}")
        if not self.texts and not self.sample:
            raise _refused("texts", "()", "at least one file, or sample=True")
        if self.name is not None:
            check_model_name(self.name)
        if (self.student == "named") != (self.student_model is not None):
            raise _refused(
                "student_model", self.student_model, "a model for student='named', and only then"
            )
        if self.layers is not None and self.student != "layers":
            raise _refused("layers", self.layers, "student='layers' beside it")
        if self.task_weight and self.pairs is None:
            raise _refused(
                "task_weight", self.task_weight, "pairs beside it: it is a loss on labelled pairs"
            )
        widest = self.output_dim or math.inf
        if any(type(width) is not int or not 0 < width < widest for width in self.matryoshka):
            raise _refused("matryoshka", self.matryoshka, "whole numbers under output_dim")

    def _fill_in(self) -> None:
        for name in ("texts", "matryoshka"):
            given: Any = getattr(self, name)
            if not isinstance(given, list | tuple):  # a str is a sequence of letters
                raise _refused(name, type(given).__name__, "a list")
            object.__setattr__(self, name, tuple(given))
        for name, (otherwise, static) in BY_STUDENT.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, static if self.student == "static" else otherwise)

    def _check_kinds(self) -> None:
        for option in fields(self):
            value, kind = getattr(self, option.name), str(option.type)
            fits = {
                "str": isinstance(value, str),
                "int": type(value) is int,
                "float": type(value) in (int, float),
                "bool": isinstance(value, bool),
            }.get(kind.removesuffix(" | None"), True)
            if not (fits or (value is None and kind.endswith("None"))):
                raise _refused(option.name, type(value).__name__, kind)
        if not all(isinstance(name, str) and name for name in self.texts):
            raise _refused("texts", "...", "names of files")

    def _check_bounds(self) -> None:
        for option in fields(self):
            value, least = getattr(self, option.name), option.metadata.get("least")
            most = option.metadata.get("most")
            if value is None or least is None:
                continue
            if not least <= value < math.inf or (most is not None and value > most):
                upper = f" to {most:g}" if most is not None else " or more"
                raise _refused(option.name, value, f"{least:g}{upper}")

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as JSON."""
        return {"v": VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> DistillationConfig:
        """Read a recipe from JSON.

        Raises:
            UnsupportedVersionError: another release wrote it.
            InvalidOptionError: an option is unknown, or has an unusable value.
        """
        if not isinstance(value, Mapping):
            raise _refused("config", type(value).__name__, "a DistillationConfig")
        given = dict(value)
        version = given.pop("v", None)
        if version != VERSION:
            raise UnsupportedVersionError("distillation config", str(version)[:20], VERSION)
        known = [option.name for option in fields(cls)]
        for name in given:
            if name not in known:
                raise _refused(name, "...", f"one of {', '.join(known)}")
        for name in ("texts", "matryoshka"):
            if name in given and not isinstance(given[name], list | tuple):
                raise _refused(name, type(given[name]).__name__, "a list")
        if "teacher" not in given:
            raise _refused("teacher", "...", "the name of a model")
        return cls(**given)


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillationMetrics:
    """Measurements of a student on held-out text, each a weighted mean over batches.

    Attributes:
        lifted_cosine: what is kept of the teacher: the cosine between its vectors and the student's,
            mapped back to its width.
        cosine_similarity: between the student's vectors and the projected teacher's: 1 by construction
            for a student that is a projection alone.
        mse: mean over texts of the squared distance of those unit vectors, summed over dimensions.
        ndcg_preservation: the student's NDCG@10 on labelled pairs divided by the teacher's; None without
            pairs. The report has NDCG against the teacher's ranking as well, as ``ranking_ndcg``.
        compression_ratio: bytes of the teacher's weights on disk divided by the student's.
        speed_improvement: texts a second of the student divided by the teacher's, measured in turn.
        texts: number of texts that it was measured on.
    """

    lifted_cosine: float = 0.0
    cosine_similarity: float = 0.0
    mse: float = 0.0
    ndcg_preservation: float | None = None
    compression_ratio: float = 1.0
    speed_improvement: float = 1.0
    texts: int = 0

    @classmethod
    def over(cls, batches: Iterable[DistillationMetrics]) -> DistillationMetrics:
        """Return the means over batches, weighted by their texts; values that are None are left out."""
        parts = [part for part in batches if part.texts]
        means: dict[str, Any] = {}
        for option in fields(cls):
            known = [(getattr(part, option.name), part.texts) for part in parts]
            known = [(value, weight) for value, weight in known if value is not None]
            if option.name != "texts" and known:
                total = sum(weight for _, weight in known)
                means[option.name] = sum(value * weight for value, weight in known) / total
        return cls(**means, texts=sum(part.texts for part in parts))

    def to_json(self) -> dict[str, Any]:
        """Return the metrics as JSON."""
        return asdict(self)


def _refused(name: str, value: object, expected: str) -> InvalidOptionError:
    shown = value if isinstance(value, int | float) else json.dumps(value, default=str)
    return InvalidOptionError(name, str(shown)[:80], expected)
