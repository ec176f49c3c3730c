"""What a run learns from, and what it is measured on."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from sutra_tasks import DistillationConfig
from sutra_tasks.distillation.data.run_texts import RunTexts, read_run_texts
from sutra_tasks.errors import InvalidOptionError, TooLittleTextError
from sutra_tasks.settings import Settings

TEXTS = [f"text number {n}" for n in range(100)]
PAIRS = [(f"question {n}", TEXTS[n]) for n in range(20)]


def gathered(folder: Path, pairs: list[tuple[str, str]] = PAIRS, **changed: Any) -> RunTexts:
    (folder / "texts.txt").write_text("\n".join(TEXTS))
    rows = [json.dumps({"query": query, "positive": positive}) for query, positive in pairs]
    (folder / "pairs.jsonl").write_text("\n".join(rows))
    given: dict[str, Any] = {"teacher": "tiny", "texts": ("texts.txt",), "pairs": "pairs.jsonl"}
    config = DistillationConfig(**(given | {"held_out": 20} | changed))
    return read_run_texts(config, Settings(data_dir=str(folder)), ["question 3", "of real traffic"])


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
    assert len({positive for _, positive in found.pairs}) == 5  # of 21 answers
    assert len(found.task_pairs) >= 9
    assert measured.isdisjoint(chain.from_iterable(found.task_pairs))
    assert measured.isdisjoint(found.train)
    assert found.facts["pairs"] == 22
    assert found.facts["pairs_measured_on"] == len(found.pairs)
    assert found.facts["pairs_learned_from"] == len(found.task_pairs)


def test_a_task_loss_learns_from_no_text_that_is_held_out(tmp_path: Path) -> None:
    found = gathered(tmp_path, [(f"q {n}", text) for n, text in enumerate(TEXTS)], task_weight=0.5)
    learned = set(chain.from_iterable(found.task_pairs))
    assert learned.isdisjoint(found.held_out)
    assert found.task_pairs
    assert len(found.task_pairs) + len(found.pairs) < len(TEXTS)


def test_many_queries_of_few_answers_are_learned_from_and_measured_on(tmp_path: Path) -> None:
    pairs = [(f"question {n}", f"answer {n % 7}") for n in range(1_000)]
    found = gathered(tmp_path, pairs, task_weight=0.5)
    answers = [{positive for _, positive in some} for some in (found.task_pairs, found.pairs)]
    assert list(map(len, answers)) == [5, 2]
    assert len(found.task_pairs) + len(found.pairs) == 1_000


def test_which_answers_are_measured_on_does_not_depend_on_the_order_of_pairs(tmp_path: Path) -> None:
    one, other = (gathered(tmp_path, pairs, task_weight=0.5) for pairs in (PAIRS, PAIRS[::-1]))
    assert set(one.pairs) == set(other.pairs)


@pytest.mark.parametrize("pairs", [[("q", "a")], [("q", f"a {n}") for n in range(9)]])
def test_a_task_loss_with_no_pair_to_learn_from_is_refused(
    pairs: list[tuple[str, str]], tmp_path: Path
) -> None:
    assert gathered(tmp_path, pairs).pairs == tuple(pairs)
    with pytest.raises(InvalidOptionError, match="pairs to learn from"):
        gathered(tmp_path, pairs, task_weight=0.5)


def test_a_sample_counts_among_the_texts_that_are_learned_from(tmp_path: Path) -> None:
    assert len(gathered(tmp_path, [("q", "a")], sample=True, max_texts=50).train) == 50


def test_bad_rows_of_pairs_are_counted_and_named_beside_those_of_texts(tmp_path: Path) -> None:
    gathered(tmp_path)
    (tmp_path / "bad.jsonl").write_text("{\n" * 2)
    with (tmp_path / "pairs.jsonl").open("a") as file:
        file.write('\n{"query": "q"}\n')
    given: dict[str, Any] = {"teacher": "tiny", "texts": ("texts.txt", "bad.jsonl")}
    config = DistillationConfig(**given, pairs="pairs.jsonl", held_out=20)
    facts = read_run_texts(config, Settings(data_dir=str(tmp_path)), ()).facts
    assert facts["bad_rows"] == 3
    assert [row.split(" ")[0] for row in facts["bad"]] == [
        "bad.jsonl:1:", "bad.jsonl:2:", "pairs.jsonl:21:",
    ]  # fmt: skip


def test_without_a_task_loss_no_pair_is_learned_from(tmp_path: Path) -> None:
    assert gathered(tmp_path).task_pairs == ()


def test_what_is_left_without_the_texts_of_pairs_may_be_too_little(tmp_path: Path) -> None:
    with pytest.raises(TooLittleTextError) as refused:
        gathered(tmp_path, held_out=30)
    assert (refused.value.found, refused.value.needed, refused.value.left_out) == (80, 90, 20)
    assert "20 more are left out" in str(refused.value)


@pytest.mark.parametrize(
    "changed", [{"seed": 1}, {"held_out": 21}, {"task_weight": 0.1}, {"sample": True}]
)
def test_other_texts_have_another_fingerprint(changed: dict[str, Any], tmp_path: Path) -> None:
    one, again, other = gathered(tmp_path), gathered(tmp_path), gathered(tmp_path, **changed)
    assert one.fingerprint == again.fingerprint
    assert one.fingerprint != other.fingerprint
