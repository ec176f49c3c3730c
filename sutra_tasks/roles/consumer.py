"""Checks of the servers that a worker uses, before it starts and whenever it has connected again."""

from __future__ import annotations

import sys
from typing import Any

import redis
from celery.utils.log import get_logger
from celery.worker.consumer import Consumer

from sutra_tasks.connections import client_of
from sutra_tasks.errors import SutraError
from sutra_tasks.server_check import ASK_S, check_server, explain
from sutra_tasks.server_errors import is_denial
from sutra_tasks.settings import settings

__all__ = ["CheckingConsumer", "check_servers"]

logger = get_logger(__name__)


def check_servers(role: str) -> None:
    """Log warnings about the servers, and end this process if they can never serve its role.

    A server that does not answer now is not checked: the worker waits for it.

    Raises:
        SystemExit: with the sentence that says why.
    """
    options = settings()
    for address in dict.fromkeys((options.broker_address, options.results_address)):
        try:
            with client_of(address, ASK_S) as client:
                warnings = check_server(client, address, role)
        except SutraError as error:
            sys.exit(f"sutra {role}: {error}")
        except (redis.RedisError, OSError) as error:
            warnings = [f"waiting for the server of {address.variable}, {address}: {error}"]
        for warning in warnings:
            logger.warning(warning)


class CheckingConsumer(Consumer):  # type: ignore[misc]  # Celery is untyped
    """Celery's consumer; ``worker_consumer`` of every role."""

    def connect(self) -> Any:
        """Connect, waiting for a server that is away, and check what answers.

        Raises:
            SystemExit: the server can never serve this worker.
        """
        connection = super().connect()
        try:
            check_servers(self.app.conf.sutra_role)
        except SystemExit as refusal:
            logger.critical(refusal.code)
            raise
        return connection

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """Connect anew, unless the server denied what this worker can not do without.

        Raises:
            SystemExit: with the sentence that says which right is missing.
        """
        if is_denial(exc):
            role = self.app.conf.sutra_role
            refusal = f"sutra {role}: {explain(exc, settings(), role)}"
            logger.critical(refusal)
            sys.exit(refusal)
        super().on_connection_error_after_connected(exc)
