"""The load of a device: what one message adds to it, and the key that it is counted in.

``load.lua`` keeps the account, in the scripts that move messages to a device and away from it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sutra_tasks import keys
from sutra_tasks.broker.queues import NO_DEVICE, device_of
from sutra_tasks.client.call import HEADER, demand_of, estimated_tokens
from sutra_tasks.errors import SutraError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["LOAD_CONSTANTS", "MOST_CREDIT", "load_key", "tokens_of", "weight_of"]

MOST_CREDIT: Final = 1024
"""Tokens of credit one message uses at most: a list of 10,000 texts must not keep a single one out."""

LOAD_CONSTANTS: Final = {"MOST_CREDIT": MOST_CREDIT, "LOAD_TTL_S": keys.FORGET_AFTER_S}
"""Constants of every script that includes ``load.lua``."""


def tokens_of(payload: Mapping[str, Any]) -> int:
    """Return the estimated tokens of a message, given its JSON as it stands in a queue."""
    body, headers = payload.get("body"), payload.get("headers")
    size = len(body) if isinstance(body, str) else 0
    try:
        return demand_of(headers.get(HEADER) if isinstance(headers, dict) else None, size).tokens
    except SutraError:
        return estimated_tokens(1, size)


def weight_of(payload: Any) -> int:
    """Return the tokens that a message adds to its device's load: 0 if no router forwarded it there.

    Depends on nothing but the message, so whoever adds it and whoever removes it agree.
    """
    try:
        routing_key = (payload["properties"].get("delivery_info") or {}).get("routing_key") or ""
    except (TypeError, KeyError, AttributeError):
        return 0  # routers forward no such message
    return 0 if str(routing_key).startswith(keys.DEVICE_QUEUE_PREFIX) else tokens_of(payload)


def load_key(incarnation: str) -> str:
    """Return the key of the load of a worker's device; a router has none, and its key stays unused."""
    return keys.load(device_of(incarnation) or NO_DEVICE)
