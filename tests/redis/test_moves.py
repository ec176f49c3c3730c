"""No message is lost or doubled and loads add up, however taking, dying and repeating are interleaved.

A router and devices take, acknowledge, forward and requeue; they die, are reaped, wake up again as if
nothing had happened, lose answers and say things twice; the server forgets its scripts.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import settings as laws
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from sutra_tasks import keys
from sutra_tasks.broker.load import MOST_CREDIT, weight_of
from sutra_tasks.broker.queues import lanes
from sutra_tasks.broker.requeue import requeue_in_flight
from sutra_tasks.membership.fleet import beat, leave
from sutra_tasks.membership.reaper import reap, requeue_waiting
from tests.records import record
from tests.redis.flow import NOTHING, Worker, message, numbers, send, what_is_left

if TYPE_CHECKING:
    from collections.abc import Iterator

    import redis

DEVICES = ("gpu0", "gpu1")

devices = st.sampled_from(DEVICES)
workers = st.sampled_from(["router", *DEVICES])
counts = st.integers(1, 5)
choices = st.integers(1, 2**4 - 1)
"""Which of a worker's messages: one bit for each, and again."""


def chosen(messages: list[bytes], choice: int) -> list[bytes]:
    return [raw for at, raw in enumerate(messages) if choice >> at % 4 & 1]


class Stale:
    """A client that reads a list as it was before."""

    def __init__(self, client: redis.Redis, messages: Any) -> None:
        self._client, self._messages = client, messages

    def lrange(self, *_: Any) -> Any:
        return self._messages

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


