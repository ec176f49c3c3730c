"""A recipe is valid or refused by name, and what was measured adds up over batches."""

import json
import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st

from sutra_tasks.distillation.config import (
    BY_STUDENT,
    PROJECTIONS,
    STUDENTS,
    DistillationConfig,
    DistillationMetrics,
)
from sutra_tasks.errors import InvalidOptionError, UnsupportedVersionError
from sutra_tasks.models.registry.names import check_model_name

LEAST: dict[str, Any] = {"teacher": "m", "texts": ("a.jsonl",)}

OTHER: dict[str, Any] = {
    "teacher": "other",
    "texts": ("a.jsonl", "b.txt"),
    "sample": True,
    "pairs": "pairs.jsonl",
    "name": "small-1.5_x",
    "student": "named",
    "student_model": "base",
    "output_dim": 256,
    "projection": "jl",
    "alpha": 0.25,
    "task_weight": 0.5,
    "similarity_weight": 2.0,
    "matryoshka": (64, 128),
    "learning_rate": 1e-3,
    "warmup_share": 0.0,
    "weight_decay": 0.1,
    "batch_size": 64,
    "max_epochs": 1,
    "quality_threshold": 0.9,
    "patience": 1,
    "eval_steps": 50,
    "held_out": 20,
    "max_texts": 5_000,
    "checkpoint_steps": 10,
    "checkpoint_minutes": 0.5,
    "half_precision": False,
    "seed": 7,
}

BAD: dict[str, list[Any]] = {
    "teacher": [None, 1, b"m"],
    "texts": ["a.jsonl", None, (), ("",), (1,), (None,)],
    "sample": [None, 1, "yes"],
    "pairs": [1, b"a"],
    "name": [1, "", "-a", "a/b", "../a", "a..b", "a b", "ä", "x" * 65],
    "student": [None, 1, "", "Layers", "smaller"],
    "student_model": [1, "base"],
    "layers": [0, -1, 1.0, "3", True],
    "output_dim": [0, -1, 256.0, "256", True],
    "projection": [None, 1, "pca", "SVD"],
    "alpha": [-0.01, 1.01, math.nan, math.inf, "0.5", True],
    "task_weight": [None, -0.01, 1.01, math.nan, 0.5],
    "similarity_weight": [-0.01, math.nan, math.inf],
    "matryoshka": [64, "64", (0,), (-1,), (1.5,), ("64",), (True,)],
    "learning_rate": [0, -1e-4, 1.01, math.nan, math.inf, "1e-4"],
    "warmup_share": [None, -0.1, 1.1, math.nan],
    "weight_decay": [None, -0.1, math.nan, math.inf],
    "batch_size": [0, -1, 32.0, "32", True],
    "max_epochs": [None, 0, 1.5, True],
    "quality_threshold": [None, -0.1, 1.1, math.nan],
    "patience": [None, 0, 1.5],
    "eval_steps": [0, 1.5, "10"],
    "held_out": [None, 19, 0, 20.0],
    "max_texts": [None, 0, 1.5],
    "checkpoint_steps": [None, 0, 1.5],
    "checkpoint_minutes": [None, 0, -1, math.nan, math.inf],
    "half_precision": [None, 0, "no"],
    "seed": [None, -1, 0.5, True],
}
VALUES = [(name, value) for name, values in BAD.items() for value in values]


def test_every_option_has_bad_values_here() -> None:
    names = {option.name for option in fields(DistillationConfig)}
    assert set(BAD) == names
    assert set(OTHER) == names - {"layers"}


@pytest.mark.parametrize(("name", "value"), VALUES, ids=[f"{n}={v!r:.20}" for n, v in VALUES])
def test_a_bad_value_is_refused_by_name_directly_and_as_json(name: str, value: Any) -> None:
    options: dict[str, Any] = LEAST | {name: value}
    with pytest.raises(InvalidOptionError) as directly:
        DistillationConfig(**options)
    with pytest.raises(InvalidOptionError) as as_json:
        DistillationConfig.from_json(options | {"v": 1})
    for caught in (directly.value, as_json.value):
        assert caught.option == name
        assert json.loads(json.dumps(caught.args)) == list(caught.args)


def test_what_the_issue_names_is_there() -> None:
    needed = {"alpha", "task_weight", "learning_rate", "max_epochs", "quality_threshold", "output_dim"}
    assert needed <= {option.name for option in fields(DistillationConfig)}
    measured = {
        "cosine_similarity",
        "mse",
        "ndcg_preservation",
        "compression_ratio",
        "speed_improvement",
    }
    assert measured <= {option.name for option in fields(DistillationMetrics)}


