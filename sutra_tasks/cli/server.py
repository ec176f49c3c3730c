"""The connection of commands to the broker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import redis

from sutra_tasks.connections import broker_client, client_of
from sutra_tasks.errors import SutraError
from sutra_tasks.server_check import check_server

if TYPE_CHECKING:
    from sutra_tasks.server_address import ServerAddress
    from sutra_tasks.settings import Settings

__all__ = ["connected", "warnings_of"]

TIMEOUT_S: Final = 5.0


def connected(options: Settings) -> redis.Redis:
    """Return a client of the broker, after checking that it answers.

    Raises:
        BrokerNotConfiguredError: ``SUTRA_BROKER_URL`` is not set.
        SettingsError: the server refuses the login, or is a node of a cluster.
        SutraError: it does not answer.
    """
    client = broker_client(options, timeout_s=TIMEOUT_S, retries=False)
    _check(client, options.broker_address, None)
    return client


def warnings_of(options: Settings, role: str) -> list[str]:
    """Return warnings about the servers, after checking that they can serve a role.

    Raises:
        SettingsError, MissingRightsError: they cannot.
        SutraError: one does not answer.
    """
    found: list[str] = []
    for address in dict.fromkeys((options.broker_address, options.results_address)):
        with client_of(address, TIMEOUT_S) as client:
            found += _check(client, address, role)
    return found


def _check(client: redis.Redis, address: ServerAddress, role: str | None) -> list[str]:
    try:
        return check_server(client, address, role)
    except redis.RedisError as error:
        raise SutraError(f"the server of {address.variable} does not answer: {error}") from None
