"""The one maker of clients of the servers with the queues and with the results.

Every client has the same options: timeouts for connecting and for each answer, TCP keepalive, and
retries with a growing pause. A client that is used on an event loop retries nothing, because redis-py
sleeps between two tries.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Final

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ExponentialWithJitterBackoff, NoBackoff
from redis.retry import Retry

if TYPE_CHECKING:
    from sutra_tasks.settings import Settings

__all__ = [
    "abandon",
    "async_broker_client",
    "broker_client",
    "no_retries",
    "pool_client",
    "results_client",
    "socket_options",
]

RETRIES: Final = 10
FIRST_PAUSE_S: Final = 0.01
LONGEST_PAUSE_S: Final = 1.0


def socket_options(timeout_s: float) -> dict[str, Any]:
    """Return the options of a connection, by redis-py's names; kombu and Celery take them as well.

    Args:
        timeout_s: seconds to wait for a connection, and for each answer.
    """
    return {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "socket_keepalive": True,
    }


def no_retries() -> Retry:
    """Return the policy of connections on an event loop: fail at once, for a retry would sleep there."""
    return Retry(NoBackoff(), 0)


def broker_client(
    options: Settings, *, timeout_s: float | None = None, retries: bool = True
) -> redis.Redis:
    """Return a client of the server with the queues; its answers are bytes.

    Args:
        options: with the address and the usual timeout.
        timeout_s: another timeout.
        retries: whether a command is repeated when the connection fails; False on an event loop.
    """
    return _client(options.broker_url, timeout_s or options.socket_timeout_s, retries=retries)


def results_client(
    options: Settings, *, timeout_s: float | None = None, retries: bool = True
) -> redis.Redis:
    """Return a client of the server with the results; otherwise as :func:`broker_client`."""
    return _client(options.results, timeout_s or options.socket_timeout_s, retries=retries)


def pool_client(pool: redis.ConnectionPool) -> redis.Redis:
    """Return a client of a pool that somebody else made, with its options."""
    return redis.Redis(connection_pool=pool)


def async_broker_client(options: Settings) -> redis.asyncio.Redis:
    """Return an asyncio client of the server with the queues; its retries do not block the loop."""
    return redis.asyncio.Redis.from_url(
        options.broker_url or "",
        **socket_options(options.socket_timeout_s),
        retry=AsyncRetry(_backoff(), RETRIES),
    )


def abandon(pool: Any) -> None:
    """Close, in a forked child, the sockets of a pool of its parent's connections.

    redis-py would do so when the child uses the pool, but it waits for the pool's lock, which a thread
    of the parent may have held. The parent's connections live on: only this process's descriptors close.

    Args:
        pool: redis-py's.
    """
    pool._lock = pool._fork_lock = threading.RLock()  # noqa: SLF001 - redis-py renews neither
    for name in ("_available_connections", "_in_use_connections"):
        for connection in list(getattr(pool, name, ())):
            connection.disconnect()
    pool.reset()


def _client(url: str | None, timeout_s: float, *, retries: bool) -> redis.Redis:
    return redis.Redis.from_url(
        url or "",
        **socket_options(timeout_s),
        retry=Retry(_backoff(), RETRIES) if retries else no_retries(),
    )


def _backoff() -> ExponentialWithJitterBackoff:
    return ExponentialWithJitterBackoff(base=FIRST_PAUSE_S, cap=LONGEST_PAUSE_S)
