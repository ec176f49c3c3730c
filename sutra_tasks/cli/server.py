"""The connection of commands to the broker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import redis

from sutra_tasks.connections import broker_client
from sutra_tasks.errors import BrokerNotConfiguredError, SutraError

if TYPE_CHECKING:
    from sutra_tasks.settings import Settings

__all__ = ["connected"]

TIMEOUT_S: Final = 5.0


def connected(options: Settings) -> redis.Redis:
    """Return a client of the broker, after checking that it answers.

    Raises:
        BrokerNotConfiguredError: ``SUTRA_BROKER_URL`` is not set.
        SutraError: it does not answer.
    """
    if options.broker_url is None:
        raise BrokerNotConfiguredError
    client = broker_client(options, timeout_s=TIMEOUT_S, retries=False)
    try:
        client.ping()
    except redis.RedisError as error:
        raise SutraError(f"the server of SUTRA_BROKER_URL does not answer: {error}") from None
    return client
