"""The batcher: rows to whom they belong, errors to the texts that caused them, work given back."""

import threading
import weakref
from concurrent.futures import wait
from functools import partial

import pytest
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st

from sutra_tasks.batching.batcher import Batcher
from sutra_tasks.batching.jobs import Batch, Drained, JobContext, TextError, Unwanted
from sutra_tasks.batching.next_batch import Limits
from sutra_tasks.engines.encoder import TokenizedText
from tests.unit.fake_engine import (
    ONE_BY_ONE,
    WITHIN_S,
    FakeEncoder,
    OfOneModel,
    busy,
    numbers_of,
    running,
    texts,
)


def taken(batcher: Batcher) -> list[int]:
    return [text.content for _, text, _ in batcher._take_batch()]


@laws(max_examples=30, deadline=None)
@given(
    jobs=st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=8), max_size=5),
    max_texts=st.integers(1, 8),
    max_tokens=st.integers(1, 200),
)
def test_rows_come_back_in_the_order_they_were_submitted(
    jobs: list[list[int]], max_texts: int, max_tokens: int
) -> None:
    seen: list[Batch] = []
    encoder = FakeEncoder()
    with running(encoder, Limits(max_tokens, max_texts, 0), on_batch=seen.append) as batcher:
        futures = [batcher.submit([TokenizedText(n, content=n) for n in job]) for job in jobs]
        assert [numbers_of(future) for future in futures] == jobs
        assert batcher.waiting_texts == 0
    assert sum(batch.texts for batch in seen) == sum(map(len, jobs))
    assert sum(batch.tokens for batch in seen) == sum(map(sum, jobs))


def test_what_is_submitted_while_a_batch_computes_meets_in_the_next() -> None:
    encoder = FakeEncoder()
    with busy(encoder) as batcher:
        futures = [batcher.submit(texts(n)) for n in (1, 2, 3)]
        assert batcher.waiting_texts == 3
        encoder.gate.set()
        assert [numbers_of(future) for future in futures] == [[1], [2], [3]]
    assert [sorted(batch) for batch in encoder.batches] == [[0], [1, 2, 3]]


@pytest.mark.parametrize(("bad", "position"), [(3, 0), (4, 1), (5, 2)])
def test_an_error_belongs_to_the_text_that_caused_it(bad: int, position: int) -> None:
    encoder = FakeEncoder(bad={bad})
    with busy(encoder) as batcher:
        good, failing, other = (batcher.submit(texts(*job)) for job in [(1, 2), (3, 4, 5), (6,)])
        encoder.gate.set()
        with pytest.raises(TextError) as failed:
            failing.result(WITHIN_S)
        assert numbers_of(good) == [1, 2]
        assert numbers_of(other) == [6]
    assert failed.value.position == position
    assert failed.value.cause.args == ([bad],)  # raised for this text alone


def test_the_batcher_goes_on_when_every_text_fails() -> None:
    with running(FakeEncoder(bad=range(8))) as batcher:
        failing = [batcher.submit(texts(*range(8))), batcher.submit(texts(7))]
        assert all(isinstance(future.exception(WITHIN_S), TextError) for future in failing)
        assert numbers_of(batcher.submit(texts(8))) == [8]


def test_the_other_texts_of_a_failed_job_are_not_computed() -> None:
    encoder = FakeEncoder(bad={9})
    with busy(encoder, Limits(max_tokens=1000, max_texts=2, max_wait_s=0)) as batcher:
        failing = batcher.submit(texts(9, tokens=6) + texts(*range(10, 20)))  # the longest is first
        encoder.gate.set()
        assert isinstance(failing.exception(WITHIN_S), TextError)
        assert batcher.waiting_texts == 0
        assert numbers_of(batcher.submit(texts(1))) == [1]
    computed = {n for batch in encoder.batches for n in batch}
    assert len(computed & set(range(10, 20))) <= 1


def test_draining_gives_back_what_has_not_begun_and_finishes_what_has() -> None:
    encoder = FakeEncoder()
    encoder.gate.clear()
    with running(encoder, ONE_BY_ONE) as batcher:
        begun = batcher.submit(texts(1, 2, 3))
        assert encoder.began.wait(WITHIN_S)
        waiting = batcher.submit(texts(4))
        batcher.drain()
        assert isinstance(waiting.exception(0), Drained)
        assert isinstance(batcher.submit(texts(5)).exception(0), Drained)
        assert not begun.done()
        encoder.gate.set()
        assert numbers_of(begun) == [1, 2, 3]
    assert not {4, 5} & {n for batch in encoder.batches for n in batch}


