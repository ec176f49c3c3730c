"""A message is in its queue or in flight at every moment, and is requeued if its worker dies."""

from __future__ import annotations

import json
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import redis

from sutra_tasks import keys
from sutra_tasks.broker.attempts import ATTEMPTS
from sutra_tasks.broker.queues import lane
from sutra_tasks.broker.requeue import requeue_in_flight
from sutra_tasks.broker.take_protocol import MOST_MESSAGES
from sutra_tasks.host.processes import spawn
from sutra_tasks.host.supervisor import Supervisor, WorkerSpec
from tests.conftest import wait_until
from tests.redis.peers import Receiver, absent_server, full_memory, waiting

if TYPE_CHECKING:
    import subprocess

    from kombu import Message

    from sutra_tasks.broker.in_flight import InFlightMessages

Put = Callable[..., list[bytes]]
Receive = Callable[..., Receiver]
Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def receive(open_receiver: Receive, in_flight: InFlightMessages) -> Receive:
    """Open a connection of this one process over our transport; they share what is in_flight."""

    def open_one(*queues: str, **options: Any) -> Receiver:
        return open_receiver(*queues, in_flight=in_flight, **options)

    return open_one


@pytest.fixture
def start_victim(url: str, in_flight: InFlightMessages) -> Iterator[Start]:
    """Start a consuming process that the test may kill."""
    started: list[subprocess.Popen[bytes]] = []

    def start(queue: str, *, mode: str = "keep", idle_wait_s: float = 0.1) -> subprocess.Popen[bytes]:
        module = [sys.executable, "-m", "tests.redis.victim"]
        options = [url, in_flight.incarnation, queue, mode, str(idle_wait_s)]
        started.append(spawn([*module, *options]))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def payloads(messages: list[Message]) -> list[object]:
    return [message.payload for message in messages]


def tags(stored: list[bytes]) -> list[str]:
    return [json.loads(raw)["properties"]["delivery_tag"] for raw in stored]


def cut_connections(client: redis.Redis) -> None:
    """Close every connection to the server but ours, as a restarting server would."""
    client.client_kill_filter(_type="normal", skipme=True)


def test_at_every_moment_a_message_is_in_its_queue_or_in_flight(
    receive: Receive, put: Put, client: redis.Redis, in_flight: InFlightMessages
) -> None:
    for priority in (0, 3, 6, 9):
        put("q", *range(10), priority=priority)
    seen: list[int] = []

    def count(message: Message) -> None:
        seen.append(len(waiting(client, "q")) + client.llen(in_flight.key))
        receiver.messages.append(message)

    receiver = receive("q", on_message=count)
    receiver.drain_until(lambda: len(receiver.messages) == 40)
    assert seen == [40] * 40
    for message in receiver.messages:
        message.ack()
    receiver.drain_until(lambda: not client.keys())


def test_nothing_is_lost_when_a_process_is_killed(
    start_victim: Start, put: Put, client: redis.Redis, in_flight: InFlightMessages, leaves: set[str]
) -> None:
    sent = [*put("q", *range(30)), *put("q", *range(10), priority=6)[30:]]
    victim = start_victim("q")
    wait_until(lambda: client.llen(in_flight.key) == 40)
    victim.kill()
    victim.wait()
    assert requeue_in_flight(client, in_flight.incarnation, "q") == 40
    leaves.update({"q", lane("q", 6)})
    assert tags(waiting(client, "q")) == tags(sent)


def test_nothing_is_lost_when_a_process_is_killed_while_it_acknowledges(
    start_victim: Start, put: Put, client: redis.Redis, in_flight: InFlightMessages, leaves: set[str]
) -> None:
    put("q", *range(400))
    victim = start_victim("q", mode="finish")
    wait_until(lambda: client.llen("done") >= 100)
    victim.kill()
    victim.wait()
    requeue_in_flight(client, in_flight.incarnation, "q")
    leaves.update({"q", "done"})
    done = [int(text) for text in client.lrange("done", 0, -1)]
    left = tags(waiting(client, "q"))
    assert max(Counter(left).values(), default=1) == 1
    # Of what was done last, the server may not have heard.
    assert 400 <= len(done) + len(left) <= 400 + MOST_MESSAGES
    assert done == list(range(len(done)))


def test_what_reaches_a_stopped_process_is_not_lost_when_it_is_killed(
    start_victim: Start, put: Put, client: redis.Redis, in_flight: InFlightMessages, leaves: set[str]
) -> None:
    victim = start_victim("q", idle_wait_s=60)
    wait_until(lambda: any(one["flags"] == "b" for one in client.client_list()))
    victim.send_signal(signal.SIGSTOP)
    put("q", "text")
    wait_until(lambda: client.llen(in_flight.key) == 1)  # the server moved it; nobody reads the answer
    victim.kill()
    victim.wait()
    assert requeue_in_flight(client, in_flight.incarnation, "q") == 1
    leaves.add("q")
    assert client.llen("q") == 1
    assert not client.exists(in_flight.key)


