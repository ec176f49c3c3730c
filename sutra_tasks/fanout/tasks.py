"""The tasks behind a long text that is spread over the fleet: its parts, and what puts them together.

Nobody calls them: :mod:`sutra_tasks.fanout.store` sends them from a device to devices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery.exceptions import Ignore, TaskRevokedError

from sutra_tasks import keys
from sutra_tasks.app import app
from sutra_tasks.errors import SutraError

if TYPE_CHECKING:
    from sutra_tasks.fanout.spreading import LongTexts
    from sutra_tasks.vectors import Embeddings, Vectors

__all__ = ["combine", "part", "serve"]

_server: LongTexts | None = None


def serve(server: LongTexts | None) -> LongTexts | None:
    """Let ``server`` do the tasks that run in this process; return the one before."""
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
    throws=(TaskRevokedError,),  # the caller gave it up, no fault here
)
def part(self: Any) -> dict[str, Any] | None:
    """Embed one part of a long text."""
    return _serving().part(self.request)


@app.task(name=keys.COMBINE_TASK, bind=True, shared=False, acks_late=True)  # type: ignore[untyped-decorator]
def combine(self: Any) -> Vectors | Embeddings:
    """Put the parts of a long text together, under the caller's task id."""
    request = self.request
    try:
        return _serving().combine(request.id)
    except TaskRevokedError as revoked:
        # A part's device was told; this one may have begun since. The state is the same.
        stores = not request.ignore_result
        self.backend.mark_as_revoked(request.id, str(revoked), request, store_result=stores)
        raise Ignore from None
