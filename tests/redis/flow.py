"""Messages on their way through a fleet, without kombu's connections."""

from __future__ import annotations

import json
from collections import Counter
from itertools import count
from typing import TYPE_CHECKING, Any

import redis
from redis.exceptions import NoScriptError

from sutra_tasks import keys
from sutra_tasks.broker.in_flight import InFlightMessages
from sutra_tasks.broker.load import tokens_of, weight_of
from sutra_tasks.broker.queues import device_of, lane, lanes, new_incarnation, requeue_target
from sutra_tasks.client.call import HEADER, Call
from sutra_tasks.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_tags = count()


def message(
    number: int, *, priority: int = 0, texts: int = 1, size: int = 0, routing_key: str = keys.EMBED_QUEUE
) -> bytes:
    """Return the message of a task called ``number``, as a client of this package sends it."""
    call = Call.of([["x" * size] * texts], {}, Settings())
    return json.dumps(
        {
            "body": "[[], {}, {}]",
            "content-type": "application/json",
            "content-encoding": "utf-8",
            "headers": {
                "id": str(number),
                "task": keys.EMBED_TASK,
                HEADER: call.header(sent_at=0.0, strategy=None),
            },
            "properties": {
                "delivery_tag": str(next(_tags)),
                "priority": priority,
                "delivery_info": {"exchange": "", "routing_key": routing_key},
            },
        }
    ).encode()


def send(client: redis.Redis, *messages: bytes, queue: str = keys.EMBED_QUEUE) -> None:
    """Put messages at the end of a queue's lanes."""
    for raw in messages:
        client.lpush(lane(queue, json.loads(raw)["properties"]["priority"]), raw)


def numbers(messages: Iterable[bytes]) -> list[int]:
    """Return which tasks these are the messages of."""
    return [int(json.loads(raw)["headers"]["id"]) for raw in messages]


def take(
    client: redis.Redis,
    in_flight: InFlightMessages,
    sources: Sequence[str] = (),
    *,
    most_messages: int = 0,
    most_bytes: int = 1 << 20,
) -> list[tuple[bytes, bytes]]:
    """Send what is pending and take from lists, as the channel does; return lists and messages."""
    for with_text in (False, True):
        command = in_flight.take_command(
            sources, most_messages=most_messages, most_bytes=most_bytes, with_text=with_text
        )
        try:
            answer: Any = client.execute_command(*command)  # type: ignore[no-untyped-call]
        except redis.RedisError as error:
            in_flight.take_lost()
            if isinstance(error, NoScriptError) and not with_text:
                continue
            raise
        in_flight.take_answered()
        return list(zip(answer[::2], answer[1::2], strict=True))
    raise AssertionError


class Worker:
    """A worker process, as far as its messages in flight go."""

    def __init__(self, client: redis.Redis, device: str | None = None) -> None:
        self.client, self.device = client, device
        self.incarnation = new_incarnation(device)
        self.in_flight = InFlightMessages(self.incarnation)
        self.queue = keys.EMBED_QUEUE if device is None else keys.device_queue(device)
        self.has: list[bytes] = []
        client.hset(keys.leases(), self.incarnation, 1)

    def take(self, most_messages: int = 1000) -> list[bytes]:
        """Send what is pending, and take so many messages."""
        found = take(
            self.client,
            self.in_flight,
            lanes(self.queue),
            most_messages=most_messages,
            most_bytes=1 << 30,
        )
        taken = [raw for _, raw in found]
        for raw in taken:
            payload = json.loads(raw)
            weight = weight_of(payload)
            tokens = weight or tokens_of(payload)
            self.in_flight.delivered(raw, requeue_target(self.queue), tokens=tokens, weight=weight)
        self.has += taken
        return taken

    def send_pending(self) -> None:
        """Send what is pending, and take nothing."""
        self.take(0)

    def acknowledge(self, raw: bytes) -> None:
        """Note that one message is done."""
        self.has.remove(raw)
        self.in_flight.acknowledge(raw)

    def forward(self, raw: bytes, device: str) -> None:
        """Note that one message goes to a device."""
        self.has.remove(raw)
        payload = json.loads(raw)
        self.in_flight.forward(raw, device, payload["properties"]["priority"], weight=weight_of(payload))


def given(client: redis.Redis, device: str, messages: Sequence[bytes]) -> None:
    """Send messages and have a router pass them on to a device."""
    send(client, *messages)
    router = Worker(client)
    for raw in router.take():
        router.forward(raw, device)
    router.send_pending()
    client.hdel(keys.leases(), router.incarnation)


def load(client: redis.Redis, device: str) -> dict[str, int]:
    """Return what is counted of a device, whose name may be an incarnation's."""
    counts: Any = client.hgetall(keys.load(device_of(device) or device))
    return {name.decode(): int(value) for name, value in counts.items()}


NOTHING = {"messages": 0, "credit": 0, "tokens": 0}


def what_is_left(counts: dict[bytes, bytes]) -> dict[str, int]:
    """Return what a device has not finished, given its load as the server has it."""
    found = Counter({name.decode(): int(value) for name, value in counts.items()})
    return {
        "messages": found["messages"],
        "credit": found["credit"],
        "tokens": found["tokens_dispatched"] - found["tokens_completed"],
    }


def counted(client: redis.Redis, device: str) -> dict[str, int]:
    """Return what a device has not finished, as the server has counted it."""
    counts: Any = client.hgetall(keys.load(device))
    return what_is_left(counts)
