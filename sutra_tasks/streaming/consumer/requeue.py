"""Requeueing: items that this device does not answer go to other devices at once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import redis

from sutra_tasks.streaming.consumer.items import StreamItem, entry_ids, open_texts

if TYPE_CHECKING:
    from sutra_tasks.streaming.store import StreamStore

__all__ = ["requeue"]

logger = logging.getLogger(__name__)


def requeue(store: StreamStore, items: Sequence[StreamItem], *, failed: bool = False) -> None:
    """Requeue items; if the server is away, other devices claim them later.

    Args:
        store: with the streams.
        items: that this device has taken.
        failed: whether this device failed on them: it counts as a delivery.
    """
    for stream, deliveries in {(item.stream, item.deliveries) for item in items}:
        some = [item for item in items if (item.stream, item.deliveries) == (stream, deliveries)]
        texts = open_texts(some)
        try:
            if failed:  # the take of a text is counted already: only its lease has to end
                store.refresh(stream, [], texts, 0)
                texts = []
            store.requeue(stream, entry_ids(some), texts, deliveries + failed)
        except redis.RedisError as error:
            logger.warning("items that were not computed wait to be claimed: %s", error)
