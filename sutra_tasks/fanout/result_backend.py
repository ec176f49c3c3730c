"""The workers' result backend, which also joins the parts of long texts."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from celery import states

from sutra_tasks import keys
from sutra_tasks.broker import result_backend
from sutra_tasks.broker.result_backend import as_not_stored
from sutra_tasks.fanout.store import Documents, documents
from sutra_tasks.settings import settings

__all__ = ["ResultBackend"]


class ResultBackend(result_backend.ResultBackend):
    """``result_backend`` of the workers."""

    @cached_property
    def _documents(self) -> Documents:
        # Made when the first part ends: most workers' backends never need it.
        return documents(settings())

    def on_chord_part_return(self, request: Any, state: str, result: Any, **options: Any) -> None:
        """Join a chord: the parts of a long text in their document, others as Celery does.

        Raises:
            NotStored: the server did not take it.
        """
        if getattr(request, "task", None) != keys.PART_TASK:
            super().on_chord_part_return(request, state, result, **options)
            return
        with as_not_stored():
            if state == states.SUCCESS:
                self._documents.join(request.group, request.group_index, result)
            else:
                self._documents.fail(request.group, result)

    def on_settled(self, task_id: str, request: Any) -> None:
        """Delete the document of a long text whose caller has the answer.

        Raises:
            NotStored: the server did not take it.
        """
        if getattr(request, "task", None) == keys.COMBINE_TASK:
            with as_not_stored():
                self._documents.finish(task_id)
