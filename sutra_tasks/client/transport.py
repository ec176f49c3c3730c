"""The clients' broker transport: kombu's for Redis, with one client object for each channel.

kombu's channel makes a new ``redis.Redis`` for each command, which costs as much time as the command.
Here a channel keeps the one that it made. Connections, their pool and everything else are kombu's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakSet

from kombu.transport import redis as stock

from sutra_tasks.connections import abandon

if TYPE_CHECKING:
    import redis

__all__ = ["Channel", "Transport"]


class Channel(stock.Channel):  # type: ignore[misc]  # kombu is half typed
    """A channel that keeps the client of its commands.

    Attributes:
        all: the channels of this process.
    """

    all: ClassVar[WeakSet[Channel]] = WeakSet()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.all.add(self)
        super().__init__(*args, **kwargs)

    def abandon(self) -> None:
        """Close, in a forked child, the connections of the parent."""
        for inherited in filter(None, (self._pool, self._async_pool)):
            abandon(inherited)

    @property
    def commands(self) -> redis.Redis:
        """The client of all commands except the blocking take of a consumer."""
        client: redis.Redis | None = self.__dict__.get("_commands")
        if client is None:
            client = self.__dict__["_commands"] = super()._create_client()
        return client

    def _create_client(self, asynchronous: bool = False) -> redis.Redis:
        if asynchronous:
            client: redis.Redis = super()._create_client(asynchronous=True)
            return client
        return self.commands

    def _disconnect_pools(self) -> None:
        self.__dict__.pop("_commands", None)
        super()._disconnect_pools()


class Transport(stock.Transport):  # type: ignore[misc]  # kombu is half typed
    """``broker_transport`` of clients; that of workers is in :mod:`sutra_tasks.broker.channel`."""

    Channel = Channel
