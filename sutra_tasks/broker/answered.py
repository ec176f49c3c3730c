"""Which messages of a dead worker have their answer, although it died before acknowledging them.

Celery sends callbacks and the rest of a chain before it stores a success, and counts a chord after that
(``celery.app.trace``). So a stored success ends a message, unless the message may belong to a chord.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sutra_tasks import keys

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
    if headers.get("task") not in ENDED_BY_A_SUCCESS or headers.get("group"):
        return None
    return keys.result(str(headers.get("id")))


def stored_successes(results: redis.Redis, names: Sequence[str]) -> set[str]:
    """Return those of the named results that are a success.

    Args:
        results: the results server.
        names: keys of results.
    """
    found: set[str] = set()
    for at in range(0, len(names), RESULTS_PER_CALL):
        some = names[at : at + RESULTS_PER_CALL]
        with results.pipeline(transaction=False) as pipe:
            for name in some:
                pipe.getrange(name, 0, len(SUCCESS) - 1)
            beginnings = pipe.execute()
        found.update(name for name, one in zip(some, beginnings, strict=True) if one == SUCCESS)
    return found
