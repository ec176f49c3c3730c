"""``sutra stream``: texts in and vectors out through a stream, and how the streams are."""

from __future__ import annotations

import codecs
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sutra_tasks import keys
from sutra_tasks.cli.server import connected
from sutra_tasks.errors import SutraError
from sutra_tasks.streaming.entries import StreamEntry, check_stream
from sutra_tasks.streaming.metrics import PERCENTILES, percentiles
from sutra_tasks.streaming.producer import StreamProducer
from sutra_tasks.streaming.reader import StreamReader
from sutra_tasks.streaming.responses import StreamingError, StreamingResponse
from sutra_tasks.streaming.status import StreamStatus, stream_status

if TYPE_CHECKING:
    import redis

    from sutra_tasks.settings import Settings

__all__ = ["run_dead", "run_delete", "run_read", "run_send", "run_status"]

PIECE_BYTES: Final = 65_536
POLL_S: Final = 0.5
INTERRUPTED: Final = 130
KNOWN: Final = ("text", "id", "key", "end", "seq", "priority", "prompt")


class _Interrupt:
    """Ctrl-C: ends a wait at once, and everything else when it is done."""

    def __init__(self) -> None:
        self.came = False
        self._waits = False

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """In this block Ctrl-C ends the wait."""
        self._waits = True
        try:
            if self.came:
                raise KeyboardInterrupt
            yield
        finally:
            self._waits = False

    def handle(self, signum: int, frame: Any) -> None:  # noqa: ARG002 - a signal handler's shape
        """Note that Ctrl-C was pressed."""
        self.came = True
        if self._waits:
            raise KeyboardInterrupt


@contextmanager
def _interruptible() -> Iterator[_Interrupt]:
    interrupt = _Interrupt()
    before = signal.signal(signal.SIGINT, interrupt.handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)


def run_send(stream: str, *, key: str | None, priority: int, prompt: str | None, as_jsonl: bool) -> int:
    """Send standard input: a text a line, or all of it as one text; return the exit status."""
    sent = 0
    common: dict[str, Any] = {"priority": priority, "prompt": prompt}
    with _interruptible() as interrupt, StreamProducer(stream, timeout_s=math.inf) as producer:
        parts = _pieces(interrupt, key, common) if key else _texts(interrupt, common, as_jsonl=as_jsonl)
        # What there is is sent at once: the next line of a log may be an hour away.
        for entries in parts:
            sent += producer.send_many(entries)
    print(f"sent {sent} {f'pieces of {key}' if key else 'texts'}", file=sys.stderr)  # noqa: T201
    return INTERRUPTED if interrupt.came else 0


def _texts(
    interrupt: _Interrupt, common: Mapping[str, Any], *, as_jsonl: bool
) -> Iterator[Iterator[StreamEntry]]:
    rest, number = b"", 1
    for part in _read(interrupt):
        *lines, rest = (rest + part).split(b"\n")
        yield _of_lines(lines, number, common, as_jsonl=as_jsonl)
        number += len(lines)
    yield _of_lines([rest], number, common, as_jsonl=as_jsonl)


def _of_lines(
    lines: Sequence[bytes], first: int, common: Mapping[str, Any], *, as_jsonl: bool
) -> Iterator[StreamEntry]:
    for number, line in enumerate(lines, start=first):
        try:
            text = line.decode().rstrip("\r")
            if text and as_jsonl:
                fields = {**common, **json.loads(text)}
                yield StreamEntry(**{name: fields[name] for name in KNOWN if name in fields})
            elif text:
                yield StreamEntry(text, **common)
        except UnicodeDecodeError:
            raise SutraError(f"line {number}: not UTF-8. All lines before it were sent") from None
        except (ValueError, TypeError):
            raise SutraError(
                f'line {number}: expected a JSON object with "text". All lines before it were sent'
            ) from None


def _pieces(
    interrupt: _Interrupt, key: str, common: Mapping[str, Any]
) -> Iterator[Iterator[StreamEntry]]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    number = 0
    try:
        for part in _read(interrupt):
            if text := decoder.decode(part):
                yield iter([StreamEntry(text, key=key, seq=number, **common)])
                number += 1
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise SutraError(f"standard input is not UTF-8; {number} pieces before that were sent") from None
    yield iter([StreamEntry("", key=key, seq=number, end=True, **common)])


def _read(interrupt: _Interrupt) -> Iterator[bytes]:
    """Yield standard input as it comes, until its end or Ctrl-C."""
    while True:
        try:
            with interrupt.waiting():
                found = os.read(sys.stdin.fileno(), PIECE_BYTES)
        except KeyboardInterrupt:
            return
        if not found:
            return
        yield found


def run_read(stream: str, *, timeout_s: float | None, vectors: bool) -> int:
    """Print what comes out of a stream as JSON lines; return the exit status."""
    with _interruptible() as interrupt, StreamReader(stream, timeout_s=POLL_S) as reader:
        heard_at = time.monotonic()
        while not interrupt.came:
            for found in reader:
                for line in _shown(found, vectors=vectors):
                    sys.stdout.write(json.dumps(line) + "\n")
                sys.stdout.flush()
                reader.acknowledge()
                heard_at = time.monotonic()
                if interrupt.came:
                    break
            if timeout_s is not None and time.monotonic() - heard_at >= timeout_s:
                return 0
    return INTERRUPTED


