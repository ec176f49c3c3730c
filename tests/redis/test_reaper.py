"""Work of a worker that is gone goes back: all of it, once, in its order, and to the right place."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import redis

from sutra_tasks import keys
from sutra_tasks.broker import requeue as returning
from sutra_tasks.broker.attempts import attempts_of
from sutra_tasks.broker.load import MOST_CREDIT
from sutra_tasks.broker.queues import lane, lanes
from sutra_tasks.fanout.documents import Documents
from sutra_tasks.fanout.overdue import resend_overdue
from sutra_tasks.fanout.sender import Sender
from sutra_tasks.fanout.store import DocumentStore
from sutra_tasks.health.states import DeviceState
from sutra_tasks.membership import reaper as module
from sutra_tasks.membership.fleet import beat, fleet_members
from sutra_tasks.membership.leases import INTERRUPTED_S
from sutra_tasks.membership.reaper import (
    Reaper,
    end_if_replaced,
    reap,
    requeue_absent_devices,
    requeue_waiting,
)
from tests.records import record
from tests.redis.flow import Worker, given, load, message, numbers, send
from tests.redis.peers import full_memory, waiting

if TYPE_CHECKING:
    from sutra_tasks.membership.device_record import DeviceRecord

PRIORITIES = (0, 3, 6, 9)
TTL_S = 6.0
LEASE_S = 12.0


@pytest.fixture
def results(url: str) -> Iterator[redis.Redis]:
    """A server with results of its own: another database of the one there is."""
    with redis.Redis.from_url(url.removesuffix("/0") + "/1") as client:
        client.flushdb()
        yield client
        client.flushdb()


@pytest.fixture(autouse=True)
def _swept(_nothing_is_left_behind: None, client: redis.Redis) -> Iterator[None]:
    """Queues are full when these tests end; ``rest`` says of what."""
    yield
    client.flushdb()


@pytest.fixture(autouse=True)
def killed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Signals that this process sent to itself."""
    sent: list[int] = []
    monkeypatch.setattr("os.kill", lambda _, number: sent.append(number))
    return sent


def rest(client: redis.Redis) -> dict[str, list[int]]:
    """Return which messages wait where, in the order they would be taken, and which are held."""
    found = {}
    for name in sorted(name.decode() for name in client.scan_iter()):
        if name.startswith((keys.EMBED_QUEUE, keys.DEVICE_QUEUE_PREFIX, keys.in_flight(""))):
            newest_first: Any = client.lrange(name, 0, -1)
            found[name] = numbers(reversed(newest_first))
    return found


def attempts(client: redis.Redis, queue: str = keys.EMBED_QUEUE) -> dict[int, int]:
    headers = [json.loads(raw)["headers"] for raw in waiting(client, queue)]
    return {int(one["id"]): attempts_of(one) for one in headers}


def at_work(client: redis.Redis, device: str = "gpu0", *, messages: int = 10, taken: int = 4) -> Worker:
    """Return a device that was given so many messages and has taken the first of them."""
    given(client, device, [message(n) for n in range(messages)])
    worker = Worker(client, device)
    beat(client, record(device, worker.incarnation.rpartition(".")[2]))
    assert numbers(worker.take(taken)) == list(range(taken))
    return worker


def test_what_a_worker_held_and_what_waited_for_it_is_next_in_its_order(
    client: redis.Redis, results: redis.Redis
) -> None:
    dead = at_work(client)
    waited = message(99)
    send(client, waited)
    had = waiting(client, dead.queue)
    assert reap(client, results, dead.incarnation) == 10
    assert rest(client) == {keys.EMBED_QUEUE: [*range(10), 99]}
    # What nobody had taken is as it came.
    assert waiting(client, keys.EMBED_QUEUE)[4:] == [*had, waited]
    for raw in waiting(client, keys.EMBED_QUEUE)[:4]:
        assert json.loads(raw)["headers"]["redelivered"] is True


