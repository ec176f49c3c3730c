"""``sutra stream status``, ``dead-letters`` and ``delete``: the state of streams, and clearing them."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sutra_tasks import keys, lua
from sutra_tasks.cli.screen import plain
from sutra_tasks.cli.server import connected
from sutra_tasks.errors import SutraError
from sutra_tasks.streaming.entries import check_stream, is_stream
from sutra_tasks.streaming.metrics import PERCENTILES, percentiles
from sutra_tasks.streaming.status import StreamStatus, stream_status

if TYPE_CHECKING:
    import redis

    from sutra_tasks.settings import Settings

__all__ = ["run_dead", "run_delete", "run_status"]


RETRY: Final = lua.script("streaming/lua/retry_dead_letter")


@dataclass(frozen=True, slots=True)
class _Again:
    """What a dead letter is sent again as, and to which part of the stream."""

    part: str
    fields: dict[Any, Any]


def run_status(options: Settings, *, only: str | None, follow: bool, as_json: bool) -> None:
    """Show the status of all streams or of one, once or until Ctrl-C."""
    with connected(options) as client:
        found = stream_status(client, only)
        if only is not None and not found:
            raise _unknown(only)
        if as_json:
            print(json.dumps([one.to_json() for one in found], indent=2))  # noqa: T201 - the output
        elif follow:
            _follow(client, only)
        else:
            Console().print(_drawn(found))


def _unknown(stream: str) -> SutraError:
    return SutraError(f"there is no stream {stream}; `sutra stream status` lists them")


def _follow(client: redis.Redis, only: str | None) -> None:
    console = Console()
    # Without a terminal there is nothing to draw over: each status is printed below the one before.
    with Live(console=console, auto_refresh=False) if console.is_terminal else nullcontext() as live:
        while True:
            shown = _drawn(stream_status(client, only))
            if live is None:
                console.print(shown)
            else:
                live.update(shown, refresh=True)
            time.sleep(1.0)


def _drawn(found: list[StreamStatus]) -> Group | Text:
    """Return two tables, of backlogs and of the last minute."""
    if not found:
        return Text("no streams: `sutra stream send NAME` begins one")
    backlog = _table("stream", "waiting", "use", "unread", "texts", "dead", "throttle", "load",
                     "devices", "events")  # fmt: skip
    latency = _table("stream", "per s", *(f"p{share}" for share in PERCENTILES), "chunk",
                     "formed", "errors", "overlap", "cosine")  # fmt: skip
    for one in found:
        backlog.add_row(*_backlog_row(one))
        latency.add_row(*_latency_row(one))
    note = "last minute; p50 to p99: ms end to end; chunk, formed: p95 ms of computing, forming a batch"
    faults = [
        plain(f"stream {_shown(one.name)}: {fault}", style="red")
        for one in found
        for fault in one.faults
    ]
    return Group(backlog, Text(), latency, Text(note, style="dim", no_wrap=True), *faults)


def _shown(name: str) -> str:
    """Return a stream's name; one that no stream can have is quoted."""
    return name if is_stream(name) else repr(name)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _backlog_row(one: StreamStatus) -> list[str | Text]:
    marks = (" (closed)" if one.closed else "") + (" (fault)" if one.faults else "")
    return [
        plain(_shown(one.name) + marks),
        f"{one.size:,}",
        _share(one.buffer_use),
        f"{one.unread:,}",
        f"{one.open_texts:,}",
        f"{one.dead:,}",
        f"{one.throttle_rate:.1f}",
        _share(one.load),
        str(one.devices),
        str(one.totals.get("backpressure_events", 0)),
    ]


def _latency_row(one: StreamStatus) -> list[str | Text]:
    measured = one.measured
    latency = percentiles(measured.latency)
    return [
        plain(_shown(one.name)),
        f"{one.per_s:,.1f}",
        *(_ms(latency.get(share)) for share in PERCENTILES),
        _ms(percentiles(measured.chunk).get(95)),
        _ms(percentiles(measured.formation).get(95)),
        f"{measured.error_rate:.2%}",
        f"{measured.overlap_ratio:.1%}",
        "-" if measured.consistency is None else f"{measured.consistency:.4f}",
    ]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def run_dead(options: Settings, stream: str, *, retry: bool, drop: bool) -> None:
    """List a stream's dead letters without their texts, send them again, or drop them."""
    with connected(options) as client:
        letters: Any = client.xrange(keys.stream(check_stream(stream), "dead"))
        if not letters:
            Console().print("no dead letters")
        elif retry or drop:
            dead = keys.stream(stream, "dead")
            for entry_id, fields in letters:
                if retry:
                    again = _again(fields)
                    pairs = [one for pair in again.fields.items() for one in pair]
                    target = keys.stream(stream, again.part)
                    RETRY(client, dead_letters=dead, target=target, id=entry_id, fields=pairs)
                else:
                    client.xdel(dead, entry_id)
            Console().print(f"{len(letters)} {'sent again' if retry else 'dropped'}")
        else:
            Console().print(_dead_table(letters))


def _dead_table(letters: list[tuple[bytes, dict[bytes, bytes]]]) -> Table:
    table = _table("entry", "id", "reason")
    for entry_id, fields in letters:
        source = fields.get(b"id") or fields.get(b"source") or b""
        if b"unreadable" in fields:
            source = b"response " + fields[b"unreadable"]
        reason = fields.get(b"reason", b"")
        table.add_row(*(plain(one.decode(errors="replace")) for one in (entry_id, source, reason)))
    return table


def _again(letter: dict[bytes, bytes]) -> _Again:
    """Return what a dead letter is sent again as.

    A response that a reader could not read goes to the output, for readers of another release. A letter
    with a position is a part of a text that has gone on without it: it becomes a text.
    """
    if b"unreadable" in letter:
        return _Again("out", _without(letter, b"reason", b"unreadable"))
    if b"position" in letter:
        text = {b"text": letter[b"text"], b"id": letter[b"source"] + b"@" + letter[b"position"]}
        return _Again("in", text)
    return _Again("in", _without(letter, b"reason", b"deliveries"))


def _without(letter: dict[bytes, bytes], *names: bytes) -> dict[Any, Any]:
    return {name: value for name, value in letter.items() if name not in names}


def run_delete(options: Settings, stream: str, *, force: bool) -> None:
    """Delete a stream and everything in it; one that holds work only if forced."""
    with connected(options) as client:
        found = stream_status(client, check_stream(stream))
        if not found:
            raise _unknown(stream)
        (one,) = found
        if one.faults and not force:
            raise SutraError(
                f"stream {stream} has a fault, and its keys may hold work: {one.faults[0]}. --force "
                "deletes them as well"
            )
        if one.size + one.unread + one.dead + one.open_texts and not force:
            raise SutraError(
                f"stream {stream} holds work: {one.size} entries wait, {one.unread} responses are "
                f"unread, {one.open_texts} texts are open, {one.dead} are dead letters. --force deletes "
                "them as well"
            )
        client.srem(keys.streams(), stream)
        if names := list(client.scan_iter(keys.stream(stream, "*"), count=1000)):
            client.delete(*names)
    Console().print(plain(f"deleted {stream}"))
