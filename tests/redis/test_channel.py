"""What kombu's Redis transport promises its users holds over ours as well."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import pytest
from kombu import Connection, Consumer, Exchange, Message, Producer, Queue
from kombu.asynchronous import Hub, set_event_loop

from sutra_tasks import keys
from sutra_tasks.broker.in_flight import InFlightMessages, in_flight_of
from sutra_tasks.broker.queues import lane, new_incarnation
from tests.redis.peers import OURS, Receiver, waiting

if TYPE_CHECKING:
    import redis

Put = Callable[..., list[bytes]]
Receive = Callable[..., Receiver]


@pytest.fixture(params=["stock", "ours"])
def receive(request: pytest.FixtureRequest, open_receiver: Receive) -> Receive:
    """Open a receiver over each of the two transports in turn."""
    if request.param == "stock":
        return open_receiver
    return partial(open_receiver, in_flight=in_flight_of(new_incarnation("t")))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": "zlib"},
        {"priority": 6},
        {"serializer": "json", "correlation_id": "c", "reply_to": "r", "expiration": 60},
        {"headers": {"id": "x", "sutra": {"v": 1, "texts": 2, "strategy": None}}},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_a_message_arrives_as_it_was_sent(
    receive: Receive, put: Put, options: dict[str, object]
) -> None:
    body = {"texts": ["Grüße", "नमस्ते", "\N{SMILING FACE WITH OPEN MOUTH}"], "n": [1, 2.5, None]}
    [stored] = put("q", body, **options)
    sent = json.loads(stored)
    [message] = receive("q").take(1)
    assert message.payload == body
    assert message.headers == sent["headers"]
    properties = {**sent["properties"], "delivery_tag": message.delivery_tag}
    assert message.properties == properties
    assert message.delivery_info == {"exchange": "", "routing_key": "q"}
    assert message.content_type == sent["content-type"]
    assert message.content_encoding == sent["content-encoding"]
    message.ack()


def test_bytes_arrive_as_they_were_sent(receive: Receive, put: Put) -> None:
    put("q", bytes(range(256)), content_type="application/data", content_encoding="binary")
    [message] = receive("q").take(1)
    assert message.body == bytes(range(256))
    message.ack()


def test_lanes_are_served_in_order_and_each_first_in_first_out(receive: Receive, put: Put) -> None:
    for turn in (1, 2):
        for priority in (9, 4, 0, 6, 3, 1):
            put("q", [priority, turn], priority=priority)
    messages = receive("q").take(12)
    by_lane = {0: [0, 1], 3: [4, 3], 6: [6], 9: [9]}
    arrived = [message.payload for message in messages]
    assert [lane("q", priority) for priority, _ in arrived] == [
        lane("q", step) for step, sent in by_lane.items() for _ in range(2 * len(sent))
    ]
    for priority in (9, 4, 0, 6, 3, 1):
        assert [turn for sent, turn in arrived if sent == priority] == [1, 2]
    for message in messages:
        message.ack()


def test_a_long_backlog_arrives_completely_and_in_order(receive: Receive, put: Put) -> None:
    put("q", *range(100))
    receiver = receive("q")
    for expected in range(100):
        [message] = receiver.take(1)
        assert message.payload == expected
        message.ack()


def test_acknowledging_removes_a_message_everywhere(
    receive: Receive, put: Put, client: redis.Redis
) -> None:
    put("q", "text")
    receiver = receive("q")
    [message] = receiver.take(1)
    message.ack()
    receiver.drain_until(lambda: not client.keys())


def test_dropping_removes_a_message_everywhere(receive: Receive, put: Put, client: redis.Redis) -> None:
    put("q", "text")
    receiver = receive("q")
    [message] = receiver.take(1)
    message.reject(requeue=False)
    assert receiver.take_all() == []
    assert client.keys() == []


def test_requeuing_delivers_again_and_says_so(receive: Receive, put: Put) -> None:
    put("q", "text", priority=3, headers={"id": "x"})
    receiver = receive("q")
    [first] = receiver.take(1)
    assert "redelivered" not in first.headers
    assert "redelivered" not in first.delivery_info
    first.reject(requeue=True)
    [second] = receiver.take(1)
    assert second.payload == "text"
    assert second.headers == {"id": "x", "redelivered": True}
    assert second.delivery_info == {"exchange": "", "routing_key": "q", "redelivered": True}
    assert second.properties["priority"] == 3
    second.ack()


def test_a_message_can_be_requeued_any_number_of_times(
    receive: Receive, put: Put, client: redis.Redis
) -> None:
    put("q", "text")
    receiver = receive("q", prefetch=1)
    for _ in range(5):
        [message] = receiver.take(1)
        message.reject(requeue=True)
    [message] = receiver.take(1)
    message.ack()
    receiver.drain_until(lambda: not client.keys())


def test_never_more_than_the_prefetch_limit_is_unacknowledged(receive: Receive, put: Put) -> None:
    put("q", *range(5))
    receiver = receive("q", prefetch=3)
    unacknowledged = receiver.take_all()
    assert [message.payload for message in unacknowledged] == [0, 1, 2]
    unacknowledged.pop(1).ack()
    unacknowledged += receiver.take_all()
    assert [message.payload for message in unacknowledged] == [0, 2, 3]
    for message in unacknowledged:
        message.ack()
    [message] = receiver.take(1)
    message.ack()


def test_a_message_in_another_queue_is_not_starved_by_a_backlog(receive: Receive, put: Put) -> None:
    put("busy", *range(20))
    put("quiet", "text")
    receiver = receive("busy", "quiet", prefetch=1)
    first = []
    for _ in range(2):
        [message] = receiver.take(1)
        first.append(message.payload)
        message.ack()
    assert "text" in first
    for _ in range(19):
        [message] = receiver.take(1)
        message.ack()


def test_draining_ends_after_its_timeout(receive: Receive) -> None:
    with pytest.raises(TimeoutError):
        receive("q").connection.drain_events(timeout=0.2)


def test_an_idle_consumer_hears_of_every_lane_and_queue(receive: Receive, put: Put) -> None:
    receiver = receive("a", "b")
    for queue, priority in [("a", 0), ("b", 9), ("a", 6), ("b", 0)]:
        assert receiver.take_all() == []
        put(queue, [queue, priority], priority=priority)
        [message] = receiver.take(1)
        assert message.payload == [queue, priority]
        message.ack()


def test_closing_requeues_what_is_unacknowledged(
    receive: Receive, put: Put, client: redis.Redis, leaves: set[str]
) -> None:
    sent = [json.loads(raw)["properties"]["delivery_tag"] for raw in put("q", *range(5))]
    receiver = receive("q")
    messages = receiver.take(5)
    messages[2].ack()
    receiver.close()
    returned = [json.loads(raw) for raw in waiting(client, "q")]
    assert all(message["headers"]["redelivered"] for message in returned)
    del sent[2]
    assert sorted(message["properties"]["delivery_tag"] for message in returned) == sorted(sent)
    leaves.add("q")


def test_what_arrives_after_cancelling_stays_in_its_queue(
    receive: Receive, put: Put, client: redis.Redis, leaves: set[str]
) -> None:
    receiver = receive("kept", "cancelled")
    assert receiver.take_all() == []
    receiver.consumer.cancel_by_queue("cancelled")
    put("cancelled", "text")
    put("kept", "other")
    [message] = receiver.take_all()
    assert message.payload == "other"
    message.ack()
    assert len(waiting(client, "cancelled")) == 1
    leaves.add("cancelled")


def test_a_stock_client_counts_and_purges_what_waits_but_not_what_is_taken(
    receive: Receive, put: Put, url: str, client: redis.Redis
) -> None:
    put("q", *range(5))
    receiver = receive("q", prefetch=2)
    messages = receiver.take_all()
    with Connection(url) as connection, connection.channel() as channel:
        assert channel.queue_declare("q", passive=True).message_count == 3
        assert channel.queue_purge("q") == 3
    for message in messages:
        message.ack()
    assert receiver.take_all() == []
    assert client.keys() == []


def test_what_a_worker_publishes_reaches_a_stock_consumer(
    receive: Receive, open_receiver: Receive
) -> None:
    worker = receive("unused")
    worker.connection.Producer().publish("text", routing_key="q", headers={"id": "x"}, priority=9)
    [message] = open_receiver("q").take(1)
    assert (message.payload, message.headers) == ("text", {"id": "x"})
    message.ack()


def test_broadcasts_reach_a_consumer_beside_its_queue(
    receive: Receive, put: Put, url: str, client: redis.Redis
) -> None:
    broadcast = Exchange("everyone", type="fanout")
    receiver = receive("q")
    heard: list[object] = []
    with receiver.connection.channel() as ear:
        listener = Consumer(
            ear, [Queue("ear", broadcast, auto_delete=True)], no_ack=True, accept=["json"]
        )
        listener.register_callback(lambda body, _: heard.append(body))
        listener.consume()
        receiver.drain_until(client.pubsub_numpat)
        with Connection(url) as connection, connection.channel() as channel:
            producer = Producer(channel, broadcast)
            producer.publish({"method": "ping"})
        put("q", "text")
        [message] = receiver.take(1)
        receiver.drain_until(lambda: heard)
        message.ack()
        assert heard == [{"method": "ping"}]


def test_a_message_whose_routing_key_is_not_its_queue_comes_back(
    receive: Receive, url: str, client: redis.Redis
) -> None:
    # A queue bound to an exchange. gocelery, say, writes the routing key "celery" always.
    exchange = Exchange("everything", type="topic")
    queue = Queue("q", exchange, routing_key="to.*")
    receiver = receive(queue)
    with Connection(url) as connection, connection.channel() as channel:
        Producer(channel, exchange).publish("text", routing_key="to.embed", declare=[queue])
    [message] = receiver.take(1)
    message.reject(requeue=True)
    assert client.lrange("to.embed", 0, -1) == []
    [message] = receiver.take(1)
    message.ack()


def test_another_consumer_of_the_process_leaves_messages_in_flight_alone(
    put: Put, client: redis.Redis, receive: Receive
) -> None:
    put("q", *range(3))
    messages = receive("q").take(3)
    receive("reply")
    assert client.llen("q") == 0
    for message in messages:
        message.ack()


def test_closing_a_channel_leaves_messages_of_another_alone(
    put: Put, client: redis.Redis, receive: Receive, url: str
) -> None:
    # Celery reopens its remote control's channel after any error in a control command.
    put("q", *range(3))
    receiver = receive("q")
    messages = receiver.take(3)
    broadcast = Exchange("everyone", type="fanout")
    heard: list[object] = []
    with receiver.connection.channel() as ear:
        queue = Queue("ear", broadcast, auto_delete=True)
        Consumer(ear, [queue], no_ack=True, on_message=heard.append).consume()
        receiver.drain_until(client.pubsub_numpat)
        with Connection(url) as connection, connection.channel() as channel:
            Producer(channel, broadcast).publish({"method": "ping"})
        receiver.drain_until(lambda: heard)
    assert waiting(client, "q") == []
    for message in messages:
        message.ack()


def test_consuming_again_on_one_channel_leaves_its_messages_alone(
    put: Put, client: redis.Redis, receive: Receive
) -> None:
    # Remote control's cancel_consumer and add_consumer do this to a running worker.
    put("q", *range(3))
    receiver = receive("q")
    messages = receiver.take(3)
    receiver.consumer.cancel()
    receiver.consumer.consume()
    assert waiting(client, "q") == []
    for message in messages:
        message.ack()


def test_a_consumer_that_does_not_acknowledge_leaves_nothing_behind(
    put: Put, client: redis.Redis, receive: Receive
) -> None:
    # Celery reads replies of remote control so: mingle (on by default), and inspect in a worker.
    put("reply", "text")
    receiver = receive("reply", no_ack=True)
    receiver.take(1)
    receiver.close()
    assert client.keys() == []


def test_a_message_asked_for_can_be_acknowledged(
    put: Put, client: redis.Redis, receive: Receive
) -> None:
    put("q", "text")
    receiver = receive("unused")
    receiver.channel.basic_get("q").ack()
    assert receiver.take_all() == []
    assert client.keys() == []


@pytest.fixture
def hub() -> Iterator[Hub]:
    """Celery's event loop, as a worker runs it."""
    loop = Hub()
    set_event_loop(loop)
    yield loop
    loop.close()
    set_event_loop(None)


