"""The way back: messages whose worker is gone, or stops, return to the queue they are routed from.

A message moves in one step, with what it weighs in its device's load, so any number of callers, or one
killed half-way, lose and double nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from celery.utils.log import get_logger

from sutra_tasks import keys, lua
from sutra_tasks.broker.queues import MOST_CREDIT, NO_DEVICE, device_of, home, lane, lanes
from sutra_tasks.client.call import HEADER, demand_of, estimated_tokens
from sutra_tasks.errors import SutraError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    import redis

__all__ = [
    "ATTEMPTS",
    "SUSPECT_AFTER",
    "attempts_of",
    "give_back",
    "give_back_all",
    "give_back_queue",
    "load_of",
    "tokens_of",
    "weight_of",
]

logger = get_logger(__name__)

ATTEMPTS: Final = "sutra_attempts"
"""A message's header: how many workers have died of it."""

NEAR: Final = "sutra_near"
"""A message's header: how many workers have died near it since it became suspect."""

SUSPECT_AFTER: Final = 2
"""Attempts after which a message runs alone, so that the next death is blamed on nobody else, and counts
only for the one that did run."""

UNROUTED: Final = (keys.CONTROL_QUEUE, keys.DISTILL_QUEUE)
"""Queues whose messages go back there; all others are the router's, whatever device they were with."""

MOST_NEAR: Final = 8
"""So many deaths near a suspect count as one of it: it may end workers before it can be run alone."""

REQUEUE: Final = lua.script("broker/requeue", MOST_CREDIT=MOST_CREDIT, LOAD_TTL_S=keys.FORGET_AFTER_S)

AT_ONCE: Final = 100
"""Messages returned by one command: the server serves nobody else meanwhile."""


def tokens_of(payload: Mapping[str, Any]) -> int:
    """Return the estimated tokens of a message, as it stands in its list."""
    size = len(payload.get("body") or "")
    try:
        return demand_of((payload.get("headers") or {}).get(HEADER), size).tokens
    except SutraError:
        return estimated_tokens(1, size)


def weight_of(payload: Mapping[str, Any]) -> int:
    """Return the tokens a message adds to its device's load: 0 if it comes there past the router.

    A function of what the message itself says, so whoever adds it and whoever takes it off agree.
    """
    routed_by = payload["properties"]["delivery_info"].get("routing_key") or ""
    return 0 if routed_by.startswith(keys.DEVICE_QUEUE_PREFIX) else tokens_of(payload)


@dataclass(frozen=True, slots=True)
class _Going:
    """A message on its way back: where to, in which form, and what it weighs."""

    priority: int
    message: str | bytes
    weight: int
    queue: str


def attempts_of(headers: Mapping[str, Any] | None) -> int:
    """Return how many workers have died of a message, as far as is known."""
    return _count(headers, ATTEMPTS)


def _count(headers: Mapping[str, Any] | None, name: str) -> int:
    found = (headers or {}).get(name)
    return found if type(found) is int and found > 0 else 0


def _blame(headers: dict[str, Any], *, alone: bool) -> None:
    """Count a death for a message: it ran ``alone`` when its worker died, or was one of several."""
    attempts = attempts_of(headers)
    near = 0 if alone or attempts < SUSPECT_AFTER else _count(headers, NEAR) + 1
    if near in (0, MOST_NEAR):
        headers[ATTEMPTS] = attempts + 1
        headers.pop(NEAR, None)
    else:
        headers[NEAR] = near


