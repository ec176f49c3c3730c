"""Checks of the servers that a worker uses, before it starts and whenever it has connected again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import redis
from celery.utils.log import get_logger
from celery.worker.consumer import Consumer

from sutra_tasks.connections import client_of
from sutra_tasks.errors import SutraError
from sutra_tasks.membership.unstarted import end_unstarted
from sutra_tasks.server_check import ASK_S, check_server, explain
from sutra_tasks.server_errors import is_denial
from sutra_tasks.settings import settings

__all__ = ["CheckingConsumer", "check_servers"]

logger = get_logger(__name__)


_said: Final[set[str]] = set()


def check_servers(role: str) -> None:
    """Log warnings about the servers, each once, and end this process if they can not serve its role.

    A server that does not answer now is not checked: the worker waits for it.

    Raises:
        SystemExit: they can not; the worker has said why.
    """
    options = settings()
    for address in dict.fromkeys((options.broker_address, options.results_address)):
        try:
            with client_of(address, ASK_S) as client:
                warnings = check_server(client, address, role)
        except SutraError as error:
            end_unstarted(options, options.device_id or role, str(error))
        except (redis.RedisError, OSError) as error:
            warnings = [f"waiting for the server of {address.variable}, {address}: {error}"]
        for warning in [one for one in warnings if one not in _said]:
            _said.add(warning)
            logger.warning(warning)


class CheckingConsumer(Consumer):  # type: ignore[misc]  # Celery is untyped
    """Celery's consumer; ``worker_consumer`` of every role."""

    def __init__(self, *args: Any, worker_options: Mapping[str, Any], **kwargs: Any) -> None:
        # Gossip's own queue would be all that an idle worker waits on. Gossip and mingle are for workers
        # that coordinate through messages; these do so through the server.
        options = {**worker_options, "without_gossip": True, "without_mingle": True}
        super().__init__(*args, worker_options=options, **kwargs)

    def connect(self) -> Any:
        """Connect, waiting for a server that is away, and check what answers.

        Raises:
            SystemExit: the servers can not serve this worker.
        """
        connection = super().connect()
        check_servers(self.app.conf.sutra_role)
        return connection

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """Connect anew, unless the server denied what this worker can not do without.

        Raises:
            SystemExit: it did; the worker has said which right is missing.
        """
        if is_denial(exc):
            options, role = settings(), self.app.conf.sutra_role
            end_unstarted(options, options.device_id or role, str(explain(exc, options, role)))
        super().on_connection_error_after_connected(exc)
