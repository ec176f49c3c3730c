"""A broker and a results server for tests of long texts, and the documents on them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import redis
from celery import Celery

from sutra_tasks import keys
from tests.conftest import disconnect
from tests.redis.fanout.parts import (
    documents_on,
)

if TYPE_CHECKING:
    from sutra_tasks.fanout.documents import Documents


@pytest.fixture
def results_url(url: str) -> str:
    """The results server: another database of the same server."""
    return url.removesuffix("/0") + "/1"


@pytest.fixture
def results(results_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(results_url) as client:
        client.flushdb()
        yield client
        lasting = {name.decode() for name in client.scan_iter() if client.ttl(name) == -1}
        client.flushdb()
        assert lasting <= {keys.documents()}


@pytest.fixture(autouse=True)
def _swept(_nothing_is_left_behind: None, client: redis.Redis) -> Iterator[None]:
    """Empty the broker: these tests leave messages in queues."""
    yield
    client.flushdb()


@pytest.fixture
def documents(client: redis.Redis, results: redis.Redis) -> Documents:
    return documents_on(client, results)


@pytest.fixture
def caller(results_url: str) -> Iterator[Celery]:
    app = Celery("caller", backend=results_url, set_as_current=False)
    yield app
    disconnect(app.backend)
    app.close()
