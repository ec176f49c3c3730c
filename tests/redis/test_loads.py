"""A load is what a device was sent and has not finished, at every moment and whatever happens."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import redis

from sutra_tasks import keys
from sutra_tasks.broker.in_flight import held_by
from sutra_tasks.broker.queues import MOST_CREDIT, lanes, new_incarnation
from sutra_tasks.broker.requeue import weight_of
from sutra_tasks.membership.fleet import beat, leave
from sutra_tasks.membership.reaper import reap, requeue_waiting
from tests.records import record
from tests.redis.flow import Worker, given, load, message, numbers, send
from tests.redis.peers import Receiver, waiting

if TYPE_CHECKING:
    from kombu import Message

DEVICES = ("gpu0", "gpu1")
NOTHING = {"messages": 0, "credit": 0, "tokens": 0}


@pytest.fixture(autouse=True)
def _swept(_nothing_is_left_behind: None, client: redis.Redis) -> Iterator[None]:
    """What a test leaves waiting is its own business."""
    yield
    client.flushdb()


def counted(client: redis.Redis, device: str) -> dict[str, int]:
    """Return what the server has counted of a device."""
    found: Counter[str] = Counter(load(client, device))
    return {
        "messages": found["messages"],
        "credit": found["credit"],
        "tokens": found["tokens_dispatched"] - found["tokens_completed"],
    }


class Walk:
    """Routers and devices that work, stop, die, are paused and lose answers, one step at a time."""

    def __init__(self, client: redis.Redis, seed: int) -> None:
        self.client, self.draw = client, random.Random(seed)
        self.sent = 0
        self.noted: set[int] = set()
        self.router = Worker(client)
        self.devices = {name: Worker(client, name) for name in DEVICES}
        self.zombies: list[Worker] = []
        self.steps: list[Callable[[], None]] = [
            *[self.send, self.route, self.work] * 4,
            *(self.give_back, self.lose_a_connection, self.router_dies, self.device_dies),
            *(self.one_wakes, self.beat, self.sweep),
        ]

    def step(self) -> None:
        self.draw.choice(self.steps)()

    def device(self) -> Worker:
        return self.devices[self.draw.choice(DEVICES)]

    def some(self, messages: list[bytes]) -> list[bytes]:
        return [one for one in messages if self.draw.random() < 0.5]

    # --- work

    def send(self) -> None:
        for _ in range(self.draw.randrange(7)):
            # Past the router, as an app with a route of its own sends it, or to be routed.
            queue = keys.device_queue("gpu0") if self.draw.random() < 0.3 else keys.EMBED_QUEUE
            priority, size = self.draw.randrange(10), self.draw.choice([0, 40, 20_000])
            one = message(self.sent, priority=priority, size=size, routing_key=queue)
            send(self.client, one, queue=queue)
            self.sent += 1

    def route(self) -> None:
        self.router.take(self.draw.randrange(5))
        for raw in self.some(self.router.has):
            if self.draw.random() < 0.1:
                self.finish(self.router, raw)  # its task failed
            else:
                self.router.forward(raw, self.draw.choice(DEVICES))
        self.tell(self.router)

    def work(self) -> None:
        device = self.device()
        device.take(self.draw.randrange(4))
        for raw in self.some(device.has):
            self.finish(device, raw)
        self.tell(device)

    def finish(self, worker: Worker, raw: bytes) -> None:
        worker.finish(raw)
        self.noted.update(numbers([raw]))

    def tell(self, worker: Worker) -> None:
        """Tell what was noted, now or later; the answer may be lost."""
        if self.draw.random() < 0.4:
            return
        command = worker.held.take_command((), room=0, most_bytes=0)
        self.client.execute_command(*command)  # type: ignore[no-untyped-call]
        if self.draw.random() < 0.5:
            worker.held.told()
        else:
            worker.held.not_told()

    # --- trouble

    def give_back(self) -> None:
        device, failed = self.device(), self.draw.random() < 0.5
        for raw in self.some(device.has):
            device.has.remove(raw)
            device.held.give_back(self.client, raw, keys.EMBED_QUEUE, failed=failed)

    def lose_a_connection(self) -> None:
        worker = self.draw.choice([self.router, *self.devices.values()])
        for raw in self.some(worker.has):
            worker.has.remove(raw)
            worker.held.abandon(raw)
        worker.held.reclaim(self.client, keys.EMBED_QUEUE)

    def end(self, worker: Worker) -> None:
        """Rescue a worker that died, or that is only paused."""
        for _ in range(self.draw.choice([1, 1, 2])):
            reap(self.client, self.client, worker.incarnation)
        if self.draw.random() < 0.5:
            self.zombies.append(worker)

    def router_dies(self) -> None:
        self.end(self.router)
        self.router = Worker(self.client)

    def device_dies(self) -> None:
        device = self.device()
        self.end(device)
        assert device.device is not None
        self.devices[device.device] = Worker(self.client, device.device)

    def one_wakes(self) -> None:
        """Let one that was paused go on as if nothing had happened."""
        if not self.zombies:
            return
        zombie = self.draw.choice(self.zombies)
        for raw in self.some(zombie.has):
            if self.draw.random() < 0.3:
                zombie.has.remove(raw)
                zombie.held.give_back(self.client, raw, keys.EMBED_QUEUE)
            elif zombie.device is None:
                zombie.forward(raw, self.draw.choice(DEVICES))
            else:
                self.finish(zombie, raw)
        self.tell(zombie)
        if self.draw.random() < 0.3:
            zombie.held.reclaim(self.client, keys.EMBED_QUEUE)

    def beat(self) -> None:
        device = self.device()
        assert device.device is not None
        beat(self.client, record(device.device, device.incarnation.rpartition(".")[2]))

    def sweep(self) -> None:
        device = self.device()
        assert device.device is not None
        if self.draw.random() < 0.5:
            leave(self.client, device.device, device.incarnation)
        requeue_waiting(self.client, device.device)

    def work_off(self) -> None:
        """Do all that is left to do."""
        self.router.take()
        for raw in list(self.router.has):
            self.router.forward(raw, self.draw.choice(DEVICES))
        self.router.tell()
        for device in self.devices.values():
            device.take()
            for raw in list(device.has):
                self.finish(device, raw)
            device.tell()

    # --- laws

    def check(self) -> None:
        there = self.there()
        every = Counter(number for messages in there.values() for number in numbers(messages))
        assert max(every.values(), default=1) == 1, "doubled"
        assert set(range(self.sent)) - set(every) <= self.noted, "lost"
        for device in DEVICES:
            assert counted(self.client, device) == true_load(there, device)
        loads = {name.decode() for name in self.client.scan_iter(keys.load("*"))}
        assert loads <= {keys.load(device) for device in DEVICES}
        assert all(self.client.ttl(name) > 0 for name in loads)

    def there(self) -> dict[str, list[bytes]]:
        """Return all messages, by the list they are in."""
        queues = [keys.EMBED_QUEUE, *map(keys.device_queue, DEVICES)]
        names = [name for queue in queues for name in lanes(queue)]
        names += [name.decode() for name in self.client.scan_iter(keys.held("*"))]
        with self.client.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.lrange(name, 0, -1)
            return dict(zip(names, pipe.execute(), strict=True))


def true_load(there: dict[str, list[bytes]], device: str) -> dict[str, int]:
    """Return the load of a device that follows from where messages are."""
    own = (keys.device_queue(device), keys.held(f"{device}."))
    messages = [raw for name, found in there.items() if name.startswith(own) for raw in found]
    weights = [weight for raw in messages if (weight := weight_of(json.loads(raw)))]
    return {
        "messages": len(weights),
        "credit": sum(min(weight, MOST_CREDIT) for weight in weights),
        "tokens": sum(weights),
    }


@pytest.mark.parametrize("seed", range(8))
def test_a_load_is_exact_at_every_moment_whatever_happens(client: redis.Redis, seed: int) -> None:
    walk = Walk(client, seed)
    for _ in range(150):
        walk.step()
        walk.check()
    walk.work_off()
    walk.check()
    assert not any(walk.there().values())
    assert walk.sent > 50
    for device in DEVICES:
        assert counted(client, device) == NOTHING


# --- the same, over connections of kombu's -------------------------------------------------------

Receive = Callable[..., Receiver]


@pytest.fixture
def open_worker(open_receiver: Receive) -> Receive:
    """Open a receiver of a queue that holds for a device, or for a router."""

    def open_one(queue: str, device: str | None = None, **options: Any) -> Receiver:
        return open_receiver(queue, held=held_by(new_incarnation(device)), **options)

    return open_one


def passing_on(open_worker: Receive, device: str) -> Receiver:
    """Open a router that passes everything on to one device."""

    def pass_on(message: Message) -> None:
        router.channel.forward(message, device)

    router: Receiver = open_worker(keys.EMBED_QUEUE, on_message=pass_on)
    return router


def test_what_is_passed_on_is_a_load_until_it_is_acknowledged(
    client: redis.Redis, open_worker: Receive
) -> None:
    send(client, message(0, texts=3, size=400), message(1, priority=9), message(2))
    router = passing_on(open_worker, "gpu0")
    router.drain_until(lambda: counted(client, "gpu0")["messages"] == 3)
    assert counted(client, "gpu0") == {"messages": 3, "credit": 310, "tokens": 310}
    device = open_worker(keys.device_queue("gpu0"), "gpu0")
    messages = device.take(3)
    assert device.channel.held.credit == 310
    assert counted(client, "gpu0") == {"messages": 3, "credit": 310, "tokens": 310}
    messages[0].ack()
    messages[1].reject(requeue=False)
    device.drain_until(lambda: counted(client, "gpu0")["messages"] == 1)
    assert device.channel.held.credit == 2
    messages[2].reject(requeue=True)
    assert counted(client, "gpu0") == NOTHING
    assert device.channel.held.credit == 0
    router.drain_until(lambda: counted(client, "gpu0")["messages"] == 1)
    [again] = device.take(1)
    again.ack()
    device.close()
    assert counted(client, "gpu0") == NOTHING
    assert load(client, "gpu0")["tokens_completed"] == 312


def test_what_comes_past_the_router_is_in_nobodys_load(
    client: redis.Redis, open_worker: Receive
) -> None:
    queue = keys.device_queue("gpu0")
    send(client, message(0, size=40, routing_key=queue), message(1, routing_key=queue), queue=queue)
    device = open_worker(queue, "gpu0")
    messages = device.take(2)
    assert device.channel.held.uncounted == (2, 14)
    assert device.channel.held.credit == 14
    messages[0].ack()
    messages[1].reject(requeue=True)  # nor is it when a router passes it on
    router = passing_on(open_worker, "gpu0")
    router.drain_until(lambda: client.llen(queue))
    [again] = device.take(1)
    again.ack()
    device.close()
    assert device.channel.held.uncounted == (0, 0)
    assert load(client, "gpu0") == {}


def test_closing_takes_off_what_goes_back(client: redis.Redis, open_worker: Receive) -> None:
    given(client, "gpu0", [message(n) for n in range(3)])
    device = open_worker(keys.device_queue("gpu0"), "gpu0")
    device.take(3)[0].ack()
    device.close()
    assert counted(client, "gpu0") == NOTHING
    assert numbers(waiting(client, keys.EMBED_QUEUE)) == [1, 2]


def test_what_is_no_message_takes_nothing_off(client: redis.Redis, open_worker: Receive) -> None:
    given(client, "gpu0", [message(0)])
    client.lpush(keys.device_queue("gpu0"), b"not a message")
    device = open_worker(keys.device_queue("gpu0"), "gpu0")
    [one] = device.take(1)
    device.drain_until(lambda: client.llen(device.channel.held.key) == 1)
    assert counted(client, "gpu0")["messages"] == 1
    one.ack()
    device.close()
    assert counted(client, "gpu0") == NOTHING


# --- in its smallest forms -----------------------------------------------------------------------


def test_a_load_lasts_for_an_hour_from_when_it_began(client: redis.Redis) -> None:
    given(client, "gpu0", [message(0)])
    assert keys.FORGET_AFTER_S - 60 < client.ttl(keys.load("gpu0")) <= keys.FORGET_AFTER_S
    client.expire(keys.load("gpu0"), 60)
    given(client, "gpu0", [message(1)])
    assert client.ttl(keys.load("gpu0")) <= 60  # heartbeats make it last


def test_telling_twice_counts_once(client: redis.Redis) -> None:
    given(client, "gpu0", [message(0)])
    device = Worker(client, "gpu0")
    [raw] = device.take()
    device.finish(raw)
    command = device.held.take_command((), room=0, most_bytes=0)
    for _ in range(2):
        client.execute_command(*command)  # type: ignore[no-untyped-call]
    assert counted(client, "gpu0") == NOTHING
    assert load(client, "gpu0")["tokens_completed"] == 2


def test_what_is_finished_after_its_load_was_forgotten_begins_no_other(client: redis.Redis) -> None:
    given(client, "gpu0", [message(0), message(1)])
    device = Worker(client, "gpu0")
    finished, _ = device.take()
    client.delete(keys.load("gpu0"))
    device.finish(finished)
    device.tell()
    reap(client, client, device.incarnation)
    assert load(client, "gpu0") == {}


class FinishesMeanwhile(redis.Redis):
    """A client of a server that goes away, while a thread of the worker finishes a message."""

    def evalsha(self, *_: Any) -> Any:
        self.finish()
        raise redis.ConnectionError

    def finish(self) -> None:
        raise NotImplementedError


def test_what_is_finished_while_it_could_not_be_reclaimed_is_taken_off(
    client: redis.Redis, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given(client, "gpu0", [message(0), message(1)])
    device = Worker(client, "gpu0")
    late, lost = device.take()
    device.held.abandon(late)
    device.held.abandon(lost)
    with FinishesMeanwhile.from_url(url) as away:
        monkeypatch.setattr(away, "finish", lambda: device.finish(late))
        with pytest.raises(redis.ConnectionError):
            device.held.reclaim(away, keys.EMBED_QUEUE)
    assert device.held.reclaim(client, keys.EMBED_QUEUE) == 1
    assert counted(client, "gpu0") == NOTHING
    assert numbers(waiting(client, keys.EMBED_QUEUE)) == numbers([lost])
