"""Messages on their way through a fleet, without kombu's connections: what is held, told and counted."""

from __future__ import annotations

import json
from itertools import count
from typing import TYPE_CHECKING, Any

from sutra_tasks import keys
from sutra_tasks.broker.in_flight import HeldMessages
from sutra_tasks.broker.queues import device_of, home, lane, lanes, new_incarnation
from sutra_tasks.broker.requeue import tokens_of, weight_of
from sutra_tasks.client.call import HEADER, Call
from sutra_tasks.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import redis

_tags = count()


def message(
    number: int, *, priority: int = 0, texts: int = 1, size: int = 0, routing_key: str = keys.EMBED_QUEUE
) -> bytes:
    """Return the message of a task called ``number``, as a client of this package sends it."""
    call = Call.of([["x" * size] * texts], {}, Settings())
    return json.dumps(
        {
            "body": "[]",
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


class Worker:
    """A worker process, as far as what it holds goes."""

    def __init__(self, client: redis.Redis, device: str | None = None) -> None:
        self.client, self.device = client, device
        self.incarnation = new_incarnation(device)
        self.held = HeldMessages(self.incarnation)
        self.queue = keys.EMBED_QUEUE if device is None else keys.device_queue(device)
        self.has: list[bytes] = []
        client.hset(keys.LEASES, self.incarnation, 1)

    def take(self, room: int = 1000) -> list[bytes]:
        """Tell what was noted, and take so many messages."""
        command = self.held.take_command(lanes(self.queue), room=room, most_bytes=1 << 30)
        answer: Any = self.client.execute_command(*command)  # type: ignore[no-untyped-call]
        self.held.told()
        taken: list[bytes] = answer[1::2]
        for raw in taken:
            payload = json.loads(raw)
            weight = weight_of(payload)
            tokens = weight or tokens_of(payload)
            self.held.delivered(raw, home(self.queue), tokens=tokens, weight=weight)
        self.has += taken
        return taken

    def tell(self) -> None:
        """Tell what was noted, and take nothing."""
        self.take(0)

    def finish(self, raw: bytes) -> None:
        """Note that one message is done with."""
        self.has.remove(raw)
        self.held.finish(raw)

    def forward(self, raw: bytes, device: str) -> None:
        """Note that one message goes to a device."""
        self.has.remove(raw)
        payload = json.loads(raw)
        self.held.forward(
            raw,
            keys.device_queue(device),
            payload["properties"]["priority"],
            load=keys.load(device),
            weight=weight_of(payload),
        )


def given(client: redis.Redis, device: str, messages: Sequence[bytes]) -> None:
    """Send messages and have a router pass them on to a device."""
    send(client, *messages)
    router = Worker(client)
    for raw in router.take():
        router.forward(raw, device)
    router.tell()
    client.hdel(keys.LEASES, router.incarnation)


def load(client: redis.Redis, device: str) -> dict[str, int]:
    """Return what is counted of a device, whose name may be an incarnation's."""
    counted: Any = client.hgetall(keys.load(device_of(device) or device))
    return {name.decode(): int(value) for name, value in counted.items()}
