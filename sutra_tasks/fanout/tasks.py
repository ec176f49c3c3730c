"""The Celery tasks behind a long text that is fanned out: its parts, and the body that combines them.

Applications do not call them: a device sends them (:mod:`sutra_tasks.fanout.sender`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery.exceptions import Ignore, TaskRevokedError

from sutra_tasks import keys
from sutra_tasks.app import app
from sutra_tasks.errors import SutraError

if TYPE_CHECKING:
    from sutra_tasks.fanout.long_texts import LongTexts
    from sutra_tasks.vectors import Embeddings, Vectors

__all__ = ["combine", "part", "serve"]

_server: LongTexts | None = None


def serve(server: LongTexts | None) -> LongTexts | None:
    """Have ``server`` run these tasks in this process, and return the server before it."""
    global _server
    before, _server = _server, server
    return before


def _serving() -> LongTexts:
    if _server is None:
        raise SutraError("parts of long texts run on device workers")
    return _server


@app.task(  # type: ignore[untyped-decorator]  # Celery is untyped
    name=keys.PART_TASK,
    bind=True,
    shared=False,
    acks_late=True,
    ignore_result=True,
    throws=(TaskRevokedError,),  # its caller revoked it: no fault of this worker
)
def part(self: Any) -> dict[str, Any] | None:
    """Embed one part of a long text."""
    return _serving().part(self.request)


@app.task(name=keys.COMBINE_TASK, bind=True, shared=False, acks_late=True)  # type: ignore[untyped-decorator]
def combine(self: Any) -> Vectors | Embeddings:
    """Combine the parts of a long text, under the caller's task id."""
    request = self.request
    try:
        return _serving().combine(request.id)
    except TaskRevokedError as revoked:
        # Celery knows that a task is revoked only in workers that were up when its caller revoked it.
        stores = not request.ignore_result
        self.backend.mark_as_revoked(request.id, str(revoked), request, store_result=stores)
        raise Ignore from None
