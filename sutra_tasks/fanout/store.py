"""The documents on the results server: the parts of long texts, and their results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Final

from celery import states
from kombu.utils import json as kombu_json

from sutra_tasks import keys, lua
from sutra_tasks.app import app
from sutra_tasks.broker.result_backend import STORE_RESULT
from sutra_tasks.chunking.answer import AnswerLayout
from sutra_tasks.client.call import Call
from sutra_tasks.errors import InvalidMessageError
from sutra_tasks.fanout.values import EndedDocument, MissingParts, NewDocument, PartRows

if TYPE_CHECKING:
    import redis

__all__ = ["DocumentStore", "EndedDocument", "MissingParts", "NewDocument", "PartRows"]

BEGIN: Final = lua.script("fanout/begin")
JOIN: Final = lua.script("fanout/join")
FAIL: Final = lua.script("fanout/fail")
DELETE: Final = lua.script("fanout/delete")
TAKE_OVERDUE: Final = lua.script("fanout/take_overdue")

PROGRESS: Final = "PROGRESS"
ROWS: Final = "rows:"
RESULT: Final = "result:"
"""Beginnings of a document's fields; the number of a part follows. A part has one of the two."""

_WITHOUT_PARTS: Final = {
    "parts": 0,
    "call": json.dumps(asdict(Call(texts=(), single=True, bytes=0))),
    "layout": json.dumps(AnswerLayout((), "mean").to_json()),
    "model": "",
    "space": "",
    "sizes": "[]",
    "done": 0,
    "resends": 0,
}
"""The fields of a document of which only the body and an error are left."""


