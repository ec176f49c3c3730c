"""The laws of the next batch: which rows it has, whichever jobs wait."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st

from sutra_tasks.batching.jobs import Job
from sutra_tasks.batching.next_batch import (
    PADDING_SHARE,
    PADDING_TOKENS,
    Limits,
    next_batch,
    pause_s,
    take_batch,
)
from sutra_tasks.engines.encoder import TokenizedText
from tests.unit.fake_engine import FakeEncoder

PADDING, OTHER, ANOTHER, STATIC = (FakeEncoder() for _ in range(4))
STATIC.info = replace(STATIC.info, is_static=True)
DEFAULT = Limits(max_tokens=8192, max_texts=128, max_wait_s=0.005)
LONGEST = 512

TEXTS = [TokenizedText(tokens, content=None) for tokens in range(LONGEST + 1)]


def job(lengths: Sequence[int], *, overtaken: bool = False, encoder: FakeEncoder = PADDING) -> Job:
    made = Job.of([TEXTS[tokens] for tokens in lengths], encoder)
    made.overtaken = overtaken
    return made


TOKENS = st.integers(1, 80)
LIMITS = st.builds(
    Limits, max_tokens=st.integers(1, 500), max_texts=st.integers(1, 20), max_wait_s=st.just(0.0)
)
LENGTHS = st.lists(TOKENS, min_size=1, max_size=10)
JOBS = st.lists(st.builds(job, LENGTHS, overtaken=st.booleans()), min_size=1, max_size=8)
SINGLES = st.builds(lambda tokens: job([tokens]), TOKENS)


def taken(jobs: list[Job], limits: Limits) -> list[list[int]]:
    """Take a batch; return the lengths taken, by job."""
    before = jobs.copy()
    batch = take_batch(jobs, limits)
    return [[row.text.tokens for row in batch if row.job is one] for one in before]


@laws(max_examples=60, deadline=None)
@given(jobs=JOBS, limits=LIMITS)
def test_a_batch_serves_its_owner_within_the_limits(jobs: list[Job], limits: Limits) -> None:
    batch = next_batch(jobs, limits)
    for job, part in zip(jobs, batch.slices, strict=True):
        assert part.step == 1
        assert 0 <= part.start <= part.stop <= len(job.lengths)
    owner = jobs[batch.owner]
    assert len(owner.lengths) - 1 in batch.slices[batch.owner]  # its longest
    assert batch.owner == 0 or owner.overtaken

    lengths = [job.lengths[i] for job, part in zip(jobs, batch.slices, strict=True) for i in part]
    assert len(lengths) <= limits.max_texts
    assert len(lengths) == 1 or len(lengths) * max(lengths) <= limits.max_tokens

    padded = len(lengths) * max(lengths)
    assert padded - sum(lengths) <= max(PADDING_TOKENS, PADDING_SHARE * padded)


@laws(max_examples=60, deadline=None)
@given(every=JOBS, limits=LIMITS)
def test_every_text_is_taken_once(every: list[Job], limits: Limits) -> None:
    jobs, sizes = every.copy(), [len(one.lengths) for one in every]
    found: list[tuple[Job, int]] = []
    while jobs:
        batch = take_batch(jobs, limits)
        assert batch
        found += [(owner, position) for owner, _, position in batch]
    assert len(found) == len(set(found))
    for one, size in zip(every, sizes, strict=True):
        assert {position for owner, position in found if owner is one} == set(range(size))


@laws(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    spread=st.integers(0, LONGEST - 1),
    before=st.integers(0, 60),
    tokens=st.integers(1, LONGEST),
)
def test_a_single_is_one_batch_of_a_large_job_away_at_most(
    seed: int, spread: int, before: int, tokens: int
) -> None:
    lengths = np.random.default_rng(seed).integers(LONGEST - spread, LONGEST + 1, 10_000)
    jobs = [job(lengths.tolist())]
    for _ in range(before):
        take_batch(jobs, DEFAULT)
    # It arrives while the last of these batches computes: that one is not ours to change.
    single = job([tokens])
    jobs.append(single)
    take_batch(jobs, DEFAULT)
    if single.lengths:
        assert taken(jobs, DEFAULT)[1] == [tokens]


@laws(max_examples=60, deadline=None)
@given(
    singles=st.lists(SINGLES, min_size=1, max_size=20),
    arrivals=st.lists(SINGLES, max_size=30),
)
def test_a_large_job_waits_only_for_singles_that_waited_for_it(
    singles: list[Job], arrivals: list[Job]
) -> None:
    jobs = [job([100] * 10_000), *singles]
    patience = 0
    for arriving in arrivals:
        patience = len(jobs) - 1 if taken(jobs, DEFAULT)[0] else patience - 1
        assert patience >= 0
        jobs.append(arriving)


def test_of_equal_large_jobs_the_oldest_finishes_first() -> None:
    jobs = [first, *others] = [job([100] * 200) for _ in range(3)]
    while first.lengths:
        take_batch(jobs, DEFAULT)
    assert all(len(other.lengths) > 150 for other in others)


@laws(max_examples=60, deadline=None)
@given(jobs=JOBS, limits=LIMITS)
def test_an_engine_that_does_not_pad_takes_texts_of_any_length_together(
    jobs: list[Job], limits: Limits
) -> None:
    for one in jobs:
        one.encoder, one.overtaken = STATIC, False
    batch = next_batch(jobs, limits)
    lengths = [job.lengths[i] for job, part in zip(jobs, batch.slices, strict=True) for i in part]
    assert len(lengths) == 1 or sum(lengths) <= limits.max_tokens
    left = jobs[0].lengths[: batch.slices[0].start]
    assert not left or len(lengths) == limits.max_texts or sum(lengths) + left[-1] > limits.max_tokens


def test_64_equal_singles_make_one_batch() -> None:
    batch = next_batch([job([12]) for _ in range(64)], DEFAULT)
    assert batch.slices == [range(1)] * 64


def test_a_text_over_the_limit_goes_by_itself() -> None:
    limits = Limits(max_tokens=100, max_texts=8, max_wait_s=0)
    jobs = [job([500, 501]), job([500])]
    assert next_batch(jobs, limits).slices == [range(1, 2), range(1, 1)]


@pytest.mark.parametrize(("max_tokens", "expected"), [(240, [1, 1]), (239, [1, 0])])
def test_a_batch_costs_its_texts_times_the_longest(max_tokens: int, expected: list[int]) -> None:
    limits = Limits(max_tokens, max_texts=8, max_wait_s=0)
    jobs = [job([100]), job([120])]
    assert [len(part) for part in next_batch(jobs, limits).slices] == expected


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
    jobs = [job([9] * texts) for texts in waiting]
    assert [len(part) for part in next_batch(jobs, limits).slices] == expected


@pytest.mark.parametrize(("overtaken", "expected"), [(True, [1, 0, 0]), (False, [1, 9, 0])])
def test_room_is_not_dealt_while_an_overtaken_job_is_left_out(
    overtaken: bool, expected: list[int]
) -> None:
    left_out = job([300, 500], overtaken=overtaken)  # more than one batch: it does not go first
    jobs = [job([100]), job([100] * 9), left_out]
    assert [len(part) for part in next_batch(jobs, DEFAULT).slices] == expected


@pytest.mark.parametrize(
    ("texts", "tokens", "oldest_age_s", "more_announced", "expected"),
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
    texts: int, tokens: int, oldest_age_s: float, more_announced: bool, expected: float
) -> None:
    found = pause_s(
        texts=texts,
        tokens=tokens,
        oldest_age_s=oldest_age_s,
        more_announced=more_announced,
        limits=DEFAULT,
    )
    assert found == pytest.approx(expected)


@laws(max_examples=50, deadline=None)
@given(
    jobs=st.lists(
        st.builds(
            job,
            LENGTHS,
            overtaken=st.booleans(),
            encoder=st.sampled_from([PADDING, OTHER, ANOTHER]),
        ),
        min_size=1,
        max_size=8,
    ),
    limits=LIMITS,
)
def test_a_batch_is_one_models_and_fills_up_as_if_there_were_no_others(
    jobs: list[Job], limits: Limits
) -> None:
    batch = next_batch(jobs, limits)
    encoder = jobs[batch.owner].encoder
    assert {job.encoder for job, part in zip(jobs, batch.slices, strict=True) if part} == {encoder}
    mine = [job for job in jobs if job.encoder is encoder]
    without_others = next_batch(mine, limits)
    assert [
        part for job, part in zip(jobs, batch.slices, strict=True) if job.encoder is encoder
    ] == without_others.slices
