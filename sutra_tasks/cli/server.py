"""The server that commands look at."""

from __future__ import annotations

from typing import TYPE_CHECKING

import redis

from sutra_tasks.errors import BrokerNotConfiguredError, SutraError

if TYPE_CHECKING:
    from sutra_tasks.settings import Settings

__all__ = ["connected"]


def connected(options: Settings) -> redis.Redis:
    """Return a client of the broker's server, which answers.

    Raises:
        BrokerNotConfiguredError: no server is named.
        SutraError: it does not answer.
    """
    if options.broker_url is None:
        raise BrokerNotConfiguredError
    client = redis.Redis.from_url(options.broker_url, socket_timeout=5, socket_connect_timeout=5)
    try:
        client.ping()
    except redis.RedisError as error:
        raise SutraError(f"the server of SUTRA_BROKER_URL does not answer: {error}") from None
    return client
