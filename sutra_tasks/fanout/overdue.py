"""The sweep of overdue documents: missing parts are sent again, and at last the document is given up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from celery.utils.log import get_logger

from sutra_tasks import keys
from sutra_tasks.client.admission import Backlog
from sutra_tasks.errors import IncompleteDocumentError

if TYPE_CHECKING:
    from sutra_tasks.fanout.documents import Documents

__all__ = ["DOCUMENTS_AT_ONCE", "MOST_RESENDS", "overdue_after_s", "resend_overdue"]

logger = get_logger(__name__)

MOST_RESENDS: Final = 3
"""How often missing parts are sent again without progress; each wait is twice as long as the last."""

DOCUMENTS_AT_ONCE: Final = 100
"""Documents in one sweep."""


def resend_overdue(documents: Documents) -> None:
    """Send again what is missing of documents without progress, or give them up."""
    backlog: Any = documents.sender.client.get(keys.backlog())
    usual_s = documents.store.overdue_s
    late_s = overdue_after_s(Backlog.from_json(backlog), usual_s) - usual_s
    for task_id, resends in documents.store.take_overdue(late_s=late_s, most=DOCUMENTS_AT_ONCE):
        _resend(documents, task_id, resends)


def _resend(documents: Documents, task_id: str, resends: int) -> None:
    missing = documents.store.missing_parts(task_id)
    if missing is None:
        # Its parts tell the caller and the callbacks, if they are not lost as well. Now it is late.
        if (loss := documents.loss(task_id)) is not None:
            logger.error("task %s: %s", task_id, loss)
            documents.store.fail_caller(task_id, loss)
        return
    if missing.given_up or not missing.parts:
        documents.sender.send_body(missing.body)
    elif resends > MOST_RESENDS:
        waited_s = documents.store.overdue_s * (2**resends - 1)
        lost = IncompleteDocumentError(len(missing.parts), len(missing.sizes), waited_s)
        logger.error("task %s: %s", task_id, lost)
        documents.fail(task_id, lost)
    else:
        logger.warning("task %s: %d overdue parts are sent again", task_id, len(missing.parts))
        documents.send_missing(task_id)


def overdue_after_s(backlog: Backlog | None, least_s: float) -> int:
    """Return the seconds after which missing parts count as lost: until then they may wait in queues.

    Args:
        backlog: of the fleet, None if no router tells it.
        least_s: seconds without a backlog.
    """
    if backlog is None or not backlog.tokens_per_s:
        return int(least_s)
    return int(max(least_s, 2 * backlog.tokens / backlog.tokens_per_s))
