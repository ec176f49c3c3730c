"""What a run learns from, and what it is measured on."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from sutra_tasks import DistillationConfig
from sutra_tasks.distillation.material import Material, gather
from sutra_tasks.errors import TooLittleTextError
from sutra_tasks.settings import Settings

TEXTS = [f"text number {n}" for n in range(100)]
PAIRS = [(f"question {n}", TEXTS[n]) for n in range(20)]


def gathered(folder: Path, pairs: list[tuple[str, str]] = PAIRS, **changed: Any) -> Material:
    (folder / "texts.txt").write_text("\n".join(TEXTS))
    rows = [json.dumps({"query": query, "positive": positive}) for query, positive in pairs]
    (folder / "pairs.jsonl").write_text("\n".join(rows))
    given: dict[str, Any] = {"teacher": "tiny", "texts": ("texts.txt",), "pairs": "pairs.jsonl"}
    config = DistillationConfig(**(given | {"held_out": 20} | changed))
    return gather(config, Settings(data_dir=str(folder)), ["question 3", "of real traffic"])


def test_every_text_is_learned_from_or_measured_on_and_none_is_both(tmp_path: Path) -> None:
    found = gathered(tmp_path, sample=True)
    measured = set(chain.from_iterable(found.pairs))
    assert found.pairs == tuple(PAIRS)
    assert len(found.held_out) == 20
    assert set(found.train) | set(found.held_out) | measured >= {*TEXTS, "of real traffic"}
    assert set(found.train).isdisjoint(found.held_out)
    assert measured.isdisjoint([*found.train, *found.held_out])
    assert found.facts["texts_of_pairs_left_out"] == 21


def test_a_task_loss_learns_from_no_pair_that_shares_a_text_with_one_it_is_measured_on(
    tmp_path: Path,
) -> None:
    pairs = [*PAIRS, *PAIRS, ("question 0", TEXTS[50]), ("another question", TEXTS[5])]
    found = gathered(tmp_path, pairs, task_weight=0.5)
    measured = set(chain.from_iterable(found.pairs))
    assert len(found.pairs) == 5
    assert len(found.task_pairs) == 16
    assert measured.isdisjoint(chain.from_iterable(found.task_pairs))
    assert measured.isdisjoint(found.train)


def test_without_a_task_loss_no_pair_is_learned_from(tmp_path: Path) -> None:
    assert gathered(tmp_path).task_pairs == ()


def test_what_is_left_without_the_texts_of_pairs_may_be_too_little(tmp_path: Path) -> None:
    with pytest.raises(TooLittleTextError) as refused:
        gathered(tmp_path, held_out=30)
    assert (refused.value.found, refused.value.needed) == (80, 90)


@pytest.mark.parametrize(
    "changed", [{"seed": 1}, {"held_out": 21}, {"task_weight": 0.1}, {"sample": True}]
)
def test_other_texts_have_another_fingerprint(changed: dict[str, Any], tmp_path: Path) -> None:
    one, again, other = gathered(tmp_path), gathered(tmp_path), gathered(tmp_path, **changed)
    assert one.fingerprint == again.fingerprint
    assert one.fingerprint != other.fingerprint
