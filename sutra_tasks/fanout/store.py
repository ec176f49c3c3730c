"""A long text on many devices: a chord of parts, whose body puts the vectors together.

The device that got the text tokenises and chunks it, writes down what there is to do under
``sutra:document:<task>``, and sends one small message a part and none of the text: a part's token ids
are fetched by whoever computes it. Each part is a task of a chord, with the router's balancing, credits,
priority, deadline and rescue as any other. The chord's body is the caller's own message under another
task name, hence with its id, callbacks and all.

Celery's join counts what comes back and can be misled: by a part that ran twice with vectors that differ
in the last bit, or by an hour's pause. Ours (:class:`sutra_tasks.fanout.result_backend.ResultBackend`)
writes each part's result into the document, once, and sends the body when none is missing, or at the
first error. What a crash or a person loses is found by :meth:`Documents.sweep`, and sent again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from celery.utils.log import get_logger
from kombu.utils import json as kombu_json

from sutra_tasks import keys
from sutra_tasks.app import app
from sutra_tasks.broker.queues import MOST_CREDIT, NO_DEVICE, lane
from sutra_tasks.client.admission import Backlog
from sutra_tasks.client.call import Call
from sutra_tasks.connections import broker_client, results_client
from sutra_tasks.documents.answer import AnswerLayout
from sutra_tasks.errors import IncompleteDocumentError
from sutra_tasks.fanout.messages import BODY_DEMAND, body_message, part_demand, part_message, priority_of

if TYPE_CHECKING:
    import redis

    from sutra_tasks.settings import Settings

__all__ = ["Begun", "Collected", "Documents", "Part", "documents", "overdue_s"]

logger = get_logger(__name__)

Sizes = Sequence[Sequence[int]]
"""Rows and tokens of each part."""

MOST_RESENDS: Final = 3
"""Without any progress; each waits twice as long as the one before."""

AT_ONCE: Final = 100
"""Overdue documents looked at in one sweep."""

BEGIN: Final = """
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
for i = 6, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
redis.call('EXPIRE', KEYS[1], ARGV[2])
redis.call('ZADD', KEYS[2], redis.call('TIME')[1] + ARGV[3], ARGV[1])
local told = redis.call('GET', KEYS[3])
if not told or string.find(told, '"status": "PROGRESS"', 1, true) then
  redis.call('SETEX', KEYS[3], ARGV[5], ARGV[4])
end
return 1
"""
"""KEYS: the document, the documents, the caller's result. ARGV: task id, seconds it is kept, seconds
until it is overdue, what the caller is told of progress, seconds that is kept, and its fields and their
values. Written once: a message delivered twice finds it there, and returns 0; one that is delivered
again when all is done begins anew, and leaves its result alone."""

JOIN: Final = """#!lua flags=allow-oom
local parts = redis.call('HGET', KEYS[1], 'parts')
if not parts then return 0 end
if ARGV[2] ~= '' and redis.call('HSETNX', KEYS[1], 'result:' .. ARGV[1], ARGV[2]) == 1 then
  redis.call('HDEL', KEYS[1], 'rows:' .. ARGV[1])
  redis.call('HSET', KEYS[1], 'resends', 0)
  redis.call('ZADD', KEYS[2], 'XX', redis.call('TIME')[1] + ARGV[4], ARGV[3])
  local done = redis.call('HINCRBY', KEYS[1], 'done', 1)
  if done < tonumber(parts) and redis.call('HEXISTS', KEYS[1], 'error') == 0 then
    local told = redis.call('GET', KEYS[3])
    if not told or string.find(told, '"status": "PROGRESS"', 1, true) then
      local progress = string.gsub(ARGV[5], '"DONE"', tostring(done))
      progress = string.gsub(progress, '"PARTS"', parts)
      redis.call('SETEX', KEYS[3], ARGV[6], progress)
      redis.call('PUBLISH', KEYS[3], progress)
    end
  end
end
if redis.call('HGET', KEYS[1], 'done') ~= parts and redis.call('HEXISTS', KEYS[1], 'error') == 0 then
  return 0
