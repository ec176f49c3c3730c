"""The laws of the plan: what the next batch holds, whoever waits."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st

from sutra_tasks.batching.next_batch import (
    PADDING_SHARE,
    PADDING_TOKENS,
    Job,
    Limits,
    Waiting,
    next_batch,
    pause_s,
    take,
)
from sutra_tasks.engines.encoder import TokenizedText

TOKENS = st.integers(1, 80)
LIMITS = st.builds(
    Limits, max_tokens=st.integers(1, 500), max_texts=st.integers(1, 20), max_wait_s=st.just(0.0)
)
LENGTHS = st.lists(TOKENS, min_size=1, max_size=10).map(sorted)
WAITING = st.builds(Waiting, lengths=LENGTHS, overtaken=st.booleans(), alone=st.booleans())
JOBS = st.lists(WAITING, min_size=1, max_size=8)
DEFAULT = Limits(max_tokens=8192, max_texts=128, max_wait_s=0.005)
LONGEST = 512


TEXTS = [TokenizedText(tokens, content=None) for tokens in range(LONGEST + 1)]


def job(lengths: Sequence[int], *, alone: bool = False) -> Job:
    ordered = sorted(lengths)
    texts, order = [TEXTS[tokens] for tokens in ordered], list(range(len(ordered)))
    return Job(texts=texts, order=order, lengths=ordered, alone=alone)


SINGLES = st.builds(lambda tokens, alone: job([tokens], alone=alone), TOKENS, st.booleans())


def taken(jobs: list[Job], limits: Limits) -> list[list[int]]:
    """Take a batch; return the lengths taken, by job."""
    before = jobs.copy()
    batch = take(jobs, limits)
    return [[text.tokens for owner, text, _ in batch if owner is one] for one in before]


@laws(max_examples=60, deadline=None)
@given(jobs=JOBS, limits=LIMITS)
def test_a_batch_serves_its_owner_within_the_limits(jobs: list[Waiting], limits: Limits) -> None:
    plan = next_batch(jobs, limits)
    for job, part in zip(jobs, plan.parts, strict=True):
        assert part.step == 1
        assert 0 <= part.start <= part.stop <= len(job.lengths)
    owner = jobs[plan.owner]
    assert len(owner.lengths) - 1 in plan.parts[plan.owner]  # its longest
    assert plan.owner == 0 or owner.overtaken

    lengths = [job.lengths[i] for job, part in zip(jobs, plan.parts, strict=True) for i in part]
    assert len(lengths) <= limits.max_texts
    assert len(lengths) == 1 or len(lengths) * max(lengths) <= limits.max_tokens

    padded = len(lengths) * max(lengths)
    assert padded - sum(lengths) <= max(PADDING_TOKENS, PADDING_SHARE * padded)


@laws(max_examples=60, deadline=None)
@given(waiting=JOBS, limits=LIMITS)
def test_every_text_is_taken_once(waiting: list[Waiting], limits: Limits) -> None:
    every = [job(one.lengths, alone=one.alone) for one in waiting]
    jobs = every.copy()
    found: list[tuple[Job, int]] = []
    while jobs:
        batch = take(jobs, limits)
        assert batch
        found += [(owner, position) for owner, _, position in batch]
    assert len(found) == len(set(found))
    for one, was in zip(every, waiting, strict=True):
        assert {position for owner, position in found if owner is one} == set(range(len(was.lengths)))


@laws(max_examples=60, deadline=None)
@given(jobs=JOBS, limits=LIMITS)
def test_what_is_alone_shares_no_batch(jobs: list[Waiting], limits: Limits) -> None:
    plan = next_batch(jobs, limits)
    sharing = [job for job, part in zip(jobs, plan.parts, strict=True) if part]
    assert len(sharing) == 1 or not any(job.alone for job in sharing)


@laws(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    spread=st.integers(0, LONGEST - 1),
    before=st.integers(0, 60),
    tokens=st.integers(1, LONGEST),
    alone=st.booleans(),
)
def test_a_single_is_one_batch_of_a_large_job_away_at_most(
    seed: int, spread: int, before: int, tokens: int, alone: bool
) -> None:
    lengths = np.random.default_rng(seed).integers(LONGEST - spread, LONGEST + 1, 10_000)
    jobs = [job(lengths.tolist())]
    for _ in range(before):
        take(jobs, DEFAULT)
    # It arrives while the last of these batches computes: that one is not ours to change.
    single = job([tokens], alone=alone)
    jobs.append(single)
    take(jobs, DEFAULT)
    if single.lengths:
        assert taken(jobs, DEFAULT)[1] == [tokens]


@laws(max_examples=60, deadline=None)
@given(
    singles=st.lists(SINGLES, min_size=1, max_size=20),
    arrivals=st.lists(SINGLES, max_size=30),
    alone=st.booleans(),
)
def test_a_large_job_waits_only_for_singles_that_waited_for_it(
    singles: list[Job], arrivals: list[Job], alone: bool
) -> None:
    jobs = [job([100] * 10_000, alone=alone), *singles]
    patience = 0
    for arriving in arrivals:
        patience = len(jobs) - 1 if taken(jobs, DEFAULT)[0] else patience - 1
        assert patience >= 0
        jobs.append(arriving)


def test_of_equal_large_jobs_the_oldest_finishes_first() -> None:
    jobs = [first, *others] = [job([100] * 200) for _ in range(3)]
    while first.lengths:
        take(jobs, DEFAULT)
    assert all(len(other.lengths) > 150 for other in others)


@laws(max_examples=60, deadline=None)
@given(jobs=JOBS, limits=LIMITS)
def test_an_engine_that_does_not_pad_takes_texts_of_any_length_together(
    jobs: list[Waiting], limits: Limits
) -> None:
    jobs = [replace(job, pads=False, alone=False, overtaken=False) for job in jobs]
    plan = next_batch(jobs, limits)
    lengths = [job.lengths[i] for job, part in zip(jobs, plan.parts, strict=True) for i in part]
    assert len(lengths) == 1 or sum(lengths) <= limits.max_tokens
    left = jobs[0].lengths[: plan.parts[0].start]
    assert not left or len(lengths) == limits.max_texts or sum(lengths) + left[-1] > limits.max_tokens


def test_64_equal_singles_make_one_batch() -> None:
    plan = next_batch([Waiting([12], overtaken=False)] * 64, DEFAULT)
    assert plan.parts == [range(1)] * 64


def test_a_job_that_is_alone_fills_its_batch_by_itself() -> None:
    jobs = [Waiting([9] * 5, overtaken=False, alone=True), Waiting([9], overtaken=True)]
    assert next_batch(jobs[:1], DEFAULT).parts == [range(5)]
    assert [len(part) for part in next_batch(jobs[:1] * 2, DEFAULT).parts] == [5, 0]
    assert [len(part) for part in next_batch(jobs, DEFAULT).parts] == [0, 1]


def test_a_text_over_the_limit_goes_by_itself() -> None:
    limits = Limits(max_tokens=100, max_texts=8, max_wait_s=0)
    jobs = [Waiting([500, 501], overtaken=False), Waiting([500], overtaken=False)]
    assert next_batch(jobs, limits).parts == [range(1, 2), range(1, 1)]


@pytest.mark.parametrize(("max_tokens", "expected"), [(240, [1, 1]), (239, [1, 0])])
def test_a_batch_costs_its_texts_times_the_longest(max_tokens: int, expected: list[int]) -> None:
    limits = Limits(max_tokens, max_texts=8, max_wait_s=0)
    jobs = [Waiting([100], overtaken=False), Waiting([120], overtaken=False)]
    assert [len(part) for part in next_batch(jobs, limits).parts] == expected


@pytest.mark.parametrize(
    ("waiting", "expected"),
    [
        ([50, 2, 1, 1], [2, 0, 1, 1]),  # single texts ride along, then the owner
        ([2, 50, 50, 1], [2, 1, 0, 1]),  # then the others, oldest first
    ],
)
def test_room_goes_to_single_texts_the_owner_and_the_oldest(
    waiting: list[int], expected: list[int]
) -> None:
    limits = Limits(max_tokens=8192, max_texts=4, max_wait_s=0)
    jobs = [Waiting([9] * texts, overtaken=False) for texts in waiting]
    assert [len(part) for part in next_batch(jobs, limits).parts] == expected


@pytest.mark.parametrize(("overtaken", "expected"), [(True, [1, 0, 0]), (False, [1, 9, 0])])
@pytest.mark.parametrize(("lengths", "alone"), [([300, 500], False), ([100] * 200, True)])
def test_room_is_not_dealt_while_an_overtaken_job_is_left_out(
    lengths: list[int], alone: bool, overtaken: bool, expected: list[int]
) -> None:
    left_out = Waiting(lengths, overtaken, alone)  # more than one batch: it does not go first
    jobs = [Waiting([100], overtaken=False), Waiting([100] * 9, overtaken=False), left_out]
    assert [len(part) for part in next_batch(jobs, DEFAULT).parts] == expected


@pytest.mark.parametrize(
    ("texts", "tokens", "oldest_age_s", "more_arriving", "expected"),
    [
        (1, 10, 0.0, False, 0.0),
        (1, 10, 0.0, True, 0.005),
        (1, 10, 0.002, True, 0.003),
        (1, 10, 0.005, True, 0.0),
        (1, 10, 9.0, True, 0.0),
        (127, 8191, 0.0, True, 0.005),
        (128, 10, 0.0, True, 0.0),
        (1, 8192, 0.0, True, 0.0),
    ],
)
def test_a_batch_waits_only_for_what_arrives_and_fits(
    texts: int, tokens: int, oldest_age_s: float, more_arriving: bool, expected: float
) -> None:
    found = pause_s(
        texts=texts,
        tokens=tokens,
        oldest_age_s=oldest_age_s,
        more_arriving=more_arriving,
        limits=DEFAULT,
    )
    assert found == pytest.approx(expected)


@laws(max_examples=100, deadline=None)
@given(
    jobs=st.lists(
        st.builds(
            Waiting,
            lengths=LENGTHS,
            overtaken=st.booleans(),
            alone=st.booleans(),
            engine=st.integers(0, 2),
        ),
        min_size=1,
        max_size=8,
    ),
    limits=LIMITS,
)
def test_a_batch_is_one_models_and_fills_up_as_if_there_were_no_others(
    jobs: list[Waiting], limits: Limits
) -> None:
    plan = next_batch(jobs, limits)
    engine = jobs[plan.owner].engine
    assert {job.engine for job, part in zip(jobs, plan.parts, strict=True) if part} == {engine}
    mine = [job for job in jobs if job.engine == engine]
    alone = next_batch(mine, limits)
    assert [
        part for job, part in zip(jobs, plan.parts, strict=True) if job.engine == engine
    ] == alone.parts