def test_every_lane_goes_back_to_its_own(client: redis.Redis, results: redis.Redis) -> None:
    messages = [message(10 * p + turn, priority=p) for turn in range(4) for p in (*PRIORITIES, 1, 8)]
    given(client, "gpu0", messages)
    dead = Worker(client, "gpu0")
    for name in lanes(dead.queue):  # something of each lane is held, something waits
        client.lmove(name, dead.in_flight.key, "RIGHT", "LEFT")
    assert reap(client, results, dead.incarnation) == len(messages)
    assert rest(client) == {
        lane(keys.EMBED_QUEUE, 0): [0, 10, 1, 11, 2, 12, 3, 13],
        lane(keys.EMBED_QUEUE, 3): [30, 31, 32, 33],
        lane(keys.EMBED_QUEUE, 6): [60, 80, 61, 81, 62, 82, 63, 83],
        lane(keys.EMBED_QUEUE, 9): [90, 91, 92, 93],
    }


def test_a_worker_that_dies_counts_one_attempt_of_each_message_it_held(
    client: redis.Redis, results: redis.Redis
) -> None:
    reap(client, results, at_work(client, messages=3, taken=2).incarnation)
    assert attempts(client) == {0: 1, 1: 1, 2: 0}
    again = Worker(client, "gpu1")
    router = Worker(client)
    for raw in router.take():
        router.forward(raw, "gpu1")
    router.send_pending()
    again.take()
    reap(client, results, again.incarnation)
    assert attempts(client) == {0: 2, 1: 2, 2: 1}


def test_a_router_that_dies_counts_no_attempt(client: redis.Redis, results: redis.Redis) -> None:
    send(client, message(0), message(1))
    dead = Worker(client)
    dead.take()
    assert reap(client, results, dead.incarnation) == 2
    assert rest(client) == {keys.EMBED_QUEUE: [0, 1]}
    assert attempts(client) == {0: 0, 1: 0}
    assert not client.keys(keys.load("*"))  # nor is it in anybody's load


def test_a_worker_that_was_stopped_counts_no_attempt(client: redis.Redis, results: redis.Redis) -> None:
    reap(client, results, at_work(client, messages=3, taken=2).incarnation, died=False)
    assert attempts(client) == {0: 0, 1: 0, 2: 0}


@pytest.mark.parametrize(("suspect", "expected"), [("1", {0: 0, 1: 1, 2: 0}), ("9", {0: 0, 1: 0, 2: 0})])
def test_only_a_named_suspect_is_to_blame(
    client: redis.Redis, results: redis.Redis, suspect: str, expected: dict[int, int]
) -> None:
    dead = at_work(client, messages=3, taken=3)
    client.set(keys.suspect(dead.incarnation), suspect, ex=60)
    reap(client, results, dead.incarnation)
    assert attempts(client) == expected
    assert not client.exists(keys.suspect(dead.incarnation))


def test_a_suspect_of_another_worker_takes_no_blame(client: redis.Redis, results: redis.Redis) -> None:
    dead = at_work(client, messages=2, taken=2)
    client.set(keys.suspect("gpu1.1"), "1", ex=60)
    reap(client, results, dead.incarnation)
    assert attempts(client) == {0: 1, 1: 1}
    assert client.exists(keys.suspect("gpu1.1"))


def test_nothing_of_a_worker_stays_but_the_mark_that_its_lease_ended(
    client: redis.Redis, results: redis.Redis
) -> None:
    dead = at_work(client)
    client.set(keys.suspect(dead.incarnation), "1", ex=60)
    reap(client, results, dead.incarnation)
    assert fleet_members(client) == []
    assert {name.decode() for name in client.scan_iter()} == {
        keys.EMBED_QUEUE,
        keys.queues(),  # until its queue is known to be empty for good
        keys.load("gpu0"),  # until its heartbeat or its end of time
    }
    assert load(client, "gpu0")["messages"] == load(client, "gpu0")["credit"] == 0
    assert client.ttl(keys.load("gpu0")) > 0
    assert [name.decode() for name in results.scan_iter()] == [keys.reaped(dead.incarnation)]
    assert keys.REAPED_S - 60 < results.ttl(keys.reaped(dead.incarnation)) <= keys.REAPED_S