end
return redis.call('HSETNX', KEYS[1], 'sent', 1)
"""
"""KEYS: the document, the documents, the caller's result. ARGV: part, its result or nothing, task id,
seconds until the rest is overdue, what the caller is told of progress, seconds that is kept. A result is
not overwritten by progress: a message delivered twice may be computed again behind it. Returns 1 when
the document can be put together, once: two bodies at once would call the caller's callbacks twice. If
the one that is told so dies before it sends the body, the sweep sends it. The part's rows make room for
it: allowed on a full server.
"""

FAIL: Final = """#!lua flags=allow-oom
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
redis.call('HSETNX', KEYS[1], 'error', ARGV[1])
return redis.call('HSETNX', KEYS[1], 'sent', 1)
"""
"""KEYS: the document. ARGV: why it has no vector. Returns 1 to the first that ends it."""

UNSENT: Final = """#!lua flags=allow-oom
return redis.call('HDEL', KEYS[1], 'sent')
"""
"""KEYS: the document."""

SEND: Final = """
for i = 1, #KEYS, 2 do
  redis.call('LPUSH', KEYS[i], ARGV[i])
  local weight = tonumber(ARGV[i + 1])
  if weight > 0 then
    redis.call('HINCRBY', KEYS[i + 1], 'messages', 1)
    redis.call('HINCRBY', KEYS[i + 1], 'credit', math.min(weight, MOST_CREDIT))
    if redis.call('HINCRBY', KEYS[i + 1], 'tokens_dispatched', weight) == weight then
      redis.call('EXPIRE', KEYS[i + 1], FORGET_AFTER_S)
    end
  end
