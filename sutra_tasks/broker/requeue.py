"""Requeue messages whose worker is gone or stops: move them to the queue they are routed from."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from sutra_tasks import keys, lua
from sutra_tasks.broker.answered import answering_result, stored_successes
from sutra_tasks.broker.attempts import count_death
from sutra_tasks.broker.load import LOAD_CONSTANTS, load_key, weight_of
from sutra_tasks.broker.queues import device_of, lane, lanes, priority_of

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    import redis

__all__ = ["requeue", "requeue_device_queue", "requeue_in_flight"]

REQUEUE: Final = lua.script("broker/requeue", **LOAD_CONSTANTS)

MESSAGES_PER_CALL: Final = 100
"""Messages that one script moves; the server serves nobody else meanwhile."""

NOT_ROUTED: Final = (keys.CONTROL_QUEUE, keys.DISTILL_QUEUE)
"""Queues whose messages are requeued there. All others go to the router's, whatever device had them."""


@dataclass(frozen=True, slots=True, repr=False)
class _Requeued:
    """A message as it is requeued.

    Attributes:
        message: its bytes or text; empty: it has its answer, and is dropped.
        queue: the queue it was sent to, or the router's.
        priority: its priority.
        weight: tokens that it counts in the load of the device it leaves.
        result: key of the result whose success ends it; None if no result does.
    """

    message: str | bytes
    queue: str
    priority: int
    weight: int
    result: str | None


_PlannedMove = tuple[bytes, str, _Requeued]
"""A message as it stands in its list, the queue it goes to, and its requeued form."""


def requeue(
    client: redis.Redis, incarnation: str, raw: bytes, queue: str, *, failed: bool = False
) -> int:
    """Requeue one message that a worker has in flight; return how many moved, 1 or 0.

    Args:
        client: the server with the queues.
        incarnation: the worker.
        raw: the message, as it was taken.
        queue: where it goes.
        failed: whether this counts as an attempt.
    """
    found = _requeued(raw, died=failed)
    return _move(client, keys.in_flight(incarnation), load_key(incarnation), [(raw, queue, found)])


def requeue_in_flight(
    client: redis.Redis,
    incarnation: str,
    queue: str | None = None,
    *,
    queues: Mapping[bytes, str] = MappingProxyType({}),
    keep: Collection[bytes] = (),
    died: bool = False,
    results: redis.Redis | None = None,
) -> int:
    """Requeue what a worker has in flight; return how many messages moved.

    Args:
        client: the server with the queues.
        incarnation: a worker that is gone, or one whose unfinished messages are all in ``keep``.
        queue: where messages go; None: each to the queue that it was sent to.
        queues: where single messages go instead.
        keep: messages that stay in flight.
        died: the worker died, perhaps of one of these messages: each of them counts an attempt more, or
            only the suspect that it ran alone.
        results: the results server, if the worker is gone: messages that it had answered are dropped.
            None for a live worker, which acknowledges them itself.
    """
    source, device = keys.in_flight(incarnation), device_of(incarnation)
    suspect: Any = client.get(keys.suspect(incarnation)) if died else None
    suspect_id = suspect.decode() if suspect else ""
    # Newest first, which leaves the oldest next in line.
    messages: list[bytes] = client.lrange(source, 0, -1)  # type: ignore[assignment]  # nothing decodes
    moves = []
    for raw in messages:
        if raw not in keep:
            found = _requeued(raw, died=died and device is not None, suspect_id=suspect_id)
            moves.append((raw, queues.get(raw) or queue or found.queue, found))
    if results is not None:
        moves = _without_answered(results, moves)
    return _move(client, source, load_key(incarnation), moves)


def requeue_device_queue(client: redis.Redis, device_id: str) -> int:
    """Move what waits for a device, unchanged, to the router's queue; return how many messages moved."""
    moved = 0
    for source in lanes(keys.device_queue(device_id)):
        messages: list[bytes] = client.lrange(source, 0, -1)  # type: ignore[assignment]  # nothing decodes
        moves = [(raw, keys.EMBED_QUEUE, _requeued(raw, redelivered=False)) for raw in messages]
        moved += _move(client, source, keys.load(device_id), moves)
    return moved


def _requeued(
    raw: bytes, *, redelivered: bool = True, died: bool = False, suspect_id: str = ""
) -> _Requeued:
    """Return a message as it is requeued; bytes that are no message stay as they are, to be refused.

    Args:
        raw: the message as it stands in a list.
        redelivered: mark it as redelivered; False for one that no worker has taken.
        died: the worker that had it died.
        suspect_id: the task that the worker ran alone when it died; only this one is to blame then.
    """
    try:
        message: dict[str, Any] = json.loads(raw)
        properties = message["properties"]
        properties["delivery_info"]["redelivered"] = True
        headers = message["headers"] = {**(message.get("headers") or {}), "redelivered": True}
        weight = weight_of(message)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return _Requeued(raw, keys.EMBED_QUEUE, 0, 0, None)
    if died and suspect_id in ("", headers.get("id")):
        count_death(headers, alone=suspect_id != "")
    sent_to = properties["delivery_info"].get("routing_key")
    return _Requeued(
        message=json.dumps(message) if redelivered else raw,
        queue=sent_to if sent_to in NOT_ROUTED else keys.EMBED_QUEUE,
        priority=priority_of(properties),
        weight=weight,
        result=answering_result(headers),
    )


def _without_answered(results: redis.Redis, moves: Sequence[_PlannedMove]) -> list[_PlannedMove]:
    """Return the same moves, but with nothing to send for each message that has its answer."""
    names = [one.result for _, _, one in moves if one.result is not None]
    answered = stored_successes(results, names)
    return [
        (raw, queue, replace(one, message="") if one.result in answered else one)
        for raw, queue, one in moves
    ]


def _move(client: redis.Redis, source: str, load: str, moves: Sequence[_PlannedMove]) -> int:
    """Move messages from a list to the queues beside them; return how many moved."""
    moved = 0
    for at in range(0, len(moves), MESSAGES_PER_CALL):
        found = moves[at : at + MESSAGES_PER_CALL]
        moved += REQUEUE(
            client,
            source=source,
            load=load,
            targets=[lane(queue, one.priority) for _, queue, one in found],
            messages=[raw for raw, _, _ in found],
            requeued=[one.message for _, _, one in found],
            weights=[one.weight for _, _, one in found],
        )
    return moved