class DocumentStore:
    """The documents of a fleet; safe to use from many threads."""

    def __init__(self, client: redis.Redis, *, overdue_s: float, progress_ttl_s: int) -> None:
        """Use a server.

        Args:
            client: of the server with the results.
            overdue_s: seconds without progress after which missing parts are sent again.
            progress_ttl_s: seconds a caller can see the progress.
        """
        self._client = client
        self.overdue_s, self._progress_ttl_s = int(overdue_s), progress_ttl_s

    def begin(self, task_id: str, body: str, document: NewDocument) -> bool:
        """Write a document unless it exists, and say whether it was written.

        Args:
            task_id: the caller's task.
            body: the message of the body.
            document: its parts.
        """
        fields: dict[str, Any] = {
            "parts": len(document.parts),
            "body": body,
            "call": json.dumps(asdict(replace(document.call, texts=()))),
            "layout": json.dumps(document.layout.to_json()),
            "model": document.model,
            "space": document.space,
            "sizes": json.dumps(document.sizes),
            "done": 0,
            "resends": 0,
        }
        positions, row = document.layout.positions, 0
        for index, (packed, tokens) in enumerate(zip(document.parts, document.tokens, strict=True)):
            some = positions[row : row + len(tokens)]
            fields[f"{ROWS}{index}"] = json.dumps({"rows": packed, "positions": some})
            row += len(tokens)
        written = BEGIN(
            self._client,
            **_names(task_id),
            task_id=task_id,
            ttl_s=keys.DOCUMENT_S,
            overdue_s=self.overdue_s,
            progress=_progress(task_id, 0, len(document.parts)),
            progress_ttl_s=self._progress_ttl_s,
            fields=[item for field in fields.items() for item in field],
        )
        return bool(written)

    def part(self, task_id: str, index: int) -> PartRows | None:
        """Return a part; None if it is done, or its document is given up or gone."""
        found: Any = self._client.hmget(
            keys.document(task_id), [f"{ROWS}{index}", "model", "space", "error"]
        )
        rows, model, space, error = found
        if rows is None or error is not None:
            return None
        part = json.loads(rows)
        return PartRows(part["rows"], part["positions"], model.decode(), space.decode())

    def join(self, task_id: str, index: int, result: Mapping[str, Any] | None) -> bool | None:
        """Add a part's result, if it is the first one.

        Args:
            task_id: the document.
            index: the part.
            result: JSON with vectors; None if the part had nothing to do.

        Returns:
            Whether the caller must send the body; None if the document is gone.
        """
        send = JOIN(
            self._client,
            **_names(task_id),
            task_id=task_id,
            part=index,
            part_result="" if result is None else kombu_json.dumps(result),
            overdue_s=self.overdue_s,
            progress=_progress(task_id, "DONE", "PARTS"),
            progress_ttl_s=self._progress_ttl_s,
        )
        return bool(send) if send >= 0 else None

    def fail(self, task_id: str, error: Exception, body: str | None = None) -> bool:
        """Give a document up, if it has no error yet; return True if the caller must send the body.

        Args:
            task_id: the document.
            error: why it has no answer.
            body: the message of the body: with it a document that is gone before its caller has an
                outcome is written again, as one that is given up.
        """
        fields = {} if body is None else {**_WITHOUT_PARTS, "body": body}
        send = FAIL(
            self._client,
            **_names(task_id),
            task_id=task_id,
            error=json.dumps(app.backend.prepare_exception(error, "json")),
            ttl_s=keys.DOCUMENT_S,
            overdue_s=self.overdue_s,
            fields=[item for field in fields.items() for item in field],
        )
        return bool(send)

    def lost_parts(self, task_id: str) -> int | None:
        """Return how many parts a document had that is gone although its caller has no outcome.

        Returns:
            None: the document is there, or its caller has an outcome, or nobody waits any more.
        """
        with self._client.pipeline() as pipeline:
            pipeline.exists(keys.document(task_id))
            pipeline.get(keys.result(task_id))
            exists, stored = pipeline.execute()
        record = json.loads(stored) if stored and not exists else {}
        return int(record["result"]["of"]) if record.get("status") == PROGRESS else None

    def fail_unknown_caller(self, task_id: str) -> None:
        """Store an error for the caller of a document of which nothing is known, if there is no result.

        No callback is told: those of a text whose result has expired were told before.
        """
        if not self._client.exists(keys.result(task_id), keys.document(task_id)):
            reason = "no long text of this id is spread over the fleet"
            self.fail_caller(task_id, InvalidMessageError("headers.id", reason))

    def fail_caller(self, task_id: str, error: Exception) -> None:
        """Store an error for the caller of a document that is gone, and whose callbacks nobody knows."""
        STORE_RESULT(
            self._client,
            result=keys.result(task_id),
            lease_ended=keys.reaped(""),
            record=app.backend.encode(
                {
                    "status": states.FAILURE,
                    "result": app.backend.prepare_exception(error, "json"),
                    "traceback": None,
                    "children": [],
                    "date_done": None,
                    "task_id": task_id,
                }
            ),
            ttl_s=self._progress_ttl_s,
            state=states.FAILURE,
        )

    def body(self, task_id: str) -> bytes | None:
        """Return the message of a document's body; None if the document is gone."""
        found: Any = self._client.hget(keys.document(task_id), "body")
        return found if found is None else bytes(found)

    def body_was_not_sent(self, task_id: str) -> None:
        """Let the next part that ends send the body."""
        self._client.hdel(keys.document(task_id), "sent")

    def missing_parts(self, task_id: str) -> MissingParts | None:
        """Return what a document lacks; None if it is gone."""
        name = keys.document(task_id)
        with self._client.pipeline() as pipeline:
            pipeline.hkeys(name)
            pipeline.hmget(name, ["body", "sizes", "error"])
            fields, (body, sizes, error) = pipeline.execute()
        if body is None:
            return None
        names = (field.decode() for field in fields)
        parts = sorted(int(field.removeprefix(ROWS)) for field in names if field.startswith(ROWS))
        return MissingParts(body, json.loads(sizes), parts, given_up=error is not None)

    def take_overdue(self, *, late_s: int, most: int) -> list[tuple[str, int]]:
        """Take documents without progress, for this caller only.

        Args:
            late_s: seconds by which parts may be late, because they wait in queues.
            most: documents to take.

        Returns:
            The task id of each, and how often it was taken since its last progress; -1: it is gone.
        """
        found = TAKE_OVERDUE(
            self._client,
            documents=keys.documents(),
            document=keys.document(""),
            most=most,
            overdue_s=self.overdue_s,
            late_s=late_s,
        )
        return [(task_id.decode(), resends) for task_id, resends in found]

    def ended(self, task_id: str) -> EndedDocument | None:
        """Return a document that is complete or given up; None if it is neither, or gone."""
        stored: Any = self._client.hgetall(keys.document(task_id))
        fields = {name.decode(): value for name, value in stored.items()}
        if not fields or (fields["done"] != fields["parts"] and "error" not in fields):
            return None
        error = None
        if "error" in fields:
            error = app.backend.exception_to_python(json.loads(fields["error"]))
        results = [
            kombu_json.loads(fields[f"{RESULT}{index}"])
            for index in range(0 if error else int(fields["parts"]))
        ]
        return EndedDocument(
            Call(**json.loads(fields["call"])),
            AnswerLayout.from_json(json.loads(fields["layout"])),
            fields["model"].decode(),
            fields["space"].decode(),
            results,
            error,
        )

    def delete(self, task_id: str) -> None:
        """Delete a document whose caller has the outcome, or wants none."""
        DELETE(self._client, **_names(task_id), task_id=task_id)


def _names(task_id: str) -> dict[str, str]:
    """Return the keys of a document, by their names in the scripts."""
    return {
        "document": keys.document(task_id),
        "documents": keys.documents(),
        "result": keys.result(task_id),
    }


def _progress(task_id: str, done: int | str, parts: int | str) -> str:
    """Return Celery's record of a task that is under way."""
    record: dict[str, Any] = {
        "status": PROGRESS,
        "result": {"done": done, "of": parts},
        "task_id": task_id,
        "traceback": None,
        "children": [],
        "date_done": None,
    }
    return json.dumps(record)