def test_closing_finishes_what_has_begun() -> None:
    encoder = FakeEncoder()
    with running(encoder, ONE_BY_ONE) as batcher:
        future = batcher.submit(texts(1, 2, 3))
        assert encoder.began.wait(WITHIN_S)
    assert numbers_of(future) == [1, 2, 3]
    assert isinstance(batcher.submit(texts(4)).exception(0), Drained)


def test_an_idle_batcher_closes() -> None:
    with running(FakeEncoder()):
        pass


def test_a_batch_waits_for_work_that_was_announced() -> None:
    encoder = FakeEncoder()
    with running(encoder, Limits(max_tokens=1000, max_texts=8, max_wait_s=60)) as batcher:
        contexts = [JobContext(announcement=batcher.announce()) for _ in range(2)]
        futures = [batcher.submit(texts(1), context=contexts[0])]
        assert not encoder.began.wait(0.01)
        futures.append(batcher.submit(texts(2), context=contexts[1]))
        assert not wait(futures, WITHIN_S).not_done
    assert [sorted(batch) for batch in encoder.batches] == [[1, 2]]


def test_a_batch_waits_no_more_for_an_announcement_that_was_withdrawn() -> None:
    encoder = FakeEncoder()
    with running(encoder, Limits(max_tokens=1000, max_texts=8, max_wait_s=60)) as batcher:
        first, second, third = (batcher.announce() for _ in range(3))
        future = batcher.submit(texts(1), context=JobContext(announcement=first))
        for announcement in (first, second, second):  # what is no longer announced is no other's
            batcher.withdraw(announcement)
        assert not encoder.began.wait(0.01)
        batcher.withdraw(third)
        assert numbers_of(future) == [1]


def test_a_batch_waits_no_longer_than_its_limit() -> None:
    with running(FakeEncoder(), Limits(max_tokens=1000, max_texts=8, max_wait_s=0.002)) as batcher:
        batcher.announce()
        assert numbers_of(batcher.submit(texts(1))) == [1]


def test_a_full_batch_does_not_wait() -> None:
    encoder = FakeEncoder()
    with running(encoder, Limits(max_tokens=1000, max_texts=2, max_wait_s=60)) as batcher:
        batcher.announce()
        first = batcher.submit(texts(1))
        assert not encoder.began.wait(0.01)
        assert numbers_of(batcher.submit(texts(2))) == [2]
        assert numbers_of(first) == [1]


def test_a_single_lets_a_large_job_overtake_it_once() -> None:
    batcher = OfOneModel(FakeEncoder())  # not started: batches are taken by hand
    batcher.submit(texts(*range(100), tokens=100))
    assert len(taken(batcher)) == 8
    batcher.submit(texts(1000))
    assert 1000 not in taken(batcher)
    assert taken(batcher) == [1000]
    assert len(taken(batcher)) == 8


def test_a_job_that_finishes_overtakes_nobody() -> None:
    batcher = OfOneModel(FakeEncoder())
    for job in (texts(1, tokens=100), texts(*range(10, 20), tokens=400), texts(2)):
        batcher.submit(job)
    assert taken(batcher) == [1]
    assert len(set(taken(batcher)) & set(range(10, 20))) == 2
    assert taken(batcher) == [2]


def test_what_is_not_wanted_any_more_is_not_computed() -> None:
    encoder, wanted = FakeEncoder(), {1, 2, 3}
    with busy(encoder) as batcher:
        futures = [
            batcher.submit(texts(n), context=JobContext(partial(wanted.__contains__, n)))
            for n in (1, 2, 3)
        ]
        wanted.remove(2)
        encoder.gate.set()
        assert isinstance(futures[1].exception(WITHIN_S), Unwanted)
        assert [numbers_of(futures[0]), numbers_of(futures[2])] == [[1], [3]]
        assert batcher.waiting_texts == 0
    assert [sorted(batch) for batch in encoder.batches] == [[0], [1, 3]]


def test_a_job_given_up_half_way_is_computed_no_further() -> None:
    encoder = FakeEncoder()
    with running(encoder, ONE_BY_ONE) as batcher:
        context = JobContext(lambda: len(encoder.batches) < 2)
        given_up = batcher.submit(texts(1, 2, 3, 4), context=context)
        assert isinstance(given_up.exception(WITHIN_S), Unwanted)
        assert batcher.waiting_texts == 0
        assert numbers_of(batcher.submit(texts(5))) == [5]
    assert len(encoder.batches) == 3


