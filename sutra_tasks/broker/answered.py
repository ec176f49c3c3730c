"""Which messages of a dead worker have their answer, although it died before acknowledging them.

Celery sends callbacks and the rest of a chain before it stores a success, and counts a chord after that
(``celery.app.trace``). So a stored success ends a message, unless the message may belong to a chord.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sutra_tasks import keys
from sutra_tasks.broker.message_check import is_id
from sutra_tasks.server_errors import is_permanent

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import redis

__all__ = ["answering_result", "stored_successes"]

ENDED_BY_A_SUCCESS: Final = (keys.EMBED_TASK, keys.DISTILL_TASK)
"""Not the task that combines the parts of a long text: it deletes the parts after it has stored."""

SUCCESS: Final = b'{"status": "SUCCESS"'
"""How the record of a success begins, as Celery writes it; the vectors behind it are not read."""

RESULTS_PER_CALL: Final = 100


def answering_result(headers: Mapping[str, Any]) -> str | None:
    """Return the key of the result whose success ends a message; None if no result does.

    A header ``group`` does not tell a chord, which may not be counted yet, from a group.
    """
    task_id = headers.get("id")
    if headers.get("task") not in ENDED_BY_A_SUCCESS or headers.get("group") or not is_id(task_id):
        return None
    return keys.result(str(task_id))


def stored_successes(results: redis.Redis, names: Sequence[str]) -> set[str]:
    """Return those of the named results that are a success.

    Args:
        results: the results server.
        names: keys of results.

    Raises:
        redis.RedisError: the server does not answer now.
    """
    found: set[str] = set()
    for at in range(0, len(names), RESULTS_PER_CALL):
        some = names[at : at + RESULTS_PER_CALL]
        with results.pipeline(transaction=False) as pipe:
            for name in some:
                pipe.getrange(name, 0, len(SUCCESS) - 1)
            beginnings = pipe.execute(raise_on_error=False)
        for name, one in zip(some, beginnings, strict=True):
            if isinstance(one, Exception) and not is_permanent(one):
                raise one
            if one == SUCCESS:  # a key of another type is no success, and stays so
                found.add(name)
    return found
