"""The fleet that projects test with: it answers as a real one does, and leaves no trace."""

import threading
from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import pytest

from sutra_tasks import Embeddings, SutraError, Vectors, embed, embed_many
from sutra_tasks.app import app
from sutra_tasks.errors import InvalidOptionError, InvalidTextError
from sutra_tasks.testing import local_fleet, vectors_of


@pytest.fixture
def fleet() -> Iterator[None]:
    with local_fleet(width=8):
        yield


def test_calls_are_answered_as_by_a_fleet(fleet: None) -> None:
    one = embed.delay("a").get(timeout=10)
    assert isinstance(one, Vectors)
    np.testing.assert_allclose(one, vectors_of(["a"], 8)[0], rtol=1e-6)
    rows = embed.delay(["b", "a"], dimensions=4).get(timeout=10)
    assert rows.shape == (2, 4)
    assert embed.delay([]).get(timeout=10).shape == (0, 8)
    details = embed.apply_async(("a",), {"details": True}).get(timeout=10)
    assert isinstance(details, Embeddings)
    assert (details.device, details.space) == ("test", "simulated-1:8")


def test_a_signature_is_answered_too(fleet: None) -> None:
    assert embed.s("a").apply_async().get(timeout=10).shape == (8,)
    assert embed.s(["a"]).delay().get(timeout=10).shape == (1, 8)


def test_errors_reach_the_caller(fleet: None) -> None:
    with pytest.raises(InvalidOptionError, match="dimensions=9"):
        embed.delay("a", dimensions=9).get(timeout=10)
    with pytest.raises(InvalidTextError):
        embed.delay(["a", None])  # type: ignore[list-item]


@pytest.mark.parametrize(("batch", "in_flight"), [(1, 1), (3, 2), (64, 32)])
def test_many_texts_keep_their_order(fleet: None, batch: int, in_flight: int) -> None:
    texts = [str(n) for n in range(20)]
    rows = list(embed_many(texts, batch=batch, in_flight=in_flight, timeout_s=10))
    assert all(isinstance(row, Vectors) for row in rows)
    np.testing.assert_allclose(rows, vectors_of(texts, 8), rtol=1e-6)


def test_many_texts_are_read_no_further_than_what_is_in_flight(fleet: None) -> None:
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        while True:
            read += 1
            yield str(read)

    stream = embed_many(endless(), batch=3, in_flight=2, timeout_s=10)
    assert read == 0
    for taken in range(1, 20):
        next(stream)
        assert read <= taken - 1 + 3 * 2


def test_no_texts_give_no_vectors(fleet: None) -> None:
    assert list(embed_many([])) == []


def test_an_error_ends_the_stream_where_it_is(fleet: None) -> None:
    stream = embed_many(["a", "b", None, "c"], batch=1, in_flight=1)  # type: ignore[list-item]
    assert len([next(stream), next(stream)]) == 2
    with pytest.raises(InvalidTextError):
        next(stream)


@pytest.mark.parametrize("option", ["batch", "in_flight"])
def test_a_stream_that_could_never_flow_is_refused_at_once(option: str) -> None:
    with pytest.raises(InvalidOptionError, match=f"{option}=0"):
        embed_many(["a"], **{option: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(fails: bool) -> None:
    with pytest.raises(KeyError) if fails else nullcontext(), local_fleet():
        assert app.conf.task_always_eager
        if fails:
            raise KeyError
    assert not app.conf.task_always_eager
    assert "batcher" not in {thread.name for thread in threading.enumerate()}
    with pytest.raises(SutraError, match="local_fleet"):
        embed("a")


def test_a_second_fleet_may_follow_the_first() -> None:
    for width in (4, 8):
        with local_fleet(width=width):
            assert embed.delay("a").get(timeout=10).shape == (width,)
