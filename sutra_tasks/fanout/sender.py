"""Sending the parts of a document, and its body, to queues."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from sutra_tasks import keys, lua
from sutra_tasks.broker.load import LOAD_CONSTANTS
from sutra_tasks.broker.queues import NO_DEVICE, lane, priority_of
from sutra_tasks.fanout.messages import BODY_DEMAND, part_demand, part_message

if TYPE_CHECKING:
    import redis

__all__ = ["PARTS_AT_ONCE", "PartSizes", "Sender"]

PartSizes = Sequence[Sequence[int]]
"""For each part of a document its rows and their tokens."""

PARTS_AT_ONCE: Final = 100
"""Messages in one command: the server serves nobody else meanwhile."""

SEND: Final = lua.script("fanout/send", **LOAD_CONSTANTS)


class Sender:
    """Sends the messages of documents; safe to use from many threads."""

    def __init__(self, client: redis.Redis, device_id: str | None) -> None:
        """Use a server.

        Args:
            client: of the server with the queues.
            device_id: the device of this process, which then combines what it completes.
        """
        self.client, self._device_id = client, device_id

    def send_parts(
        self, body: str | bytes, sizes: PartSizes, parts: Sequence[tuple[int, str | None]]
    ) -> None:
        """Send parts of a document.

        Args:
            body: the message of the body, from which those of the parts are made.
            sizes: of all parts.
            parts: the number of each part to send, and its device; None: the router chooses it.
        """
        template = json.loads(body)
        priority = priority_of(template["properties"])
        for start in range(0, len(parts), PARTS_AT_ONCE):
            some = parts[start : start + PARTS_AT_ONCE]
            messages, weights = [], []
            for index, device in some:
                rows, tokens = sizes[index]
                messages.append(part_message(template, index, len(sizes), rows, tokens))
                weights.append(0 if device is None else part_demand(rows, tokens).tokens)
            SEND(
                self.client,
                queues=[_queue(device, priority) for _, device in some],
                loads=[keys.load(device or NO_DEVICE) for _, device in some],
                push="LPUSH",
                messages=messages,
                weights=weights,
            )

    def send_body(self, body: str | bytes) -> None:
        """Send a document's body to be taken next, by this device if this process has one."""
        device = self._device_id
        SEND(
            self.client,
            queues=[_queue(device, priority_of(json.loads(body)["properties"]))],
            loads=[keys.load(device or NO_DEVICE)],
            push="RPUSH",
            messages=[body],
            weights=[0 if device is None else BODY_DEMAND.tokens],
        )


def _queue(device: str | None, priority: int) -> str:
    return lane(keys.EMBED_QUEUE if device is None else keys.device_queue(device), priority)
