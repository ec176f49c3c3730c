"""kombu's Redis transport with one client object a channel, where it makes one for each command.

Making one costs as much as the command itself. The connections are kombu's, and so is everything else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kombu.transport import redis as stock

if TYPE_CHECKING:
    import redis

__all__ = ["Channel", "Transport"]


class Channel(stock.Channel):  # type: ignore[misc]  # kombu is half typed
    """A channel that remembers its client."""

    @property
    def commands(self) -> redis.Redis:
        """The client for everything but a blocking take."""
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
    """``broker_transport`` of clients; workers have one of their own, that takes atomically."""

    Channel = Channel
