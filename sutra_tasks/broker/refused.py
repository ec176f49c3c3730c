"""What becomes of a message that no worker can run: its sender is told, or it becomes a dead letter.

The channel delivers such a message as one of the task ``sutra.refused``, so that it takes the ordinary
way through Celery, is in flight until it has ended, and holds up no other.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import Any, Final

import redis
from celery.utils.log import get_logger
from kombu.exceptions import OperationalError

from sutra_tasks import keys
from sutra_tasks.app import app
from sutra_tasks.broker.dead_letters import add_dead_letter
from sutra_tasks.broker.message_check import readable_id
from sutra_tasks.broker.result_backend import RequeueMessage
from sutra_tasks.broker.task_failure import fail_task
from sutra_tasks.connections import broker_client
from sutra_tasks.errors import InvalidMessageError
from sutra_tasks.settings import settings

__all__ = ["growing_pause_s", "refused_payload", "strategy"]

logger = get_logger(__name__)

FAILED_PAUSE_S: Final = 1.0
"""Seconds after which a message that a worker's own code failed with is requeued."""
FIRST_PAUSE_S: Final = 0.1
LONGEST_PAUSE_S: Final = 2.0
"""Longer would delay what waits once a server is back."""


def growing_pause_s(tries: int) -> float:
    """Return the seconds to wait after so many tries that failed: a tenth, doubling to two seconds."""
    return float(min(FIRST_PAUSE_S * 2 ** (min(tries, 10) - 1), LONGEST_PAUSE_S))


def refused_payload(payload: Any, error: InvalidMessageError) -> dict[str, Any]:
    """Return what stands for a message that is refused on its way through kombu and Celery.

    Args:
        payload: the message, as far as it could be parsed.
        error: why it is refused.
    """
    headers = {
        "task": keys.REFUSED_TASK,
        "id": readable_id(payload) or "",
        "field": error.field,
        "reason": error.reason,
    }
    properties = {"delivery_info": {"exchange": "", "routing_key": ""}}
    return {"body": "", "headers": headers, "properties": properties}


@app.task(name=keys.REFUSED_TASK, shared=False, ignore_result=True)  # type: ignore[untyped-decorator]
def refused() -> None:
    """Never run: :func:`strategy` handles its messages."""


def strategy(task: Any, app: Any, consumer: Any) -> Callable[..., None]:  # noqa: ARG001 - Celery's hook
    """Tell the sender of each refused message, or keep it as a dead letter where it names no id."""
    client = broker_client(settings(), retries=False)  # this runs on Celery's event loop

    def refuse(message: Any, tries: int = 1) -> None:
        try:
            _refuse(message, consumer, client, now=time.time())
        except (RequeueMessage, redis.RedisError, OperationalError, OSError) as error:
            if tries == 1:
                logger.warning("a message that is refused waits for the server: %s", error)
            consumer.timer.call_after(growing_pause_s(tries), refuse, (message, tries + 1))

    def handler(message: Any, body: Any, ack: Any, reject: Any, callbacks: Any) -> None:  # noqa: ARG001
        refuse(message)

    return handler


refused.Strategy = f"{__name__}:strategy"


def _refuse(message: Any, consumer: Any, client: redis.Redis, *, now: float) -> None:
    headers = message.headers
    error = InvalidMessageError(headers["field"], headers["reason"])
    if task_id := headers["id"]:
        fail_task(message, task_id, consumer, error, client, now=now)
        return
    # The same bytes again are the same letter.
    name = f"no-id-{hashlib.sha256(message.sutra_raw).hexdigest()[:16]}"
    logger.error("a message without a readable id is kept as dead letter %s: %s", name, error)
    add_dead_letter(client, name, message.sutra_raw, reason=str(error), attempts=0, now=now)
    message.ack_log_error(logger, consumer.connection_errors)
