"""``sutra stream send`` and ``sutra stream read``: texts in and vectors out through a stream."""

from __future__ import annotations

import codecs
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

from sutra_tasks.errors import SutraError
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


def run_send(stream: str, *, key: str | None, priority: int, prompt: str | None, as_jsonl: bool) -> int:
    """Send standard input, each line as a text or, with a key, all of it as one; return the exit status.

    Args:
        stream: its name.
        key: names the one text; None: each line is a text.
        priority: of all entries.
        prompt: of all entries.
        as_jsonl: whether a line is a JSON object with the entry's fields.
    """
    sent = 0
    common: dict[str, Any] = {"priority": priority, "prompt": prompt}
    with _ctrl_c() as ctrl_c, StreamProducer(stream, timeout_s=math.inf) as producer:
        found = _standard_input(ctrl_c)
        # Sent as soon as it is read: the next line of a log may be an hour away.
        for entries in _pieces(found, key, common) if key else _texts(found, common, as_jsonl=as_jsonl):
            sent += producer.send_many(entries)
    print(f"sent {sent} {f'pieces of {key}' if key else 'texts'}", file=sys.stderr)  # noqa: T201
    return INTERRUPTED if ctrl_c.pressed else 0


def _standard_input(ctrl_c: _CtrlC) -> Iterator[bytes]:
    """Yield standard input as it comes, until its end or Ctrl-C."""
    while True:
        try:
            with ctrl_c.ends_wait():
                found = os.read(sys.stdin.fileno(), READ_BYTES)
        except KeyboardInterrupt:
            return
        if not found:
            return
        yield found


def _texts(
    parts: Iterator[bytes], common: Mapping[str, Any], *, as_jsonl: bool
) -> Iterator[Iterator[StreamEntry]]:
    """Yield, for each part of the input, the entries of the lines that it completes."""
    rest, number = b"", 1
    for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        yield _entries(lines, number, common, as_jsonl=as_jsonl)
        number += len(lines)
    yield _entries([rest], number, common, as_jsonl=as_jsonl)


def _entries(
    lines: Sequence[bytes], first: int, common: Mapping[str, Any], *, as_jsonl: bool
) -> Iterator[StreamEntry]:
    """Yield an entry for each line that is not empty; ``first`` is the number of the first line."""
    for number, line in enumerate(lines, start=first):
        try:
            text = line.decode().rstrip("\r")
            if text and as_jsonl:
                fields = {**common, **json.loads(text)}
                yield StreamEntry(**{name: fields[name] for name in ENTRY_FIELDS if name in fields})
            elif text:
                yield StreamEntry(text, **common)
        except UnicodeDecodeError:
            raise SutraError(f"line {number}: not UTF-8. All lines before it were sent") from None
        except (ValueError, TypeError):
            raise SutraError(
                f'line {number}: expected a JSON object with "text". All lines before it were sent'
            ) from None


def _pieces(
    parts: Iterator[bytes], key: str, common: Mapping[str, Any]
) -> Iterator[Iterator[StreamEntry]]:
    """Yield each part of the input as a piece of one text, and at last the piece that ends the text."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    number = 0
    try:
        for part in parts:
            if text := decoder.decode(part):
                yield iter([StreamEntry(text, key=key, seq=number, **common)])
                number += 1
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise SutraError(f"standard input is not UTF-8; {number} pieces before that were sent") from None
    yield iter([StreamEntry("", key=key, seq=number, end=True, **common)])


def run_read(stream: str, *, timeout_s: float | None, vectors: bool) -> int:
    """Print responses as JSON lines and acknowledge them; return the exit status.

    Args:
        stream: its name.
        timeout_s: seconds without a response after which to end; None: only Ctrl-C ends.
        vectors: whether to print the vectors as well.
    """
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
