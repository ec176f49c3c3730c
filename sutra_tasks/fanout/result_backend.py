"""The workers' result backend, which also joins the parts of long texts."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from celery import states

from sutra_tasks import keys
from sutra_tasks.broker import result_backend
from sutra_tasks.broker.result_backend import requeue_if_server_fails
from sutra_tasks.fanout.documents import Documents
from sutra_tasks.fanout.messages import BODY
from sutra_tasks.settings import settings

__all__ = ["ResultBackend"]


class ResultBackend(result_backend.ResultBackend):
    """``result_backend`` of the workers."""

    @cached_property
    def _documents(self) -> Documents:
        # Made when the first part ends: routers and distill workers need no connections for it.
        return Documents.of(settings())

    def on_chord_part_return(self, request: Any, state: str, result: Any, **options: Any) -> None:
        """Join the parts of a long text in their document, and those of any other chord as Celery does.

        Raises:
            RequeueMessage: a server failed.
        """
        if getattr(request, "task", None) != keys.PART_TASK:
            super().on_chord_part_return(request, state, result, **options)
            return
        body = getattr(request, BODY, None)
        with requeue_if_server_fails():
            if state == states.SUCCESS:
                self._documents.join(request.group, request.group_index, result, body)
            else:
                self._documents.fail(request.group, result, body)

    def on_outcome_stored(self, task_id: str, request: Any) -> None:
        """Delete the document of a long text whose outcome is stored.

        Raises:
            RequeueMessage: a server failed.
        """
        if getattr(request, "task", None) == keys.COMBINE_TASK:
            with requeue_if_server_fails():
                self._documents.store.delete(task_id)