def test_reaping_again_changes_nothing(client: redis.Redis, results: redis.Redis) -> None:
    dead = at_work(client)
    reap(client, results, dead.incarnation)
    before = waiting(client, keys.EMBED_QUEUE)
    assert reap(client, results, dead.incarnation) == 0
    assert waiting(client, keys.EMBED_QUEUE) == before


def test_a_worker_that_never_was_can_be_reaped(client: redis.Redis, results: redis.Redis) -> None:
    assert reap(client, results, "never.12345678") == 0
    assert client.keys() == []


def test_a_full_server_still_reaps(client: redis.Redis, results: redis.Redis) -> None:
    dead = at_work(client)
    with full_memory(client):
        assert reap(client, results, dead.incarnation) == 10
    assert rest(client) == {keys.EMBED_QUEUE: list(range(10))}


def test_any_number_may_reap_at_once(client: redis.Redis, results: redis.Redis, url: str) -> None:
    dead = at_work(client, messages=300, taken=150)
    start, moved = threading.Barrier(4), []

    def run() -> None:
        with redis.Redis.from_url(url) as own:
            start.wait()
            moved.append(reap(own, results, dead.incarnation))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(moved) == 300
    assert attempts(client) == {n: int(n < 150) for n in range(300)}
    assert sorted(rest(client)) == [keys.EMBED_QUEUE]
    assert load(client, "gpu0")["messages"] == 0


class DiesAfter(redis.Redis):
    """A client whose process is killed after ``left`` commands."""

    left = 0

    def execute_command(self, *args: Any, **options: Any) -> Any:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return super().execute_command(*args, **options)  # type: ignore[no-untyped-call]


