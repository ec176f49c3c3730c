"""The sample of real traffic: uniform over distinct texts, bounded, and gone when its time comes."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from sutra_tasks.distillation.data.traffic_sample import TrafficSample, priority

if TYPE_CHECKING:
    from collections.abc import Callable

    import redis

PERIOD_S = 25
K = 20


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0 * PERIOD_S

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def sampler(client: redis.Redis, clock: Clock) -> Callable[..., TrafficSample]:
    """``sampler(texts=...)``: one device's view of the one sample."""
    return partial(
        TrafficSample,
        client,
        texts=K,
        retention_s=4 * PERIOD_S,
        key="t:sample:{}".format,
        salt=b"salt",
        clock=clock,
    )


def least(texts: list[str], k: int = K) -> list[str]:
    return sorted(texts, key=lambda text: priority(text, b"salt"))[:k]


def stored(client: redis.Redis) -> dict[str, int]:
    sizes: Any = {name.decode(): client.zcard(name) for name in client.scan_iter("t:sample:*")}
    return dict(sizes)


def test_the_sample_is_the_texts_of_least_place(sampler: Callable[..., TrafficSample]) -> None:
    texts = [f"text {i}" for i in range(500)]
    one = sampler()
    for start in range(0, 500, 7):
        one.offer(texts[start : start + 7])
    assert one.texts() == least(texts)


def test_devices_fill_one_sample_and_a_text_sent_often_counts_once(
    sampler: Callable[..., TrafficSample],
) -> None:
    texts = [f"text {i}" for i in range(300)]
    devices = [sampler() for _ in range(3)]
    for position, text in enumerate(texts):
        for device in {0, position % 3}:
            devices[device].offer([text, text, "often"])
    assert all(device.texts() == least([*texts, "often"]) for device in devices)


def test_fewer_texts_than_fit_are_all_there(sampler: Callable[..., TrafficSample]) -> None:
    one = sampler()
    assert one.texts() == []
    assert one.offer(["a", "b", "ü", "a"]) == 3
    assert sorted(one.texts()) == ["a", "b", "ü"]


def test_most_texts_cost_no_round_trip_once_the_sample_is_full(
    sampler: Callable[..., TrafficSample], client: redis.Redis
) -> None:
    one, texts = sampler(), [f"text {i}" for i in range(2_000)]
    one.offer(texts[:1_000])
    sent = [one.offer([text]) for text in texts[1_000:]]
    assert 0 < sum(sent) < 60  # about K ln 2: a text enters with the chance K / texts so far
    assert one.texts() == least(texts)
    assert one.offer(one.texts()) == 0  # nor does what is in it, sent again


def test_what_is_offered_at_once_may_be_more_than_fits(
    sampler: Callable[..., TrafficSample], client: redis.Redis
) -> None:
    one, texts = sampler(), [f"text {i}" for i in range(3_000)]
    assert one.offer(texts) == K
    assert one.texts() == least(texts)
    assert list(stored(client).values()) == [K]


def test_long_blank_and_broken_texts_are_not_sampled(sampler: Callable[..., TrafficSample]) -> None:
    one = sampler(most_chars=10)
    assert one.offer(["x" * 11, "", " \n", "a\ud800", "y" * 10, "nul\0"]) == 2
    assert sorted(one.texts()) == ["nul\0", "y" * 10]


def test_a_period_goes_before_its_texts_are_older_than_the_retention(
    sampler: Callable[..., TrafficSample], client: redis.Redis, clock: Clock
) -> None:
    one = sampler()
    clock.now += 10
    one.offer(["early"])
    [name] = stored(client)
    assert 0 < client.ttl(name) <= 4 * PERIOD_S - 10
    clock.now += 10
    sampler().offer(["later"])
    assert client.ttl(name) <= 4 * PERIOD_S - 10  # not extended by what came later


def test_reading_joins_the_periods_of_a_retention_and_no_more(
    sampler: Callable[..., TrafficSample], client: redis.Redis, clock: Clock
) -> None:
    one, texts = sampler(), [f"text {i}" for i in range(900)]
    for period in range(9):
        one.offer(texts[100 * period : 100 * (period + 1)])
        one.offer(["in every period"])
        clock.now += PERIOD_S
    # The server's clock did not move: what it would have dropped is still there, and is not read.
    assert len(stored(client)) == 9
    found = one.texts()
    assert len(found) == K == len(set(found))
    assert set(found) <= {*texts[500:], "in every period"}
    assert found == least([*texts[500:], "in every period"])


def test_a_full_sample_of_one_period_does_not_close_the_next(
    sampler: Callable[..., TrafficSample], client: redis.Redis, clock: Clock
) -> None:
    one = sampler()
    one.offer([f"text {i}" for i in range(1_000)])
    clock.now += PERIOD_S
    assert one.offer([f"new {i}" for i in range(K)]) == K


def test_forgetting_leaves_nothing_and_every_device_fills_it_again(
    sampler: Callable[..., TrafficSample], client: redis.Redis, clock: Clock
) -> None:
    one, other = sampler(), sampler()
    other.offer([f"text {i}" for i in range(1_000)])
    clock.now += PERIOD_S
    one.offer([f"text {i}" for i in range(1_000)])
    other.offer([f"text {i}" for i in range(1_000)])
    one.forget()
    assert stored(client) == {}
    assert one.texts() == []
    assert one.offer(["a"]) == 1
    # This one learns from its next answer that there is room.
    for i in range(2_000):
        if other.offer([f"new {i}"]):
            break
    assert other.offer(["b", "c"]) == 2
    assert {"a", "b", "c"} <= set(one.texts())