def test_closing_requeues_what_is_unacknowledged_in_its_order(
    receive: Receive, put: Put, client: redis.Redis, in_flight: InFlightMessages, leaves: set[str]
) -> None:
    sent = put("q", *range(6))
    receiver = receive("q", prefetch=4)
    messages = receiver.take(4)
    messages[1].ack()
    receiver.close()
    leaves.add("q")
    assert tags(waiting(client, "q")) == tags([sent[0], *sent[2:]])
    assert not client.exists(in_flight.key)


def test_closing_while_a_take_is_under_way_requeues_what_it_took(
    receive: Receive, put: Put, client: redis.Redis, in_flight: InFlightMessages, leaves: set[str]
) -> None:
    receiver = receive("q")
    assert receiver.take_all() == []
    receiver.channel.connection.cycle.on_poll_start()  # the next take is sent, its answer unread
    put("q", "text")
    receiver.close()
    leaves.add("q")
    assert client.llen("q") == 1
    assert not client.exists(in_flight.key)


def close(receiver: Receiver) -> None:
    receiver.close()


def collect(receiver: Receiver) -> None:
    """Give a connection up as Celery does when it is lost."""
    receiver.connection.collect()


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("give_up", [close, collect])
def test_a_new_connection_takes_again_what_the_lost_one_had_but_not_what_was_acknowledged(
    receive: Receive,
    put: Put,
    client: redis.Redis,
    give_up: Callable[[Receiver], None],
    restarted: bool,
) -> None:
    put("q", *range(4))
    lost = receive("q")
    had = lost.take(4)
    if restarted:
        client.script_flush()
    cut_connections(client)
    had[1].ack()
    with pytest.raises(redis.ConnectionError):
        lost.take(1)
    give_up(lost)
    receiver = receive("q")
    messages = receiver.take(3)
    assert payloads(messages) == [0, 2, 3]
    assert all(message.headers["redelivered"] for message in messages)
    for message in messages:
        message.ack()
    receiver.drain_until(lambda: not client.keys())


def test_what_could_not_be_requeued_on_closing_is_requeued_on_reconnecting(
    receive: Receive, put: Put, client: redis.Redis, in_flight: InFlightMessages, leaves: set[str]
) -> None:
    sent = put("q", *range(3))
    lost = receive("q")
    done, *_ = lost.take(3)
    done.ack()
    lost.channel._pool = absent_server().connection_pool  # the server is away
    lost.close()
    assert client.llen(in_flight.key) == 3
    receiver = receive("q", prefetch=1)
    receiver.take(1)
    receiver.close()
    leaves.add("q")
    assert tags(waiting(client, "q")) == tags(sent[1:])
    assert not client.exists(in_flight.key)


def test_a_message_acknowledged_on_a_closed_connection_stays_with_its_second_taker(
    receive: Receive, put: Put, client: redis.Redis, in_flight: InFlightMessages
) -> None:
    put("q", "text")
    first = receive("q")
    [late] = first.take(1)
    first.close()
    second = receive("q")
    [message] = second.take(1)
    late.channel.basic_ack(late.delivery_tag)
    assert second.take_all() == []
    assert client.llen(in_flight.key) == 1
    message.ack()
    second.drain_until(lambda: not client.keys())


def test_consuming_goes_on_over_twenty_lost_connections(
    receive: Receive, put: Put, client: redis.Redis
) -> None:
    receiver = receive("q", prefetch=2)
    for turn in range(20):
        put("q", [turn, "done"], [turn, "lost"])
        messages = receiver.take(2)
        assert payloads(messages) == [[turn, "done"], [turn, "lost"]]
        messages[0].ack()
        cut_connections(client)
        with pytest.raises(redis.ConnectionError):
            receiver.take(1)
        receiver.connection.collect()
        receiver = receive("q", prefetch=2)
        [message] = receiver.take(1)
        assert message.payload == [turn, "lost"]
        message.ack()
    receiver.drain_until(lambda: not client.keys())


def test_a_server_that_forgets_its_scripts_changes_nothing(
    receive: Receive, put: Put, client: redis.Redis
) -> None:
    receiver = receive("q")
    for turn in range(5):
        client.script_flush()
        put("q", turn)
        [message] = receiver.take(1)
        client.script_flush()
        message.ack()
    receiver.drain_until(lambda: not client.keys())


def test_what_is_acknowledged_and_forwarded_while_the_scripts_are_gone_arrives(
    receive: Receive, put: Put, client: redis.Redis, in_flight: InFlightMessages, leaves: set[str]
) -> None:
    sent = put("q", *range(8))
    receiver = receive("q", prefetch=4)
    for turn in range(4):
        acknowledged, forwarded = receiver.take(2)
        client.script_flush()
        acknowledged.ack()
        receiver.channel.forward(forwarded, "gpu0")
        assert len(waiting(client, keys.device_queue("gpu0"))) <= turn
    receiver.drain_until(lambda: not client.exists(in_flight.key))
    assert waiting(client, keys.device_queue("gpu0")) == sent[1::2]
    leaves.add(keys.device_queue("gpu0"))


