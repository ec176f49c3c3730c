"""``sutra stream send`` and ``sutra stream read``: texts in and vectors out through a stream."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

from sutra_tasks.cli.reading import standard_input
from sutra_tasks.cli.server import connected
from sutra_tasks.decoding import UNREADABLE, decoded
from sutra_tasks.errors import SutraError
from sutra_tasks.settings import settings
from sutra_tasks.streaming.client.producer import StreamProducer
from sutra_tasks.streaming.client.reader import StreamReader
from sutra_tasks.streaming.entries import StreamEntry
from sutra_tasks.streaming.responses import EmbeddedChunk, StreamingError, StreamingResponse

__all__ = ["run_read", "run_send"]

READ_BYTES: Final = 65_536
POLL_S: Final = 0.5
"""Seconds without a response after which ``read`` looks at Ctrl-C and its timeout."""
INTERRUPTED: Final = 130
ENTRY_FIELDS: Final = ("text", "id", "key", "end", "seq", "priority", "prompt")


class _CtrlC:
    """Ends a wait at once; elsewhere it is only noted, so that work in progress is finished."""

    def __init__(self) -> None:
        self.pressed = False
        self._waiting = False

    @contextmanager
    def ends_wait(self) -> Iterator[None]:
        """Raise KeyboardInterrupt in this block when Ctrl-C is pressed, or was before."""
        self._waiting = True
        try:
            if self.pressed:
                raise KeyboardInterrupt
            yield
        finally:
            self._waiting = False

    def handle(self, signum: int, frame: Any) -> None:  # noqa: ARG002 - a signal handler's shape
        """Handle SIGINT."""
        self.pressed = True
        if self._waiting:
            raise KeyboardInterrupt


@contextmanager
def _ctrl_c() -> Iterator[_CtrlC]:
    handler = _CtrlC()
    before = signal.signal(signal.SIGINT, handler.handle)
    try:
        yield handler
    finally:
        signal.signal(signal.SIGINT, before)


def run_send(
    stream: str,
    *,
    key: str | None,
    priority: int,
    prompt: str | None,
    as_jsonl: bool,
    encoding: str | None,
) -> int:
    """Send standard input, each line as a text or, with a key, all of it as one; return the exit status.

    Args:
        stream: its name.
        key: names the one text; None: each line is a text.
        priority: of all entries.
        prompt: of all entries.
        as_jsonl: whether a line is a JSON object with the entry's fields.
        encoding: of standard input; None: by its byte-order mark, else UTF-8.
    """
    connected(settings()).close()
    sent = 0
    common: dict[str, Any] = {"priority": priority, "prompt": prompt}
    with _ctrl_c() as ctrl_c, StreamProducer(stream, timeout_s=math.inf) as producer:
        found = decoded(_standard_input(ctrl_c), encoding)
        # Sent as soon as it is read: the next line of a log may be an hour away.
        unreadable = f"not {(encoding or 'utf-8').upper()}; --encoding names another"
        if key:
            batches = _pieces(found, key, common, unreadable)
        else:
            batches = _texts(found, common, unreadable, as_jsonl=as_jsonl)
        for entries in batches:
            sent += producer.send_many(entries)
    print(f"sent {sent} {f'pieces of {key}' if key else 'texts'}", file=sys.stderr)  # noqa: T201
    return INTERRUPTED if ctrl_c.pressed else 0


def _standard_input(ctrl_c: _CtrlC) -> Iterator[bytes]:
    """Yield standard input as it comes, until its end or Ctrl-C."""
    descriptor = standard_input().fileno()
    while True:
        try:
            with ctrl_c.ends_wait():
                found = os.read(descriptor, READ_BYTES)
        except KeyboardInterrupt:
            return
        if not found:
            return
        yield found


def _texts(
    parts: Iterator[str], common: Mapping[str, Any], unreadable: str, *, as_jsonl: bool
) -> Iterator[Iterator[StreamEntry]]:
    """Yield, for each part of the input, the entries of the lines that it completes."""
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    rest, number = "", 1
    for part in parts:
        *lines, rest = (rest + newlines.decode(part)).split("\n")
        yield _entries(lines, number, common, unreadable, as_jsonl=as_jsonl)
        number += len(lines)
    *lines, rest = (rest + newlines.decode("", final=True)).split("\n")
    yield _entries([*lines, rest], number, common, unreadable, as_jsonl=as_jsonl)


def _entries(
    lines: Sequence[str], first: int, common: Mapping[str, Any], unreadable: str, *, as_jsonl: bool
) -> Iterator[StreamEntry]:
    """Yield an entry for each line that is not empty; ``first`` is the number of the first line."""
    for number, text in enumerate(lines, start=first):
        if UNREADABLE in text:
            raise SutraError(f"line {number}: {unreadable}. All lines before it were sent")
        try:
            if text and as_jsonl:
                fields = {**common, **json.loads(text)}
                yield StreamEntry(**{name: fields[name] for name in ENTRY_FIELDS if name in fields})
            elif text:
                yield StreamEntry(text, **common)
        except (ValueError, TypeError, RecursionError):
            raise SutraError(
                f'line {number}: expected a JSON object with "text". All lines before it were sent'
            ) from None


def _pieces(
    parts: Iterator[str], key: str, common: Mapping[str, Any], unreadable: str
) -> Iterator[Iterator[StreamEntry]]:
    """Yield each part of the input as a piece of one text, and at last the piece that ends the text."""
    number = 0
    for part in parts:
        if UNREADABLE in part:
            raise SutraError(f"standard input is {unreadable}. {number} pieces before that were sent")
        yield iter([StreamEntry(part, key=key, seq=number, **common)])
        number += 1
    yield iter([StreamEntry("", key=key, seq=number, end=True, **common)])


def run_read(stream: str, *, timeout_s: float | None, vectors: bool) -> int:
    """Print responses as JSON lines and acknowledge them; return the exit status.

    Args:
        stream: its name.
        timeout_s: seconds without a response after which to end; None: only Ctrl-C ends.
        vectors: whether to print the vectors as well.
    """
    connected(settings()).close()
    with _ctrl_c() as ctrl_c, StreamReader(stream, timeout_s=POLL_S) as reader:
        heard_at = time.monotonic()
        while not ctrl_c.pressed:
            for response in reader:
                for line in _json_lines(response, vectors=vectors):
                    sys.stdout.write(json.dumps(line) + "\n")
                sys.stdout.flush()
                reader.acknowledge()
                heard_at = time.monotonic()
                if ctrl_c.pressed:
                    break
            if timeout_s is not None and time.monotonic() - heard_at >= timeout_s:
                return 0
    return INTERRUPTED


def _json_lines(
    response: StreamingResponse | StreamingError, *, vectors: bool
) -> Iterator[dict[str, Any]]:
    """Yield one object for an error, or one for each chunk of a response."""
    if isinstance(response, StreamingError):
        yield {"ids": list(response.chunk_ids), "error": response.error, "message": response.message}
        return
    written_ms = int(response.entry_id.partition("-")[0])
    for chunk, row in zip(response.chunks, response.embeddings, strict=True):
        latency_ms = max(0, written_ms - chunk.arrived_ms)
        line = {**_chunk_fields(chunk), "space": response.space, "latency_ms": latency_ms}
        if vectors:
            line["vector"] = [float(f"{x:.9g}") for x in row]
        yield line


def _chunk_fields(chunk: EmbeddedChunk) -> dict[str, Any]:
    found = {name: getattr(chunk, name) for name in ("id", "source", "key", "number", "start", "end")}
    if chunk.key is None:
        del found["key"]
    found |= {"overlap_previous": chunk.overlap_previous, "overlap_next": chunk.overlap_next}
    if chunk.flushed:
        found["flushed"] = chunk.flushed
    return found