end
""".replace("MOST_CREDIT", str(MOST_CREDIT)).replace("FORGET_AFTER_S", str(keys.FORGET_AFTER_S))
"""KEYS: for each part a list and the load of the device it belongs to. ARGV: for each part its message
and its weight in tokens, 0 if the router will add that."""

SEND_FIRST: Final = SEND.replace("LPUSH", "RPUSH")
"""The same, but to the end that is taken from next."""

FINISH: Final = """#!lua flags=allow-oom
redis.call('ZREM', KEYS[2], ARGV[1])
return redis.call('DEL', KEYS[1])
"""
"""KEYS: the document, the documents. ARGV: task id."""

OVERDUE: Final = """#!lua flags=allow-oom
local now = redis.call('TIME')[1]
local found, until_s = {}, now - ARGV[4]
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', until_s, 'LIMIT', 0, ARGV[2])) do
  local document = ARGV[1] .. id
  if redis.call('EXISTS', document) == 0 then
    redis.call('ZREM', KEYS[1], id)
  else
    local resends = redis.call('HINCRBY', document, 'resends', 1)
    redis.call('ZADD', KEYS[1], now + ARGV[3] * 2 ^ resends, id)
    found[#found + 1] = {id, resends}
  end
end
return found
"""
"""KEYS: the documents. ARGV: what their keys begin with, how many at most, seconds until they are
overdue once more, seconds by which they may be late. Returns the overdue ones, with how often that was,
for this caller only."""


@dataclass(frozen=True, slots=True, repr=False)
class Begun:
    """A call that is spread over the fleet.

    Attributes:
        call: what was asked; its texts are not kept.
        layout: of its rows.
        model: the model's name.
        space: the embedding space of the rows.
        parts: packed rows of each part.
        tokens: of the rows of each part.
        devices: who gets each part; None: whom the router chooses, when its turn has come.
    """

    call: Call
    layout: AnswerLayout
    model: str
    space: str
    parts: Sequence[Mapping[str, Any]]
    tokens: Sequence[Sequence[int]]
    devices: Sequence[str | None]


@dataclass(frozen=True, slots=True, repr=False)
class Part:
    """The packed rows of one part, and the text of each in its call."""

    rows: Mapping[str, Any]
    positions: Sequence[int]
    model: str
    space: str


@dataclass(frozen=True, slots=True, repr=False)
class Collected:
    """A document to be put together: the results of its parts in order, or why there is none."""

    call: Call
    layout: AnswerLayout
    model: str
    space: str
    results: Sequence[Mapping[str, Any]]
    error: Exception | None


class Documents:
    """The long texts that are being computed by the fleet; safe to use from many threads."""

    def __init__(
        self,
        client: redis.Redis,
        results: redis.Redis,
        *,
        overdue_s: float,
        result_ttl_s: int,
        device_id: str | None = None,
    ) -> None:
        """Use servers.

        Args:
            client: with the queues.
            results: with the results and the documents.
            overdue_s: seconds without progress after which missing parts are sent again.
            result_ttl_s: seconds a caller can see the progress.
            device_id: the device of this process, which then puts together what it completes.
        """
        self._device_id = device_id
        self._client, self._results = client, results
        self._overdue_s, self._result_ttl_s = overdue_s, result_ttl_s

    def begin(self, message: bytes, payload: Sequence[Any], begun: Begun) -> None:
        """Spread a call over the fleet; of one that is already spread, send what is missing.

        Args:
            message: the call's message, as it stands in its list.
            payload: its decoded body: arguments, options and callbacks.
            begun: what there is to do.
        """
        body = body_message(message, payload)
        task_id = json.loads(body)["headers"]["id"]
        sizes = [(len(tokens), sum(tokens)) for tokens in begun.tokens]
        fields: dict[str, Any] = {
            "parts": len(begun.parts),
            "body": body,
            "call": json.dumps(asdict(replace(begun.call, texts=()))),
            "layout": json.dumps(begun.layout.to_json()),
            "model": begun.model,
            "space": begun.space,
            "sizes": json.dumps(sizes),
            "done": 0,
            "resends": 0,
        }
        positions, row = begun.layout.positions, 0
        for index, (packed, tokens) in enumerate(zip(begun.parts, begun.tokens, strict=True)):
            mine = positions[row : row + len(tokens)]
            fields[f"rows:{index}"] = json.dumps({"rows": packed, "positions": mine})
            row += len(tokens)
        names = (keys.document(task_id), keys.DOCUMENTS, keys.result(task_id))
        times = (keys.DOCUMENT_S, int(self._overdue_s))
        progress = json.dumps(_progress(task_id, 0, len(begun.parts)))
        flat = [item for field in fields.items() for item in field]
        new = self._results.eval(BEGIN, 3, *names, task_id, *times, progress, self._result_ttl_s, *flat)
        if new:
            self._send_parts(body, sizes, list(enumerate(begun.devices)))
        else:
            self._send_missing(task_id)  # parts as they were divided then, among other devices perhaps

    def part(self, task_id: str, index: int) -> Part | None:
        """Return a part's rows; None if it is done, or nobody wants it any more."""
        found: Any = self._results.hmget(
            keys.document(task_id), [f"rows:{index}", "model", "space", "error"]
        )
        rows, model, space, error = found
        if rows is None or error is not None:
            return None
        part = json.loads(rows)
        return Part(part["rows"], part["positions"], model.decode(), space.decode())

    def join(self, task_id: str, index: int, result: Mapping[str, Any] | None) -> None:
        """Take a part's result, the first one only; when all are there, have them put together.

        Args:
            task_id: the document.
            index: the part.
            result: JSON with vectors; None if the part had nothing to do.
        """
        progress = _progress(task_id, "DONE", "PARTS")
        complete = self._results.eval(
            JOIN, 3, keys.document(task_id), keys.DOCUMENTS, keys.result(task_id),
            str(index), "" if result is None else kombu_json.dumps(result), task_id,
            str(int(self._overdue_s)), json.dumps(progress), str(self._result_ttl_s),
        )  # fmt: skip
        if complete:
            self._send_body_once(task_id)

    def fail(self, task_id: str, error: Exception) -> None:
        """Give a document up, for the first reason that is told, and have its caller told.

        Args:
            task_id: the document.
            error: the reason.
        """
        stored = json.dumps(app.backend.prepare_exception(error, "json"))
        if self._results.eval(FAIL, 1, keys.document(task_id), stored):
            self._send_body_once(task_id)

    def collect(self, task_id: str) -> Collected | None:
        """Return a document that is complete or given up; None if it is neither, or gone."""
        stored: Any = self._results.hgetall(keys.document(task_id))
        fields = {name.decode(): value for name, value in stored.items()}
        if not fields or (fields["done"] != fields["parts"] and "error" not in fields):
            return None
        error = None
        if "error" in fields:
            error = app.backend.exception_to_python(json.loads(fields["error"]))
        results = [
            kombu_json.loads(fields[f"result:{index}"])
            for index in range(0 if error else int(fields["parts"]))
        ]
        return Collected(
            Call(**json.loads(fields["call"])),
            AnswerLayout.from_json(json.loads(fields["layout"])),
            fields["model"].decode(),
            fields["space"].decode(),
            results,
            error,
        )

    def finish(self, task_id: str) -> None:
        """Forget a document whose caller has been told."""
        self._results.eval(FINISH, 2, keys.document(task_id), keys.DOCUMENTS, task_id)

    def sweep(self) -> None:
        """Send what is missing of documents without progress, or give them up."""
        backlog: Any = self._client.get(keys.BACKLOG)
        least_s = int(self._overdue_s)
        late_s = overdue_s(Backlog.from_json(backlog), least_s) - least_s
        found: Any = self._results.eval(
            OVERDUE, 1, keys.DOCUMENTS,
            keys.document(""), str(AT_ONCE), str(least_s), str(late_s),
        )  # fmt: skip
        for task_id, resends in found:
            self._resend(task_id.decode(), resends)

    def _resend(self, task_id: str, resends: int) -> None:
        missing = self._missing(task_id)
        found: Any = self._results.hmget(keys.document(task_id), ["parts", "error"])
        parts, error = found
        if parts is None:
            return
        if not missing or error is not None:
            self._send_body(task_id)
        elif resends > MOST_RESENDS:
            waited_s = int(self._overdue_s) * (2**resends - 1)
            lost = IncompleteDocumentError(len(missing), int(parts), waited_s)
            logger.error("task %s: %s", task_id, lost)
            self.fail(task_id, lost)
        else:
            logger.warning("task %s: %d overdue parts are sent again", task_id, len(missing))
            self._send_missing(task_id)

    def _missing(self, task_id: str) -> list[int]:
        names: Any = self._results.hkeys(keys.document(task_id))
        return sorted(int(name[5:]) for name in names if name.startswith(b"rows:"))

    def _send_missing(self, task_id: str) -> None:
        missing = self._missing(task_id)
        found: Any = self._results.hmget(keys.document(task_id), ["body", "sizes", "error"])
        body, sizes, error = found
        if body is not None and error is None:
            self._send_parts(body, json.loads(sizes), [(index, None) for index in missing])

    def _send_parts(
        self, body: str | bytes, sizes: Sizes, parts: Sequence[tuple[int, str | None]]
    ) -> None:
        """Send parts to the devices beside them, or to the router."""
        template = json.loads(body)
        priority = priority_of(template)
        for at in range(0, len(parts), AT_ONCE):
            names: list[str] = []
            messages: list[str] = []
            for index, device in parts[at : at + AT_ONCE]:
                rows, tokens = sizes[index]
                queue = keys.EMBED_QUEUE if device is None else keys.device_queue(device)
                weight = 0 if device is None else part_demand(rows, tokens).tokens
                names += [lane(queue, priority), keys.load(device or NO_DEVICE)]
                messages += [part_message(template, index, len(sizes), rows, tokens), str(weight)]
            if names:
                self._client.eval(SEND, len(names), *names, *messages)

    def _send_body_once(self, task_id: str) -> None:
        """Send the body, or let the next part that ends do it."""
        try:
            self._send_body(task_id)
        except BaseException:
            self._results.eval(UNSENT, 1, keys.document(task_id))
            raise

    def _send_body(self, task_id: str) -> None:
        body: Any = self._results.hget(keys.document(task_id), "body")
        if body is not None:
            # Its turn has come: it goes where messages are taken from next, here if this is a device.
            here, priority = self._device_id, priority_of(json.loads(body))
            queue = keys.EMBED_QUEUE if here is None else keys.device_queue(here)
            weight = 0 if here is None else BODY_DEMAND.tokens
            names = (lane(queue, priority), keys.load(here or NO_DEVICE))
            self._client.eval(SEND_FIRST, 2, *names, body, str(weight))


def _progress(task_id: str, done: int | str, of: int | str) -> dict[str, Any]:
    """Return Celery's record of a task that is under way."""
    result = {"done": done, "of": of}
    known = {"status": "PROGRESS", "result": result, "task_id": task_id}
    return {**known, "traceback": None, "children": [], "date_done": None}


def overdue_s(backlog: Backlog | None, least_s: float) -> int:
    """Return the seconds after which parts that did not come are taken for lost, and not for waiting."""
    if backlog is None or not backlog.tokens_per_s:
        return int(least_s)
    return int(max(least_s, 2 * backlog.tokens / backlog.tokens_per_s))


def documents(options: Settings) -> Documents:
    """Return the documents on the servers that ``options`` name, over connections of their own."""
    return Documents(
        broker_client(options),
        results_client(options),
        overdue_s=options.overdue_s,
        result_ttl_s=options.result_ttl_s,
        device_id=options.device_id,
    )