def _shown(found: StreamingResponse | StreamingError, *, vectors: bool) -> Iterator[dict[str, Any]]:
    if isinstance(found, StreamingError):
        yield {"ids": list(found.chunk_ids), "error": found.error, "message": found.message}
        return
    written_ms = int(found.entry_id.partition("-")[0])
    for chunk, row in zip(found.chunks, found.embeddings, strict=True):
        shown: dict[str, Any] = {
            name: getattr(chunk, name)
            for name in ("id", "source", "key", "number", "start", "end")
            if getattr(chunk, name) is not None
        }
        shown |= {"overlap_previous": chunk.overlap_previous, "overlap_next": chunk.overlap_next}
        if chunk.flushed:
            shown["flushed"] = chunk.flushed
        shown |= {"space": found.space, "latency_ms": max(0, written_ms - chunk.arrived_ms)}
        if vectors:
            shown["vector"] = [float(f"{x:.9g}") for x in row]
        yield shown


def run_status(options: Settings, *, only: str | None, follow: bool, as_json: bool) -> None:
    """Show how the streams are, once or until Ctrl-C."""
    client = connected(options)
    try:
        found = stream_status(client, only)
        if only is not None and not found:
            raise SutraError(f"there is no stream {only}; `sutra stream status` lists them")
        if as_json:
            print(json.dumps([one.to_json() for one in found], indent=2))  # noqa: T201 - the output
        elif follow:
            _follow(client, only)
        else:
            Console().print(_drawn(found))
    finally:
        client.close()


def _follow(client: redis.Redis, only: str | None) -> None:
    console = Console()
    # Where there is no screen to draw on, each look is printed.
    with Live(console=console, auto_refresh=False) if console.is_terminal else nullcontext() as live:
        while True:
            shown = _drawn(stream_status(client, only))
            if live is None:
                console.print(shown)
            else:
                live.update(shown, refresh=True)
            time.sleep(1.0)


def _drawn(found: list[StreamStatus]) -> Table | Group | Text:
    if not found:
        return Text("no streams: `sutra stream send NAME` begins one")
    backlog = _table("stream", "waiting", "use", "unread", "texts", "dead", "throttle", "load",
                     "devices", "events")  # fmt: skip
    latency = _table("stream", "per s", *(f"p{share}" for share in PERCENTILES), "chunk",
                     "formed", "errors", "overlap", "cosine")  # fmt: skip
    for one in found:
        measured = one.measured
        times = percentiles(measured.latency)
        backlog.add_row(
            one.name + (" (closed)" if one.closed else ""),
            f"{one.size:,}",
            _share(one.buffer_use),
            f"{one.unread:,}",
            f"{one.open_texts:,}",
            f"{one.dead:,}",
            f"{one.throttle_rate:.1f}",
            _share(one.load),
            str(one.devices),
            str(one.totals.get("backpressure_events", 0)),
        )
        latency.add_row(
            one.name,
            f"{one.per_s:,.1f}",
            *(_ms(times.get(share)) for share in PERCENTILES),
            _ms(percentiles(measured.chunk).get(95)),
            _ms(percentiles(measured.formation).get(95)),
            f"{measured.error_rate:.2%}",
            f"{measured.overlap_ratio:.1%}",
            "-" if measured.consistency is None else f"{measured.consistency:.4f}",
        )
    note = "last minute; p50 to p99: ms end to end; chunk, formed: p95 ms of computing, forming a batch"
    return Group(backlog, Text(), latency, Text(note, style="dim", no_wrap=True))


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def run_dead(options: Settings, stream: str, *, retry: bool, drop: bool) -> None:
    """Show a stream's dead letters, send them again, or forget them; never their texts."""
    client = connected(options)
    name = keys.stream(check_stream(stream), "dead")
    letters: Any = client.xrange(name)
    if not letters:
        Console().print("no dead letters")
        return
    if not (retry or drop):
        table = _table("entry", "id", "reason")
        for entry_id, fields in letters:
            source = fields.get(b"id") or fields.get(b"source") or b""
            table.add_row(entry_id.decode(), source.decode(errors="replace"), fields[b"reason"].decode())
        Console().print(table)
        return
    for entry_id, fields in letters:
        with client.pipeline() as pipe:
            if retry:
                kept = {k: v for k, v in fields.items() if k not in (b"reason", b"deliveries")}
                if b"position" in kept:  # a stretch of a text: it is one by itself now
                    kept = {b"text": kept[b"text"], b"id": kept[b"source"] + b"@" + kept[b"position"]}
                pipe.xadd(keys.stream(stream, "in"), kept)
            pipe.xdel(name, entry_id)
            pipe.execute()
    Console().print(f"{len(letters)} {'sent again' if retry else 'dropped'}")


def run_delete(options: Settings, stream: str, *, force: bool) -> None:
    """Forget a stream with everything in it; one that holds work only if forced."""
    client = connected(options)
    found = stream_status(client, check_stream(stream))
    if not found:
        raise SutraError(f"there is no stream {stream}; `sutra stream status` lists them")
    (one,) = found
    work = one.size + one.unread + one.dead + one.open_texts
    if work and not force:
        raise SutraError(
            f"stream {stream} holds work: {one.size} entries wait, {one.unread} responses are unread, "
            f"{one.open_texts} texts are open, {one.dead} are dead letters. --force deletes them as well"
        )
    client.srem(keys.STREAMS, stream)
    names = list(client.scan_iter(keys.stream(stream, "*"), count=1000))
    if names:
        client.delete(*names)
    Console().print(f"deleted {stream}")