def test_a_connection_survives_that_the_scripts_go_while_a_take_is_under_way(
    receive: Receive, put: Put, client: redis.Redis
) -> None:
    receiver = receive("q")
    assert receiver.take_all() == []
    put("q", "text")
    client.script_flush()
    socket = receiver.channel.client.connection._sock
    receiver.channel.connection.cycle.on_poll_start()
    [message] = receiver.take(1)
    assert receiver.channel.client.connection._sock is socket
    message.ack()
    receiver.drain_until(lambda: not client.keys())


def test_a_full_server_is_worked_empty(
    receive: Receive, put: Put, client: redis.Redis, in_flight: InFlightMessages
) -> None:
    put("q", *range(3))
    receiver = receive("q")
    with full_memory(client):
        messages = receiver.take(3)
        assert payloads(messages) == [0, 1, 2]
        assert client.llen("q") + client.llen(in_flight.key) == 3
        for message in messages:
            message.ack()
        receiver.drain_until(lambda: not client.keys())


def test_every_forwarded_message_arrives_untouched_and_lets_the_next_be_taken(
    receive: Receive, open_receiver: Receive, put: Put, client: redis.Redis, in_flight: InFlightMessages
) -> None:
    sent = put("q", *range(20), compression="zlib", priority=4, headers={"id": "x"})

    def pass_on(message: Message) -> None:
        router.channel.forward(message, "gpu0")

    queue = keys.device_queue("gpu0")
    router = receive("q", prefetch=2, on_message=pass_on)
    router.drain_until(lambda: len(waiting(client, queue)) == 20)
    assert client.lrange(lane(queue, 4), 0, -1) == sent[::-1]
    assert not client.exists(in_flight.key)
    messages = open_receiver(queue).take(20)
    assert payloads(messages) == list(range(20))
    assert "redelivered" not in messages[0].headers
    for message in messages:
        message.ack()


def test_an_error_between_forwarded_messages_delays_none_and_counts_for_its_message(
    receive: Receive, put: Put, client: redis.Redis, leaves: set[str]
) -> None:
    sent = put("q", *range(5))
    queue = keys.device_queue("gpu0")
    leaves.add(queue)
    failures = iter([RuntimeError()])

    def pass_on(message: Message) -> None:
        if message.payload == 2 and (failure := next(failures, None)):
            raise failure
        router.channel.forward(message, "gpu0")

    router = receive("q", on_message=pass_on)
    router.drain_until(lambda: client.llen(queue) == 5)
    qos = router.channel.qos
    assert len(qos._delivered) == len(qos._dirty)  # the prefetch counts none of them any more
    router.close()
    *others, again = waiting(client, queue)
    assert tags([*others[:2], again, *others[2:]]) == tags(sent)
    assert json.loads(again)["headers"][ATTEMPTS] == 1


def test_what_was_acknowledged_is_sent_when_the_connection_is_closed(
    receive: Receive, put: Put, client: redis.Redis
) -> None:
    put("q", *range(3))
    receiver = receive("q")
    for message in receiver.take(3):
        message.ack()
    receiver.close()
    assert client.keys() == []


def test_what_could_not_be_requeued_is_requeued_a_little_later(
    receive: Receive, put: Put, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Many threads at once may want for connections, while that of the loop is fine.
    put("q", *range(2))
    receiver = receive("q")
    kept, refused = receiver.take(2)
    with monkeypatch.context() as away:
        away.setitem(receiver.channel.__dict__, "_commands", absent_server())
        refused.requeue()
    [again] = receiver.take(1)
    assert again.payload == refused.payload
    assert again.headers["redelivered"]
    for message in (kept, again):
        message.ack()
    receiver.drain_until(lambda: not client.keys())


class SometimesAway(redis.Redis):
    """A client whose server can go away."""

    away = False

    def execute_command(self, *args: Any, **options: Any) -> Any:
        if self.away:
            raise redis.ConnectionError("away")
        return super().execute_command(*args, **options)  # type: ignore[no-untyped-call]


def test_what_a_process_had_in_flight_is_requeued_even_if_the_server_was_away_when_it_died(
    put: Put, client: redis.Redis, url: str, leaves: set[str]
) -> None:
    leaves.add(keys.EMBED_QUEUE)
    with SometimesAway.from_url(url) as own:
        specs = [WorkerSpec("router", ["sleep", "60"], {})]
        supervisor = Supervisor(specs, own, results=client, drain_s=1.0, report=lambda _: None)
        supervisor.start(0.0)
        try:
            [child] = supervisor._children
            process, in_flight = child.process, keys.in_flight(child.incarnation)
            assert process is not None
            put(keys.EMBED_QUEUE, "text")
            client.lmove(keys.EMBED_QUEUE, in_flight, "RIGHT", "LEFT")
            own.away = True
            process.kill()
            wait_until(lambda: process.poll() is not None)
            supervisor.step(1.0)
            own.away = False
            for now in range(2, 10):
                supervisor.step(float(now))
        finally:
            supervisor.stop()
    assert client.llen(in_flight) == 0
    assert len(waiting(client, keys.EMBED_QUEUE)) == 1
