"""The one maker of connections to the servers with the queues and with the results.

Every connection is made from a :class:`~sutra_tasks.server_address.ServerAddress` and has the same
options: timeouts for connecting and for each answer, TCP keepalive, and retries with a growing pause.
One on an event loop retries nothing, because redis-py sleeps between two tries. One to a primary that
was demoted is dropped, because the next one may reach the server that took over.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any, Final

import redis
import redis.asyncio
import redis.asyncio.sentinel
import redis.sentinel
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ExponentialWithJitterBackoff, NoBackoff
from redis.retry import Retry

from sutra_tasks.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sutra_tasks.server_address import ServerAddress
    from sutra_tasks.settings import Settings

__all__ = [
    "TIMEOUT_S",
    "DemotedError",
    "abandon",
    "async_broker_client",
    "broker_client",
    "client_of",
    "connection_pool",
    "no_retries",
    "pool_client",
    "results_client",
    "socket_options",
]

TIMEOUT_S: Final = 30.0
"""Seconds without an answer, for transports and result backends whose options do not say them."""
RETRIES: Final = 10
FIRST_PAUSE_S: Final = 0.01
LONGEST_PAUSE_S: Final = 1.0
SENTINEL_TIMEOUT_S: Final = 2.0
"""Seconds for which one Sentinel is asked for the primary before the next one is."""

_FILES: Final = ("ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile")


def socket_options(timeout_s: float) -> dict[str, Any]:
    """Return the options of a TCP connection, by redis-py's names.

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

    Raises:
        SettingsError: there is no address, or a file that it names cannot be read.
    """
    return _client(options.broker_address, options, timeout_s, retries=retries)


def results_client(
    options: Settings, *, timeout_s: float | None = None, retries: bool = True
) -> redis.Redis:
    """Return a client of the server with the results; otherwise as :func:`broker_client`."""
    return _client(options.results_address, options, timeout_s, retries=retries)


def client_of(address: ServerAddress, timeout_s: float) -> redis.Redis:
    """Return a client of any server that retries nothing; the address may say another timeout."""
    pool = connection_pool(address, timeout_s=timeout_s, retry=no_retries())
    return redis.Redis.from_pool(pool)


def _client(
    address: ServerAddress, options: Settings, timeout_s: float | None, *, retries: bool
) -> redis.Redis:
    pool = connection_pool(
        address,
        timeout_s=options.socket_timeout_s,
        at_most_s=timeout_s,
        retry=Retry(_backoff(), RETRIES) if retries else no_retries(),
    )
    return redis.Redis.from_pool(pool)


def pool_client(pool: redis.ConnectionPool) -> redis.Redis:
    """Return a client of a pool that somebody else made, with its options."""
    return redis.Redis(connection_pool=pool)


def async_broker_client(options: Settings) -> redis.asyncio.Redis:
    """Return an asyncio client of the server with the queues; its retries do not block the loop.

    Raises:
        SettingsError: there is no address, or a file that it names cannot be read.
    """
    address = options.broker_address
    given = _options(address, options.socket_timeout_s, None, AsyncRetry(_backoff(), RETRIES))
    kind = _ASYNC_KINDS[_kind(address)]
    if not address.primary:
        pool = redis.asyncio.ConnectionPool(connection_class=kind, **given)
        return redis.asyncio.Redis.from_pool(pool)
    sentinels = redis.asyncio.sentinel.Sentinel(  # type: ignore[no-untyped-call]
        address.hosts, sentinel_kwargs=_sentinel_options(address, AsyncRetry(NoBackoff(), 0))
    )
    by_name = _AsyncSentinelPool(  # type: ignore[no-untyped-call]
        address.primary, sentinels, connection_class=kind, **given
    )
    return redis.asyncio.Redis.from_pool(by_name)


def connection_pool(
    address: ServerAddress,
    *,
    timeout_s: float,
    at_most_s: float | None = None,
    retry: Retry,
    health_check_s: int = 0,
    adapt: Callable[[Any], Any] | None = None,
) -> redis.ConnectionPool:
    """Return a pool of connections to a server.

    Args:
        address: of the server.
        timeout_s: seconds to wait for a connection, and for each answer, unless the address says.
        at_most_s: a timeout that the address does not override.
        retry: what a connection does when it fails.
        health_check_s: seconds after which an idle connection is checked, unless the address says.
        adapt: makes the class of the pool's connections from the usual one.

    Raises:
        SettingsError: a file that the address names cannot be read.
    """
    kind = _KINDS[_kind(address)]
    if adapt is not None:
        kind = adapt(kind)
    given = {
        "health_check_interval": health_check_s,
        **_options(address, timeout_s, at_most_s, retry),
    }
    if not address.primary:
        return redis.ConnectionPool(connection_class=kind, **given)
    sentinels = redis.sentinel.Sentinel(  # type: ignore[no-untyped-call]
        address.hosts, sentinel_kwargs=_sentinel_options(address, no_retries())
    )
    return _SentinelPool(  # type: ignore[no-untyped-call]
        address.primary, sentinels, connection_class=kind, **given
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
    for sentinel in getattr(getattr(pool, "sentinel_manager", None), "sentinels", ()):
        abandon(sentinel.connection_pool)
    for sentinel in pool.sentinel_manager.sentinels if hasattr(pool, "sentinel_manager") else ():
        abandon(sentinel.connection_pool)


def _options(
    address: ServerAddress, timeout_s: float, at_most_s: float | None, retry: Any
) -> dict[str, Any]:
    given = {
        **socket_options(timeout_s),
        **address.options,
        **({} if at_most_s is None else socket_options(at_most_s)),
        **_tls(address),
        "db": address.db,
        "username": address.user,
        "password": address.password,
        "retry": retry,
    }
    if address.path:
        del given["socket_keepalive"]
        given["path"] = address.path
    elif not address.primary:
        given["host"], given["port"] = address.hosts[0]
    return given


def _sentinel_options(address: ServerAddress, retry: Any) -> dict[str, Any]:
    return {
        **socket_options(SENTINEL_TIMEOUT_S),
        **_tls(address),
        "ssl": address.tls is not None,
        "username": address.sentinel_user,
        "password": address.sentinel_password,
        "retry": retry,
    }


def _tls(address: ServerAddress) -> dict[str, Any]:
    given = dict(address.tls or {})
    for name in _FILES:
        # What OpenSSL raises does not name the file.
        if name in given and not os.access(given[name], os.R_OK):
            raise SettingsError(
                address.variable, str(address), f"option {name}: {given[name]} cannot be read"
            )
    return given


def _kind(address: ServerAddress) -> str:
    if address.path:
        return "unix"
    tls = "tls" if address.tls is not None else "tcp"
    return f"sentinel {tls}" if address.primary else tls


def _backoff() -> ExponentialWithJitterBackoff:
    return ExponentialWithJitterBackoff(base=FIRST_PAUSE_S, cap=LONGEST_PAUSE_S)


class DemotedError(redis.ConnectionError):
    """The server of this connection is a replica now, in its own words; the connection is dropped."""


class _LeavesDemoted:
    """A connection that ends when its server turns out to be a replica."""

    def read_response(self, *args: Any, **options: Any) -> Any:
        try:
            return super().read_response(*args, **options)  # type: ignore[misc]  # a mixin
        except redis.ReadOnlyError as error:
            self.disconnect()  # type: ignore[attr-defined]
            raise DemotedError(str(error)) from None


class _AsyncLeavesDemoted:
    """The same on an event loop."""

    async def read_response(self, *args: Any, **options: Any) -> Any:
        try:
            return await super().read_response(*args, **options)  # type: ignore[misc]  # a mixin
        except redis.ReadOnlyError as error:
            await self.disconnect()  # type: ignore[attr-defined]
            raise DemotedError(str(error)) from None


class _SentinelPool(redis.sentinel.SentinelConnectionPool):
    """A pool that closes the connections to the Sentinels with its own."""

    def disconnect(self, *args: Any, **options: Any) -> None:
        super().disconnect(*args, **options)
        for one in self.sentinel_manager.sentinels:
            one.close()


class _AsyncSentinelPool(redis.asyncio.sentinel.SentinelConnectionPool):
    """The same on an event loop."""

    async def disconnect(self, *args: Any, **options: Any) -> None:
        await super().disconnect(*args, **options)
        for one in self.sentinel_manager.sentinels:
            await one.aclose()


def _kinds(mixin: type, library: Any) -> dict[str, Any]:
    kinds = {
        "tcp": library.Connection,
        "tls": library.SSLConnection,
        "unix": library.UnixDomainSocketConnection,
        "sentinel tcp": library.sentinel.SentinelManagedConnection,
        "sentinel tls": library.sentinel.SentinelManagedSSLConnection,
    }
    return {name: type(kind.__name__, (mixin, kind), {}) for name, kind in kinds.items()}


_KINDS: Final = _kinds(_LeavesDemoted, redis)
_ASYNC_KINDS: Final = _kinds(_AsyncLeavesDemoted, redis.asyncio)
