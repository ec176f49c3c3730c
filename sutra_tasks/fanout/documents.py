"""What happens to a document: it begins, its parts are joined, or it fails; each sends messages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sutra_tasks.connections import broker_client, results_client
from sutra_tasks.errors import IncompleteDocumentError
from sutra_tasks.fanout.messages import body_message
from sutra_tasks.fanout.sender import Sender
from sutra_tasks.fanout.store import DocumentStore

if TYPE_CHECKING:
    from sutra_tasks.fanout.store import NewDocument
    from sutra_tasks.settings import Settings

__all__ = ["Documents"]


class Documents:
    """The long texts that the fleet computes; safe to use from many threads."""

    def __init__(self, store: DocumentStore, sender: Sender) -> None:
        self.store, self.sender = store, sender

    @classmethod
    def of(cls, options: Settings) -> Documents:
        """Return the documents on the servers of ``options``, with connections of their own."""
        store = DocumentStore(
            results_client(options), overdue_s=options.overdue_s, progress_ttl_s=options.result_ttl_s
        )
        return cls(store, Sender(broker_client(options), options.device_id))

    def begin(self, message: bytes, payload: Sequence[Any], document: NewDocument) -> None:
        """Fan a call out; if that was done before, send the parts that are missing.

        Args:
            message: the call's message, as it stands in its list.
            payload: its decoded body: arguments, options and callbacks.
            document: the call's parts.
        """
        body = body_message(message, payload)
        task_id = json.loads(body)["headers"]["id"]
        if self.store.begin(task_id, body, document):
            self.sender.send_parts(body, document.sizes, list(enumerate(document.devices)))
        else:
            self.send_missing(task_id)  # as the call was divided then: the fleet may be another now

    def join(
        self, task_id: str, index: int, result: Mapping[str, Any] | None, body: str | None = None
    ) -> None:
        """Add a part's result, the first one only; when no result is missing, send the body.

        If the document is gone, and its caller still waits, the caller is told.

        Args:
            task_id: the document.
            index: the part.
            result: JSON with vectors; None if the part had nothing to do.
            body: the message of the body, as the part's message has it.
        """
        is_complete = self.store.join(task_id, index, result)
        if is_complete:
            self._send_body_once(task_id)
        elif is_complete is None and (lost := self.loss(task_id)) is not None:
            self.fail(task_id, lost, body)

    def fail(self, task_id: str, error: Exception, body: str | None = None) -> None:
        """Give a document up with its first error, and send the body, which tells the caller.

        Args:
            task_id: the document.
            error: why it has no answer.
            body: as for :meth:`join`.
        """
        if self.store.fail(task_id, error, body):
            self._send_body_once(task_id)

    def loss(self, task_id: str) -> IncompleteDocumentError | None:
        """Return the error of a document that is gone before its caller has an outcome, if it is."""
        parts = self.store.lost_parts(task_id)
        return None if parts is None else IncompleteDocumentError(parts, parts, 0.0)

    def send_missing(self, task_id: str) -> None:
        """Send the parts of a document that have no result to the router, unless it is given up."""
        missing = self.store.missing_parts(task_id)
        if missing is not None and not missing.given_up:
            self.sender.send_parts(
                missing.body, missing.sizes, [(index, None) for index in missing.parts]
            )

    def _send_body_once(self, task_id: str) -> None:
        """Send the body, or let the next part that ends do it."""
        try:
            body = self.store.body(task_id)
            if body is not None:
                self.sender.send_body(body)
        except BaseException:
            self.store.body_was_not_sent(task_id)
            raise