def _returned(
    raw: bytes, *, redelivered: bool = True, died: bool = False, suspect: str = ""
) -> _Going | None:
    """Return the form in which a message goes back.

    None for bytes that are no Celery message: nobody could ever deliver them.

    Args:
        raw: the message as it stands in a list.
        redelivered: mark it as redelivered; False for one that no worker has taken.
        died: the worker that had it died.
        suspect: the task that worker ran alone when it died; the others are not to blame then.
    """
    try:
        message: dict[str, Any] = json.loads(raw)
        properties = message["properties"]
        properties["delivery_info"]["redelivered"] = True
        headers = message["headers"] = {**(message.get("headers") or {}), "redelivered": True}
        weight = weight_of(message)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    if died and suspect in ("", headers.get("id")):
        _blame(headers, alone=suspect != "")
    try:
        priority = int(properties.get("priority") or 0)
    except (TypeError, ValueError):
        priority = 0
    sent_to = properties["delivery_info"].get("routing_key")
    queue = sent_to if sent_to in UNROUTED else keys.EMBED_QUEUE
    return _Going(priority, json.dumps(message) if redelivered else raw, weight, queue)


def _return(
    client: redis.Redis, source: str, load: str, messages: Sequence[tuple[bytes, str, _Going | None]]
) -> int:
    """Move messages from the list ``source`` to the queues named beside them; return how many moved."""
    moved = 0
    for at in range(0, len(messages), AT_ONCE):
        going_back: list[tuple[bytes, str, _Going]] = []
        for raw, queue, going in messages[at : at + AT_ONCE]:
            if going is None:
                logger.error("dropped %d bytes that are no message", len(raw))
                client.lrem(source, 1, raw)  # type: ignore[arg-type]  # bytes are fine
            else:
                going_back.append((raw, lane(queue, going.priority), going))
        if going_back:
            moved += REQUEUE(
                client,
                source=source,
                load=load,
                targets=[target for _, target, _ in going_back],
                messages=[raw for raw, _, _ in going_back],
                requeued=[going.message for _, _, going in going_back],
                weights=[going.weight for _, _, going in going_back],
            )
    return moved


def give_back(
    client: redis.Redis, incarnation: str, raw: bytes, queue: str, *, failed: bool = False
) -> int:
    """Return one message that ``incarnation`` holds; ``failed`` counts it as an attempt."""
    going = _returned(raw, died=failed)
    return _return(client, keys.held(incarnation), load_of(incarnation), [(raw, queue, going)])


def give_back_all(
    client: redis.Redis,
    incarnation: str,
    queue: str | None = None,
    *,
    own: Mapping[bytes, str] = MappingProxyType({}),
    but: Collection[bytes] = (),
    died: bool = False,
) -> int:
    """Return what ``incarnation`` holds to its queues, and say how many messages that were.

    Each message moves in one step, so two callers, or one killed half-way, lose and double nothing.

    Args:
        client: the server.
        incarnation: a process that is gone, or whose ``but`` names what it still works on.
        queue: where its messages belong; None: each where it was sent.
        own: messages that belong elsewhere.
        but: messages that stay held.
        died: the process died, of one of these messages perhaps: each counts an attempt more, or only
            the one that it ran alone.
    """
    held, device = keys.held(incarnation), device_of(incarnation)
    suspect: Any = client.get(keys.suspect(incarnation)) if died else None
    name = suspect.decode() if suspect else ""
    # The newest is at the head: giving it back first leaves the oldest next in line.
    messages: list[bytes] = client.lrange(held, 0, -1)  # type: ignore[assignment]  # nothing decodes
    going = []
    for raw in messages:
        if raw not in but:
            found = _returned(raw, died=died and device is not None, suspect=name)
            sent_to = found.queue if found is not None else keys.EMBED_QUEUE
            going.append((raw, own.get(raw) or queue or sent_to, found))
    return _return(client, held, load_of(incarnation), going)


def give_back_queue(client: redis.Redis, device_id: str) -> int:
    """Return what waits for a device to the router's queue, as it came; say how many that were."""
    moved, queue = 0, keys.device_queue(device_id)
    for source in lanes(queue):
        messages: list[bytes] = client.lrange(source, 0, -1)  # type: ignore[assignment]  # nothing decodes
        going = [(raw, home(queue), _returned(raw, redelivered=False)) for raw in messages]
        moved += _return(client, source, keys.load(device_id), going)
    return moved


def load_of(incarnation: str) -> str:
    """Return the key of the load of its device; a router has none, and its key is only named."""
    return keys.load(device_of(incarnation) or NO_DEVICE)
