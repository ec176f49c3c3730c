"""The clients' broker transport: kombu's for Redis, with connections of this package.

kombu reads few of the forms that an address may have, and makes a new ``redis.Redis`` for each command,
which costs as much time as the command. Here a channel connects to a
:class:`~sutra_tasks.server_address.ServerAddress` and keeps its one client. Everything else is kombu's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakSet

from kombu.transport import redis as stock

from sutra_tasks.connections import TIMEOUT_S, abandon, connection_pool, no_retries
from sutra_tasks.server_address import ServerAddress

if TYPE_CHECKING:
    import redis

__all__ = ["Channel", "Transport"]


class Channel(stock.Channel):  # type: ignore[misc]  # kombu is half typed
    """A channel to the server that its transport option ``address`` names, else the connection's URL.

    Attributes:
        all: the channels of this process.
    """

    all: ClassVar[WeakSet[Channel]] = WeakSet()
    from_transport_options = (*stock.Channel.from_transport_options, "address")
    address: ServerAddress | None = None
    keyprefix_fanout: str

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

    def _get_pool(self, asynchronous: bool = False) -> redis.ConnectionPool:
        address = self.address or ServerAddress.parse(self.connection.client.hostname)
        self.keyprefix_fanout = self.keyprefix_fanout.format(db=address.db)
        return connection_pool(
            address,
            timeout_s=self.socket_timeout or TIMEOUT_S,
            # redis-py would sleep before a retry, on the event loop; Celery reconnects and sends again.
            retry=no_retries(),
            health_check_s=self.health_check_interval,
            adapt=self._reporting if asynchronous else None,
        )

    def _reporting(self, kind: Any) -> Any:
        """Return a class of connections that tell this channel when they end, for kombu's poller."""
        channel = self

        class Connection(kind):  # type: ignore[misc]  # made at run time
            def disconnect(self, *args: Any, **options: Any) -> None:
                super().disconnect(*args, **options)
                if channel._registered:
                    channel._on_connection_disconnect(self)

        return Connection


class Transport(stock.Transport):  # type: ignore[misc]  # kombu is half typed
    """``broker_transport`` of clients; that of workers is in :mod:`sutra_tasks.broker.channel`."""

    Channel = Channel
    can_parse_url = True  # kombu leaves the URL to the channel
    supports_batch_publish = False

    def as_uri(self, uri: str, include_password: bool = False, mask: str = "**") -> str:  # noqa: ARG002
        """Return an address for people, or with its password for Flower, which connects by itself."""
        address = self.client.transport_options.get("address") or ServerAddress.parse(uri)
        return address.celery_url(with_password=True) if include_password else str(address)