def test_a_job_is_asked_before_each_batch_until_all_of_it_is_in_one() -> None:
    batcher = OfOneModel(FakeEncoder())  # not started: batches are taken by hand
    asked: list[str] = []

    def wanted(job: str) -> bool:
        asked.append(job)
        return True

    for job, numbers in (("large", range(16)), ("small", range(16, 20))):
        batcher.submit(texts(*numbers, tokens=100), context=JobContext(partial(wanted, job)))
    assert [len(taken(batcher)) for _ in range(3)] == [8, 8, 4]  # small and large share one
    assert asked == ["large", "small", "large", "small", "large"]


def test_a_job_that_cannot_say_whether_it_is_wanted_is_computed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked: list[None] = []

    def wanted() -> bool:
        asked.append(None)
        raise OSError

    with running(FakeEncoder(), ONE_BY_ONE) as batcher:
        assert numbers_of(batcher.submit(texts(1, 2, 3), context=JobContext(wanted))) == [1, 2, 3]
    assert len(asked) == len(caplog.records) == 1


def test_a_call_runs_on_the_engines_thread_before_the_next_batch() -> None:
    encoder = FakeEncoder()
    with busy(encoder) as batcher:
        waiting = [batcher.submit(texts(n)) for n in range(1, 50)]
        seen = batcher.call(lambda: (encoder.batches.copy(), threading.current_thread()))
        assert not seen.done()
        encoder.gate.set()
        assert seen.result(WITHIN_S) == ([[0]], batcher._thread)
        assert not wait(waiting, WITHIN_S).not_done


def test_a_call_does_not_wait_for_company() -> None:
    with running(FakeEncoder(), Limits(max_tokens=1000, max_texts=8, max_wait_s=60)) as batcher:
        assert batcher.call(lambda: 1).result(WITHIN_S) == 1  # idle
        announcement = batcher.announce()
        future = batcher.submit(texts(2))
        assert batcher.call(lambda: 3).result(WITHIN_S) == 3
        assert not future.done()
        batcher.withdraw(announcement)
        assert numbers_of(future) == [2]


def test_a_call_that_fails_fails_its_caller_only() -> None:
    with running(FakeEncoder()) as batcher:
        failing = batcher.call(lambda: 1 // 0)
        assert isinstance(failing.exception(WITHIN_S), ZeroDivisionError)
        assert numbers_of(batcher.submit(texts(1))) == [1]


def test_a_call_that_was_cancelled_does_not_run() -> None:
    encoder, ran = FakeEncoder(), threading.Event()
    with busy(encoder) as batcher:
        assert batcher.call(ran.set).cancel()
        last = batcher.call(lambda: None)
        encoder.gate.set()
        last.result(WITHIN_S)
    assert not ran.is_set()


def test_draining_refuses_calls_and_gives_back_those_that_wait() -> None:
    with busy(FakeEncoder()) as batcher:
        waiting, cancelled = (batcher.call(lambda: 1) for _ in range(2))
        assert cancelled.cancel()
        batcher.drain()
        assert isinstance(waiting.exception(0), Drained)
        assert isinstance(batcher.call(lambda: 1).exception(0), Drained)


def test_waiting_and_computing_are_told_apart() -> None:
    now = [100.0]

    def a_second_passes() -> None:
        now[0] += 1.0

    encoder = FakeEncoder(before=a_second_passes)
    encoder.gate.clear()
    with running(encoder, ONE_BY_ONE, clock=lambda: now[0]) as batcher:
        first = batcher.submit(texts(1))
        assert encoder.began.wait(WITHIN_S)
        second = batcher.submit(texts(2, 3))
        encoder.gate.set()
        done = [future.result(WITHIN_S) for future in (first, second)]
    assert [(one.queue_s, one.compute_s) for one in done] == [(0, 1), (1, 2)]


def test_each_model_computes_what_was_tokenised_for_it() -> None:
    first, second = FakeEncoder(), FakeEncoder()
    with busy(first) as batcher:
        futures = [
            batcher.submit(texts(n), encoder=second if n % 2 else first) for n in (1, 2, 3, 4, 5, 6)
        ]
        first.gate.set()
        assert [numbers_of(future) for future in futures] == [[n] for n in (1, 2, 3, 4, 5, 6)]
    assert [sorted(batch) for batch in first.batches] == [[0], [2, 4, 6]]
    assert [sorted(batch) for batch in second.batches] == [[1, 3, 5]]


def test_a_batcher_that_waits_keeps_no_model() -> None:
    with running(FakeEncoder()) as batcher:
        other = FakeEncoder()
        left = weakref.ref(other)
        assert numbers_of(batcher.submit(texts(1), encoder=other)) == [1]
        batcher.call(partial(other.encode, texts(2))).result(WITHIN_S)
        del other
        batcher.call(lambda: None).result(WITHIN_S)  # by now it has let go of what was before
        assert left() is None