class Moves(RuleBasedStateMachine):
    """A router and two devices, and what stays true at every moment."""

    def __init__(self, client: redis.Redis) -> None:
        super().__init__()
        client.flushdb()
        self.client = client
        self.sent = 0
        self.acknowledged: set[int] = set()
        self.workers = {name: self._started(name) for name in ("router", *DEVICES)}
        self.reaped: list[Worker] = []

    @initialize()
    def begin(self) -> None:
        """Have messages in flight at each device, and some that wait."""
        for priority in (0, 3):
            self.send(priority, past_router=False)
        self.send(0, past_router=True)
        for device in DEVICES:
            self.route(3, 3, device)
        self.workers["router"].send_pending()
        for device in DEVICES:
            self.workers[device].take(2)

    # --- work

    @rule(priority=st.integers(0, 9), past_router=st.booleans())
    def send(self, priority: int, past_router: bool) -> None:
        queue = keys.device_queue("gpu0") if past_router else keys.EMBED_QUEUE
        for size in (0, 40, 20_000):
            one = message(self.sent, priority=priority, size=size, routing_key=queue)
            send(self.client, one, queue=queue)
            self.sent += 1

    @rule(count=counts, choice=choices, device=devices)
    def route(self, count: int, choice: int, device: str) -> None:
        """Take, and forward some with the next command."""
        router = self.workers["router"]
        router.take(count)
        for raw in chosen(router.has, choice):
            router.forward(raw, device)

    @rule(device=devices, count=counts, choice=choices)
    def compute(self, device: str, count: int, choice: int) -> None:
        """Take, and acknowledge some with the next command."""
        worker = self.workers[device]
        worker.take(count)
        self._acknowledge(worker, chosen(worker.has, choice))

    @rule(choice=choices)
    def fail_a_call(self, choice: int) -> None:
        router = self.workers["router"]
        self._acknowledge(router, chosen(router.has, choice))

    @rule(name=workers, choice=choices, failed=st.booleans())
    def requeue(self, name: str, choice: int, failed: bool) -> None:
        self._requeue(self.workers[name], choice, failed=failed)

    @rule(device=devices)
    def beat(self, device: str) -> None:
        beat(self.client, record(device, self.workers[device].incarnation.rpartition(".")[2]))

    # --- trouble

    @rule(name=workers, count=st.integers(0, 5))
    def lose_an_answer(self, name: str, count: int) -> None:
        """Send what is pending and take, but never hear what was taken."""
        worker = self.workers[name]
        command = worker.in_flight.take_command(
            lanes(worker.queue) if count else (), most_messages=count, most_bytes=1, with_text=True
        )
        self.client.execute_command(*command)  # type: ignore[no-untyped-call]
        worker.in_flight.take_lost()
        if count:
            worker.in_flight.requeue_unclaimed(self.client, keys.EMBED_QUEUE)

    @rule(name=workers, choice=choices)
    def lose_a_connection(self, name: str, choice: int) -> None:
        worker = self.workers[name]
        for raw in chosen(worker.has, choice):
            worker.has.remove(raw)
            worker.in_flight.consumer_gone(raw)
        worker.in_flight.requeue_unclaimed(self.client, keys.EMBED_QUEUE)

    @rule(name=workers, times=st.integers(1, 2), died=st.booleans())
    def reap(self, name: str, times: int, died: bool) -> None:
        worker = self.workers[name]
        for _ in range(times):
            reap(self.client, self.client, worker.incarnation, died=died)
        self.workers[name] = self._started(name)
        self.reaped.append(worker)

    @precondition(lambda self: self.reaped)
    @rule(device=devices, choice=choices, requeued=choices, connection_lost=st.booleans())
    def wake(self, device: str, choice: int, requeued: int, connection_lost: bool) -> None:
        """Let a worker that was reaped, but only paused, go on as if nothing had happened."""
        worker = self.reaped.pop(choice % len(self.reaped))
        for raw in chosen(worker.has, choice):
            if worker.device is None:
                worker.forward(raw, device)
            else:
                self._acknowledge(worker, [raw])
        self._requeue(worker, requeued)
        worker.send_pending()
        if connection_lost:
            worker.in_flight.requeue_unclaimed(self.client, keys.EMBED_QUEUE)
        self.reaped.append(worker)

    @rule(device=devices, left=st.booleans())
    def requeue_what_waits_for_a_device(self, device: str, left: bool) -> None:
        if left:
            leave(self.client, device, self.workers[device].incarnation)
        requeue_waiting(self.client, device)

    @rule(name=workers)
    def two_requeue_the_same(self, name: str) -> None:
        """Have two processes requeue what one of them has read when the other has moved it already."""
        worker = self.workers[name]
        stale = Stale(self.client, self.client.lrange(worker.in_flight.key, 0, -1))
        reap(self.client, self.client, worker.incarnation)
        requeue_in_flight(cast("redis.Redis", stale), worker.incarnation)
        self.workers[name] = self._started(name)

    @rule()
    def forget_the_scripts(self) -> None:
        self.client.script_flush()

    # --- laws

    @invariant()
    def nothing_is_lost_or_doubled_and_loads_add_up(self) -> None:
        lists, loads, lasting = self._look()
        found = Counter(number for some in lists.values() for number in numbers(some))
        assert max(found.values(), default=1) == 1, "doubled"
        assert set(range(self.sent)) - set(found) <= self.acknowledged, "lost"
        for device in DEVICES:
            assert loads.pop(keys.load(device), NOTHING) == true_load(lists, device)
        assert loads == {}
        assert lasting <= lists.keys() | {keys.fleet(), keys.queues(), keys.leases()}

    def teardown(self) -> None:
        """Work off what is left: nothing is in a load then, and no list is left."""
        router = self.workers["router"]
        for worker in self.workers.values():
            worker.in_flight.requeue_unclaimed(self.client, keys.EMBED_QUEUE)
        router.take()
        for raw in list(router.has):
            router.forward(raw, DEVICES[0])
        router.send_pending()
        for name in DEVICES:
            device = self.workers[name]
            device.take()
            self._acknowledge(device, list(device.has))
            device.send_pending()
        lists, loads, _ = self._look()
        assert lists == {}
        assert all(load == NOTHING for load in loads.values())

    # --- helpers

    def _started(self, name: str) -> Worker:
        return Worker(self.client, None if name == "router" else name)

    def _acknowledge(self, worker: Worker, messages: list[bytes]) -> None:
        for raw in messages:
            worker.acknowledge(raw)
        self.acknowledged.update(numbers(messages))

    def _requeue(self, worker: Worker, choice: int, *, failed: bool = False) -> None:
        for raw in chosen(worker.has, choice):
            worker.has.remove(raw)
            worker.in_flight.requeue(self.client, raw, keys.EMBED_QUEUE, failed=failed)

    def _look(self) -> tuple[dict[str, list[bytes]], dict[str, dict[str, int]], set[str]]:
        """Return all messages by the list they are in, all loads, and the keys that never expire."""
        names = [name.decode() for name in self.client.keys("*")]  # type: ignore[union-attr]  # not async
        work = (keys.EMBED_QUEUE, keys.DEVICE_QUEUE_PREFIX, keys.in_flight(""))
        lists = [name for name in names if name.startswith(work)]
        loads = [name for name in names if name.startswith(keys.load(""))]
        with self.client.pipeline(transaction=False) as pipe:
            for name in lists:
                pipe.lrange(name, 0, -1)
            for name in loads:
                pipe.hgetall(name)
            for name in names:
                pipe.ttl(name)
            found: list[Any] = pipe.execute()
        messages, found = found[: len(lists)], found[len(lists) :]
        counts, ttls = found[: len(loads)], found[len(loads) :]
        return (
            dict(zip(lists, messages, strict=True)),
            dict(zip(loads, map(what_is_left, counts), strict=True)),
            {name for name, ttl in zip(names, ttls, strict=True) if ttl == -1},
        )


def true_load(lists: dict[str, list[bytes]], device: str) -> dict[str, int]:
    """Return the load of a device that follows from where messages are."""
    own = (keys.device_queue(device), keys.in_flight(f"{device}."))
    messages = [raw for name, found in lists.items() if name.startswith(own) for raw in found]
    weights = [weight for raw in messages if (weight := weight_of(json.loads(raw)))]
    return {
        "messages": len(weights),
        "credit": sum(min(weight, MOST_CREDIT) for weight in weights),
        "tokens": sum(weights),
    }


@pytest.fixture(autouse=True)
def _swept(_nothing_is_left_behind: None, client: redis.Redis) -> Iterator[None]:
    """Remove what a failing law leaves behind; that is not worth a second report."""
    yield
    client.flushdb()


def test_messages_and_loads_survive_any_interleaving(client: redis.Redis) -> None:
    class Started(Moves):
        def __init__(self) -> None:
            super().__init__(client)

    limits = laws(max_examples=30, stateful_step_count=30, deadline=None)
    run_state_machine_as_test(Started, settings=limits)