@pytest.mark.parametrize("transport", ["stock", "ours"])
def test_threads_may_acknowledge_while_the_loop_receives(
    transport: str, hub: Hub, put: Put, open_receiver: Receive, client: redis.Redis
) -> None:
    put("q", *range(60))
    in_flight = in_flight_of(new_incarnation("t")) if transport == "ours" else None
    arrived: list[object] = []
    threads: list[threading.Thread] = []

    def acknowledge_elsewhere(message: Message) -> None:
        arrived.append(message.payload)
        threads.append(threading.Thread(target=message.ack))
        threads[-1].start()

    receiver = open_receiver("q", in_flight=in_flight, prefetch=8, on_message=acknowledge_elsewhere)
    receiver.connection.register_with_event_loop(hub)
    while len(arrived) < 60 or client.keys():
        hub.run_once()
    for thread in threads:
        thread.join()
    assert arrived == list(range(60))


def test_the_loop_never_has_more_in_flight_than_the_prefetch_limit(
    hub: Hub, put: Put, open_receiver: Receive, in_flight: InFlightMessages, client: redis.Redis
) -> None:
    put("q", *range(30))
    receiver = open_receiver("q", in_flight=in_flight, prefetch=3)
    receiver.connection.register_with_event_loop(hub)
    for expected in range(30):
        while not receiver.messages:
            hub.run_once()
        assert client.llen(in_flight.key) <= 3
        message = receiver.messages.pop(0)
        assert message.payload == expected
        message.ack()
    while client.keys():
        hub.run_once()


