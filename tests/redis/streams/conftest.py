"""Two devices, and a stream that is swept after each test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from sutra_tasks import keys
from tests.redis.streams.peers import DEAD, IN, OUT, Device, S

if TYPE_CHECKING:
    import redis


@pytest.fixture(autouse=True)
def _swept(_nothing_is_left_behind: None, client: redis.Redis) -> Iterator[None]:
    """Only entries, responses and dead letters last: nothing else of any text is left by any test."""
    client.sadd(keys.streams(), S)
    yield
    client.delete(keys.streams(), IN, OUT, DEAD)


@pytest.fixture
def a(client: redis.Redis) -> Device:
    return Device(client, "a")


@pytest.fixture
def b(client: redis.Redis) -> Device:
    return Device(client, "b")