def test_a_recipe_travels_as_json_whole() -> None:
    layers = DistillationConfig(**LEAST, layers=3)
    for config in (DistillationConfig(**LEAST), layers, DistillationConfig(**OTHER)):
        stored = json.loads(json.dumps(config.to_json(), allow_nan=False))
        assert DistillationConfig.from_json(stored) == config
        assert stored["v"] == 1
    assert all(getattr(DistillationConfig(**OTHER), name) == value for name, value in OTHER.items())


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_every_student_and_projection_can_be_asked_for(student: str, projection: str) -> None:
    model = "base" if student == "named" else None
    config = DistillationConfig(
        **LEAST, student=student, student_model=model, projection=projection, output_dim=8
    )
    assert (config.student, config.projection) == (student, projection)


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"student": "named"}, "student_model"),
        ({"student": "static", "student_model": "base"}, "student_model"),
        ({"student": "static", "layers": 3}, "layers"),
        ({"student": "projection", "layers": 3}, "layers"),
        ({"task_weight": 0.1}, "task_weight"),
        ({"output_dim": 128, "matryoshka": (64, 128)}, "matryoshka"),
        ({"output_dim": 128, "matryoshka": (256,)}, "matryoshka"),
        ({"texts": (), "sample": False}, "texts"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], refused: str) -> None:
    with pytest.raises(InvalidOptionError) as caught:
        DistillationConfig(**{**LEAST, **options})
    assert caught.value.option == refused


def test_options_that_go_together_are_taken() -> None:
    assert DistillationConfig(teacher="m", sample=True).texts == ()
    assert DistillationConfig(**LEAST, output_dim=128, matryoshka=[64, 127]).matryoshka == (64, 127)  # type: ignore[arg-type]
    assert DistillationConfig(**LEAST, matryoshka=(64,)).output_dim is None
    assert DistillationConfig(**LEAST, pairs="p.jsonl", task_weight=1).task_weight == 1


@pytest.mark.parametrize("name", ["alpha", "warmup_share", "quality_threshold"])
@pytest.mark.parametrize("value", [0, 1, 0.5])
def test_the_ends_of_a_range_belong_to_it(name: str, value: float) -> None:
    assert getattr(DistillationConfig(**{**LEAST, name: value}), name) == value


@pytest.mark.parametrize("version", [None, 0, 2, "1", [1]])
def test_another_version_is_told_from_a_bad_recipe(version: Any) -> None:
    with pytest.raises(UnsupportedVersionError):
        DistillationConfig.from_json({**LEAST, "v": version})


@pytest.mark.parametrize(
    ("value", "refused"),
    [
        ({"v": 1, **LEAST, "temperature": 2}, "temperature"),
        ({"v": 1, "texts": ["a.txt"]}, "teacher"),
        ({"v": 1, "teacher": "m", "texts": "a.txt"}, "texts"),
        ({"v": 1, **LEAST, "matryoshka": 64}, "matryoshka"),
        ([], "config"),
        ("m", "config"),
        (None, "config"),
    ],
)
def test_what_is_no_recipe_is_refused_by_name(value: Any, refused: str) -> None:
    with pytest.raises(InvalidOptionError) as caught:
        DistillationConfig.from_json(value)
    assert caught.value.option == refused


@laws(max_examples=80)
@given(st.text(max_size=70))
def test_a_model_name_is_always_a_safe_part_of_a_path(name: str) -> None:
    try:
        assert check_model_name(name) == name
    except InvalidOptionError as error:
        assert len(error.value) <= 80  # noqa: PT017 - a name may be good or bad
        return
    assert 0 < len(name) <= 64
    assert name.isascii()
    assert not set(name) & set("/\\\0 \n@:")
    assert ".." not in name
    assert name[0] not in ".-"


MEASURED = st.builds(
    DistillationMetrics,
    cosine_similarity=st.floats(-1, 1),
    mse=st.floats(0, 4),
    ndcg_preservation=st.none() | st.floats(0, 2),
    compression_ratio=st.floats(0.1, 100),
    speed_improvement=st.floats(0.1, 100),
    texts=st.integers(0, 1_000),
)


@laws(max_examples=80)
@given(st.lists(MEASURED, max_size=8))
def test_metrics_are_means_weighted_by_texts(batches: list[DistillationMetrics]) -> None:
    whole = DistillationMetrics.over(batches)
    assert whole.texts == sum(batch.texts for batch in batches)
    for option in fields(DistillationMetrics):
        if option.name == "texts":
            continue
        known = [
            (getattr(batch, option.name), batch.texts)
            for batch in batches
            if batch.texts and getattr(batch, option.name) is not None
        ]
        values, weights = zip(*known, strict=True) if known else ((), ())
        expected = np.average(values, weights=weights) if known else option.default
        found = getattr(whole, option.name)
        assert found is expected is None or found == pytest.approx(expected, abs=1e-12)


def test_a_last_batch_does_not_overwrite_the_others() -> None:
    batches = [
        DistillationMetrics(cosine_similarity=1.0, ndcg_preservation=0.5, texts=30),
        DistillationMetrics(cosine_similarity=0.0, texts=10),
    ]
    whole = DistillationMetrics.over(iter(batches))
    assert (whole.cosine_similarity, whole.ndcg_preservation, whole.texts) == (0.75, 0.5, 40)


def test_metrics_are_json() -> None:
    metrics = DistillationMetrics(cosine_similarity=0.9, texts=4)
    assert DistillationMetrics(**json.loads(json.dumps(metrics.to_json(), allow_nan=False))) == metrics


def test_what_is_not_given_suits_the_student() -> None:
    layers, static = DistillationConfig(**LEAST), DistillationConfig(**LEAST, student="static")
    for name, (otherwise, suited) in BY_STUDENT.items():
        assert (getattr(layers, name), getattr(static, name)) == (otherwise, suited)
    assert DistillationConfig(**LEAST, student="static", alpha=0.5).alpha == 0.5