def test_an_acknowledgement_wakes_the_loop_also_after_the_loop_was_reset(
    hub: Hub, put: Put, open_receiver: Receive, in_flight: InFlightMessages, client: redis.Redis
) -> None:
    # Celery resets it at each lost connection; after the first, acknowledgements waited for a timer.
    put("q", "text")
    hub.reset()
    receiver = open_receiver("q", in_flight=in_flight, prefetch=1)
    receiver.connection.register_with_event_loop(hub)
    while not receiver.messages:
        hub.run_once()
    began = time.monotonic()
    threading.Timer(0.2, receiver.messages[0].ack).start()
    while client.keys():
        hub.run_once()
    assert time.monotonic() - began < 0.7  # unwoken, it sleeps a second


def test_one_take_stops_at_a_megabyte(
    put: Put, open_receiver: Receive, in_flight: InFlightMessages, client: redis.Redis
) -> None:
    put("q", *("x" * 600_000 for _ in range(6)))
    receiver = open_receiver("q", in_flight=in_flight)
    receiver.connection.drain_events(timeout=5)
    assert client.llen(in_flight.key) == len(receiver.messages) == 2
    for message in receiver.take(6):
        message.ack()


def test_a_transport_without_an_incarnation_can_publish(url: str, open_receiver: Receive) -> None:
    with Connection(url, transport=OURS) as connection, connection.channel() as channel:
        connection.Producer(channel).publish("text", routing_key="q")
    [message] = open_receiver("q").take(1)
    message.ack()


@pytest.mark.parametrize("poison", [b"not json", b"{}", b"[]", b"\xff", b'{"properties": []}'])
def test_what_is_no_message_is_delivered_to_be_refused_and_consuming_goes_on(
    put: Put, open_receiver: Receive, in_flight: InFlightMessages, client: redis.Redis, poison: bytes
) -> None:
    put("q", "before")
    client.lpush("q", poison)
    put("q", "after")
    receiver = open_receiver("q", in_flight=in_flight)
    before, refused, after = receiver.take(3)
    assert [before.payload, after.payload] == ["before", "after"]
    assert refused.headers["task"] == keys.REFUSED_TASK
    assert refused.sutra_raw == poison
    for message in (before, refused, after):
        message.ack()
    receiver.drain_until(lambda: not client.keys())