def test_a_reap_is_taken_up_wherever_another_died_in_it(
    client: redis.Redis, results: redis.Redis, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(returning, "MESSAGES_PER_CALL", 2)
    dead = at_work(client)
    died = 0
    with DiesAfter.from_url(url) as dying:
        for survived in range(100):
            dying.left = survived
            assert sum(map(len, rest(client).values())) == 10
            try:
                reap(dying, results, dead.incarnation)
            except KeyboardInterrupt:
                died += 1
                # Whoever looks next finds that there is something to do.
                assert client.hexists(keys.leases(), dead.incarnation)
                continue
            break
    assert died >= 6
    assert rest(client) == {keys.EMBED_QUEUE: list(range(10))}
    assert attempts(client) == {n: int(n < 4) for n in range(10)}
    assert not client.hexists(keys.leases(), dead.incarnation)


@pytest.mark.parametrize("survived", range(12))
def test_a_reap_that_died_anywhere_is_finished_by_the_next(
    client: redis.Redis,
    results: redis.Redis,
    url: str,
    monkeypatch: pytest.MonkeyPatch,
    survived: int,
) -> None:
    monkeypatch.setattr(returning, "MESSAGES_PER_CALL", 3)
    dead = at_work(client)
    client.set(keys.suspect(dead.incarnation), "2", ex=60)
    with DiesAfter.from_url(url) as dying:
        dying.left = survived
        with pytest.raises(KeyboardInterrupt):
            reap(dying, results, dead.incarnation)
    reap(client, results, dead.incarnation)
    assert rest(client) == {keys.EMBED_QUEUE: list(range(10))}
    assert attempts(client) == {n: int(n == 2) for n in range(10)}
    counted = load(client, "gpu0")
    assert (counted["messages"], counted["credit"]) == (0, 0)
    assert counted["tokens_dispatched"] == counted["tokens_completed"]


def store(results: redis.Redis, task: str, state: str) -> None:
    """Store a result as a worker does."""
    results.set(keys.result(task), json.dumps({"status": state, "result": {"data": "x" * 9}}))


def having_taken(client: redis.Redis, *messages: bytes, device: str = "gpu0") -> Worker:
    """Return a device worker that has these messages in flight."""
    given(client, device, messages)
    worker = Worker(client, device)
    worker.take()
    return worker


def changed(raw: bytes, **headers: Any) -> bytes:
    value = json.loads(raw)
    value["headers"] |= headers
    return json.dumps(value).encode()


def test_what_was_answered_by_a_worker_that_died_is_not_requeued(
    client: redis.Redis, results: redis.Redis
) -> None:
    dead = at_work(client)
    for task, state in enumerate(["SUCCESS", "FAILURE", "PROGRESS", "SUCCESS"]):
        store(results, str(task), state)
    assert reap(client, results, dead.incarnation) == 8
    assert rest(client) == {keys.EMBED_QUEUE: [1, 2, *range(4, 10)]}
    assert attempts(client) == {1: 1, 2: 1} | dict.fromkeys(range(4, 10), 0)
    counted = load(client, "gpu0")
    assert (counted["messages"], counted["credit"]) == (0, 0)
    assert counted["tokens_dispatched"] == counted["tokens_completed"]


@pytest.mark.parametrize("died", [True, False])
def test_all_that_was_answered_is_dropped_however_much_it_is_and_however_its_worker_ended(
    client: redis.Redis, results: redis.Redis, died: bool
) -> None:
    count = 2 * returning.MESSAGES_PER_CALL + 5
    dead = at_work(client, messages=count, taken=count)
    for task in range(count):
        if task % 50:
            store(results, str(task), "SUCCESS")
    assert reap(client, results, dead.incarnation, died=died) == 5
    assert rest(client) == {keys.EMBED_QUEUE: [0, 50, 100, 150, 200]}


@pytest.mark.parametrize(
    "headers",
    [
        {"group": "g"},  # its chord may not have counted it
        {"task": keys.PART_TASK},
        {"task": keys.COMBINE_TASK},  # it has yet to forget the parts
        {"task": "shop.save"},
        {"task": None},
    ],
)
def test_what_a_stored_success_does_not_end_is_repeated(
    client: redis.Redis, results: redis.Redis, headers: dict[str, Any]
) -> None:
    dead = having_taken(client, changed(message(0), **headers))
    store(results, "0", "SUCCESS")
    assert reap(client, results, dead.incarnation) == 1
    assert attempts(client) == {0: 1}


def test_what_has_no_result_is_repeated(client: redis.Redis, results: redis.Redis) -> None:
    dead = having_taken(client, changed(message(0), ignore_result=True))
    assert reap(client, results, dead.incarnation) == 1


def test_an_error_that_quotes_a_success_is_none(client: redis.Redis, results: redis.Redis) -> None:
    dead = having_taken(client, message(0))
    stored = {"status": "FAILURE", "result": {"exc_message": ['"status": "SUCCESS"']}}
    results.set(keys.result("0"), json.dumps(stored))
    assert reap(client, results, dead.incarnation) == 1


def test_a_distillation_that_was_answered_is_not_run_again(
    client: redis.Redis, results: redis.Redis
) -> None:
    raw = changed(message(0, routing_key=keys.DISTILL_QUEUE), task=keys.DISTILL_TASK)
    for task, state in {"0": "SUCCESS", "1": "PROGRESS"}.items():
        client.lpush(keys.in_flight("distill.1"), changed(raw, id=task))
        store(results, task, state)
    assert reap(client, results, "distill.1") == 1
    assert numbers(waiting(client, keys.DISTILL_QUEUE)) == [1]


def test_what_was_answered_is_dropped_from_a_full_server(
    client: redis.Redis, results: redis.Redis
) -> None:
    dead = at_work(client)
    store(results, "0", "SUCCESS")
    with full_memory(client):
        assert reap(client, results, dead.incarnation) == 9


def test_nothing_goes_back_before_the_worker_is_kept_from_storing_errors(
    client: redis.Redis, results: redis.Redis
) -> None:
    dead = at_work(client)
    before = rest(client)

    class Away(redis.Redis):
        def execute_command(self, *args: Any, **options: Any) -> Any:  # noqa: ARG002 - redis-py's
            raise redis.ConnectionError

    with pytest.raises(redis.ConnectionError):
        reap(client, Away(), dead.incarnation)
    assert rest(client) == before
    assert client.hexists(keys.leases(), dead.incarnation)


# --- a successor ---------------------------------------------------------------------------------


def test_a_successor_that_serves_keeps_its_place_its_queue_and_its_work(
    client: redis.Redis, results: redis.Redis
) -> None:
    dead = at_work(client, messages=6, taken=2)
    successor = Worker(client, "gpu0")
    said = record("gpu0", successor.incarnation.rpartition(".")[2])
    beat(client, said)
    successor.take(2)
    assert reap(client, results, dead.incarnation) == 2
    assert rest(client) == {
        keys.EMBED_QUEUE: [0, 1],
        successor.queue: [4, 5],
        successor.in_flight.key: [2, 3],
    }
    assert [one.record for one in fleet_members(client)] == [said]
    assert client.hexists(keys.leases(), successor.incarnation)
    assert load(client, "gpu0")["messages"] == 4


def test_what_waits_for_a_successor_that_does_not_serve_yet_goes_back(
    client: redis.Redis, results: redis.Redis
) -> None:
    dead = at_work(client, messages=6, taken=2)
    said = record("gpu0", "later", state=DeviceState.STARTING)
    beat(client, said)
    assert reap(client, results, dead.incarnation) == 6
    assert rest(client) == {keys.EMBED_QUEUE: list(range(6))}
    assert [one.record for one in fleet_members(client)] == [said]


def test_other_devices_are_left_alone(client: redis.Redis, results: redis.Redis) -> None:
    dead = at_work(client, "gpu0", messages=2, taken=1)
    other = at_work(client, "gpu1", messages=2, taken=1)
    silent = keys.device_queue("gpu2")
    client.zadd(keys.queues(), {"gpu2": 0})
    send(client, message(7), queue=silent)
    reap(client, results, dead.incarnation)
    assert rest(client) == {
        keys.EMBED_QUEUE: [0, 1],
        other.queue: [1],
        other.in_flight.key: [0],
        silent: [7],  # somebody else's to look after
    }


# --- a worker that was only paused ---------------------------------------------------------------


def test_what_a_paused_worker_acknowledges_stays_with_its_second_taker(
    client: redis.Redis, results: redis.Redis
) -> None:
    paused = at_work(client, messages=1, taken=1)
    [mine] = paused.has
    reap(client, results, paused.incarnation)
    router = Worker(client)
    [again] = router.take()
    router.forward(again, "gpu0")
    router.send_pending()
    successor = Worker(client, "gpu0")
    successor.take()
    before = load(client, "gpu0")
    paused.acknowledge(mine)
    paused.send_pending()
    assert rest(client) == {successor.in_flight.key: [0]}
    assert load(client, "gpu0") == before


def test_what_a_paused_router_forwards_stays_with_its_second_taker(
    client: redis.Redis, results: redis.Redis
) -> None:
    send(client, message(0))
    paused = Worker(client)
    [mine] = paused.take()
    reap(client, results, paused.incarnation)
    second = Worker(client)
    second.take()
    paused.forward(mine, "gpu0")
    paused.send_pending()
    assert rest(client) == {second.in_flight.key: [0]}
    assert load(client, "gpu0") == {}


@pytest.mark.parametrize("replaced", [True, False])
def test_a_process_ends_if_others_do_its_work(
    results: redis.Redis, client: redis.Redis, killed: list[int], replaced: bool
) -> None:
    if replaced:
        reap(client, results, "gpu0.1")
    reap(client, results, "gpu0.2")
    end_if_replaced(results, "gpu0.1")
    assert killed == [signal.SIGTERM] * replaced


# --- queues of devices that are not there --------------------------------------------------------


def silent_for(client: redis.Redis, said: DeviceRecord, seconds: float) -> None:
    """Let a device have been heard of so long ago."""
    beat(client, said)
    now, micros = client.time()
    for registered in (keys.fleet(), keys.queues()):
        client.zadd(registered, {said.id: now + micros / 1e6 - seconds})


@pytest.mark.parametrize(
    ("state", "silent_s", "expected"),
    [
        (DeviceState.HEALTHY, 0.0, 0),
        (DeviceState.HEALTHY, TTL_S - 3, 0),
        (DeviceState.HEALTHY, TTL_S + 1, 5),
        (DeviceState.DEGRADED, 0.0, 0),
        (DeviceState.UNHEALTHY, 0.0, 0),
        (DeviceState.PROBING, 0.0, 0),
        (DeviceState.STARTING, 0.0, 5),
        (DeviceState.REFUSED, 0.0, 5),
    ],
)
def test_what_waits_for_a_device_that_takes_no_work_goes_back(
    client: redis.Redis, state: DeviceState, silent_s: float, expected: int
) -> None:
    given(client, "gpu0", [message(n) for n in range(5)])
    given(client, "gpu1", [message(9)])
    silent_for(client, record("gpu0", state=state), silent_s)
    beat(client, record("gpu1"))
    assert requeue_absent_devices(client, TTL_S) == expected
    queue = keys.EMBED_QUEUE if expected else keys.device_queue("gpu0")
    assert rest(client) == {queue: list(range(5)), keys.device_queue("gpu1"): [9]}
    if expected:
        assert load(client, "gpu0")["messages"] == 0


def test_what_waits_for_a_device_of_another_version_stays(client: redis.Redis) -> None:
    given(client, "gpu0", [message(0)])
    beat(client, record("gpu0"))
    client.set(keys.device("gpu0"), json.dumps({"v": 1}), ex=60)
    assert requeue_absent_devices(client, TTL_S) == 0


def test_what_waits_goes_back_as_it_came_in_every_lane(client: redis.Redis) -> None:
    messages = [message(n, priority=p) for n in range(3) for p in PRIORITIES]
    given(client, "gpu0", messages)
    silent_for(client, record("gpu0"), TTL_S + 1)
    before = waiting(client, keys.device_queue("gpu0"))
    assert requeue_absent_devices(client, TTL_S) == 12
    assert waiting(client, keys.EMBED_QUEUE) == before
    assert sorted(before) == sorted(messages)


def test_a_device_alone_is_served_by_whoever_registered_it_however_long_ago(
    client: redis.Redis,
) -> None:
    given(client, "gpu0", [message(0)])
    silent_for(client, record("gpu0"), 1000)
    assert requeue_waiting(client, "gpu0") == 0
    client.zrem(keys.fleet(), "gpu0")
    assert requeue_waiting(client, "gpu0") == 1


@pytest.mark.parametrize(("silent_s", "kept"), [(keys.FORGET_AFTER_S - 60, True), (9000.0, False)])
def test_a_queue_is_looked_after_until_its_device_is_forgotten(
    client: redis.Redis, silent_s: float, kept: bool
) -> None:
    silent_for(client, record("gpu0"), silent_s)
    assert requeue_absent_devices(client, TTL_S) == 0
    assert (client.zscore(keys.queues(), "gpu0") is not None) == kept


def test_a_queue_with_messages_is_not_forgotten(client: redis.Redis) -> None:
    # Whatever put them there after its device was gone.
    silent_for(client, record("gpu0"), 2 * keys.FORGET_AFTER_S)
    send(client, message(0), queue=keys.device_queue("gpu0"))
    assert requeue_absent_devices(client, TTL_S) == 1
    assert rest(client) == {keys.EMBED_QUEUE: [0]}
    assert client.zscore(keys.queues(), "gpu0") is not None
    assert requeue_absent_devices(client, TTL_S) == 0
    assert client.zscore(keys.queues(), "gpu0") is None


# --- the reaper ----------------------------------------------------------------------------------


class Time:
    """A clock that stands until it is told to go."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Time:
    return Time()


MakeReaper = Callable[..., Reaper]


@pytest.fixture
def make_reaper(client: redis.Redis, results: redis.Redis, clock: Time) -> MakeReaper:
    """Open a reaper of a router of its own."""

    def open_reaper(client: redis.Redis = client, name: str = "~.1") -> Reaper:
        store = DocumentStore(results, overdue_s=60, progress_ttl_s=600)
        documents = Documents(store, Sender(client, None))
        return Reaper(
            client,
            results,
            name,
            sweep=partial(resend_overdue, documents),
            lease_s=LEASE_S,
            device_ttl_s=TTL_S,
            clock=clock,
        )

    return open_reaper


def look(reaper: Reaper, clock: Time, *, for_s: float, every_s: float = 1.0) -> None:
    """Have a reaper look for so long, once a second."""
    until = clock.now + for_s
    while clock.now < until:
        clock.now += every_s
        reaper.step()


def test_a_lease_ends_once_it_stands_still_for_long_enough(
    client: redis.Redis, clock: Time, make_reaper: MakeReaper
) -> None:
    dead = at_work(client)
    reaper = make_reaper()
    reaper.step()
    look(reaper, clock, for_s=LEASE_S - 1)
    assert client.hexists(keys.leases(), dead.incarnation)
    assert rest(client) == {dead.in_flight.key: [0, 1, 2, 3], dead.queue: [4, 5, 6, 7, 8, 9]}
    look(reaper, clock, for_s=1)
    assert not client.hexists(keys.leases(), dead.incarnation)
    assert rest(client) == {keys.EMBED_QUEUE: list(range(10))}
    assert attempts(client) == {n: int(n < 4) for n in range(10)}


def test_who_beats_keeps_its_lease(client: redis.Redis, clock: Time, make_reaper: MakeReaper) -> None:
    lives = at_work(client)
    reaper = make_reaper()
    reaper.step()
    for _ in range(4):
        look(reaper, clock, for_s=LEASE_S - 1)
        client.hincrby(keys.leases(), lives.incarnation, 1)
    assert client.hexists(keys.leases(), lives.incarnation)
    assert client.llen(lives.in_flight.key) == 4


def test_a_reaper_that_could_not_look_begins_anew(
    client: redis.Redis, clock: Time, make_reaper: MakeReaper
) -> None:
    worker = at_work(client)
    reaper = make_reaper()
    reaper.step()
    for _ in range(3):
        look(reaper, clock, for_s=LEASE_S - 1)
        clock.now += INTERRUPTED_S + 0.1
        reaper.step()
        assert client.hexists(keys.leases(), worker.incarnation)
    look(reaper, clock, for_s=LEASE_S)
    assert not client.hexists(keys.leases(), worker.incarnation)


class Slow(redis.Redis):
    """A client of a server that takes ``seconds`` for one answer, in which nobody can beat."""

    seconds = 0.0
    clock: Time

    def execute_command(self, *args: Any, **options: Any) -> Any:
        answer = super().execute_command(*args, **options)  # type: ignore[no-untyped-call]
        if args[0] == "HGETALL":
            self.clock.now, self.seconds = self.clock.now + self.seconds, 0.0
        return answer


def test_a_server_that_pauses_ends_nobodys_lease(
    client: redis.Redis, clock: Time, make_reaper: MakeReaper, url: str
) -> None:
    worker = at_work(client)
    with Slow.from_url(url) as slow:
        slow.clock = clock
        reaper = make_reaper(slow)
        reaper.step()
        look(reaper, clock, for_s=LEASE_S - 2)
        slow.seconds = 3 * LEASE_S
        look(reaper, clock, for_s=2)
    assert client.hexists(keys.leases(), worker.incarnation)


def test_a_reaper_keeps_the_lease_of_its_own_process(
    client: redis.Redis, clock: Time, make_reaper: MakeReaper
) -> None:
    reaper = make_reaper()
    look(reaper, clock, for_s=3 * LEASE_S)
    assert client.hgetall(keys.leases()) == {b"~.1": b"36"}


def test_a_full_server_ends_no_routers_lease(
    client: redis.Redis, clock: Time, make_reaper: MakeReaper
) -> None:
    reaper = make_reaper()
    reaper.step()
    with full_memory(client):
        look(reaper, clock, for_s=3 * LEASE_S)
    assert client.hgetall(keys.leases()) == {b"~.1": b"37"}


def test_reapers_end_the_leases_of_each_other(
    client: redis.Redis, clock: Time, make_reaper: MakeReaper, results: redis.Redis
) -> None:
    send(client, message(0))
    silent = Worker(client)
    silent.take()
    one, two = make_reaper(), make_reaper(name="~.2")
    one.step()
    two.step()
    look(two, clock, for_s=LEASE_S)
    assert rest(client) == {keys.EMBED_QUEUE: [0]}
    assert set(client.hgetall(keys.leases())) == {b"~.2"}
    assert results.exists(keys.reaped("~.1"), keys.reaped(silent.incarnation)) == 2


def test_a_router_that_was_silent_for_too_long_ends(
    client: redis.Redis,
    clock: Time,
    make_reaper: MakeReaper,
    results: redis.Redis,
    killed: list[int],
) -> None:
    # It could store no error, and would drop the tasks that fail.
    reaper = make_reaper()
    look(reaper, clock, for_s=3)
    assert not killed
    reap(client, results, "~.1")
    look(reaper, clock, for_s=3)
    assert killed == [signal.SIGTERM]


def test_a_reap_that_failed_is_repeated_at_the_next_look(
    client: redis.Redis, clock: Time, make_reaper: MakeReaper, url: str
) -> None:
    dead = at_work(client)
    with DiesAfter.from_url(url) as own:
        reaper = make_reaper(own)
        own.left = 1000
        reaper.step()
        look(reaper, clock, for_s=LEASE_S - 1)
        own.left = 6
        with pytest.raises(KeyboardInterrupt):
            look(reaper, clock, for_s=1)
        own.left = 1000
        look(reaper, clock, for_s=1)
    assert not client.hexists(keys.leases(), dead.incarnation)
    assert rest(client) == {keys.EMBED_QUEUE: list(range(10))}


def test_a_reaper_looks_after_queues_at_once_but_not_after_an_interruption(
    client: redis.Redis, clock: Time, make_reaper: MakeReaper
) -> None:
    # Of who could beat while the server was away, nothing is known yet.
    given(client, "gpu0", [message(0)])
    silent_for(client, record("gpu0"), TTL_S + 1)
    reaper = make_reaper()
    reaper.step()
    assert rest(client) == {keys.device_queue("gpu0"): [0]}
    clock.now += INTERRUPTED_S + 0.1
    reaper.step()
    assert rest(client) == {keys.device_queue("gpu0"): [0]}
    look(reaper, clock, for_s=1)
    assert rest(client) == {keys.EMBED_QUEUE: [0]}


def test_a_reaper_goes_on_after_any_error(
    clock: Time, make_reaper: MakeReaper, monkeypatch: pytest.MonkeyPatch
) -> None:
    reaper = make_reaper()
    looked: list[int] = []

    def step() -> float:
        looked.append(1)
        if len(looked) == 3:
            raise SystemExit  # a daemon thread has no other end
        raise redis.ConnectionError

    monkeypatch.setattr(reaper, "step", step)
    monkeypatch.setattr(module, "POLL_S", 0.0)
    with pytest.raises(SystemExit):
        reaper.run()
    assert len(looked) == 3


def test_one_message_of_any_size_uses_a_bounded_credit(
    client: redis.Redis, results: redis.Redis
) -> None:
    given(client, "gpu0", [message(0, texts=100, size=1000), message(1)])
    assert load(client, "gpu0") == {
        "messages": 2,
        "credit": MOST_CREDIT + 2,
        "tokens_dispatched": 25_202,
    }
    dead = Worker(client, "gpu0")
    dead.take(1)
    reap(client, results, dead.incarnation)
    assert load(client, "gpu0") == {
        "messages": 0,
        "credit": 0,
        "tokens_dispatched": 25_202,
        "tokens_completed": 25_202,
    }
