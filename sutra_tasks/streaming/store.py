"""A stream as device workers see it: what they take from the server and give back to it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import redis

from sutra_tasks import keys
from sutra_tasks.streaming import scripts
from sutra_tasks.streaming.backpressure import ACTIONS, Level
from sutra_tasks.streaming.chunker import Progress
from sutra_tasks.streaming.entries import MOST_NAME_CHARS

if TYPE_CHECKING:
    from sutra_tasks.streaming.chunker import Ending

__all__ = ["Claimed", "OpenText", "RawEntry", "Read", "Server", "Stored", "StreamState"]

HARD_LIMIT: Final = 2
"""Times its capacity at which a stream is closed to ``XADD`` itself."""
MOST_NAME_BYTES: Final = 4 * MOST_NAME_CHARS
MOST_BUFFERED_BYTES: Final = 16_000_000
"""Of texts that are being written and wait to be cut: above it entries stay in the stream."""
MOST_OPEN_TEXTS: Final = 10_000
ABANDONED_S: Final = 24 * 3600
"""Seconds without growth after which a text is over, though nobody ended it."""
TURN_MS: Final = 150
"""Milliseconds that pass at least between two looks after a stream, by whichever device."""

RawEntry = tuple[bytes, list[bytes]]


@dataclass(frozen=True, slots=True, repr=False)
class Read:
    """What was to be had at one moment.

    Attributes:
        entries: this consumer's now.
        ready: texts that can be taken.
        last: the id behind which new entries will be; None: there were some, or it cannot be waited for.
    """

    entries: Sequence[RawEntry]
    ready: int
    last: bytes | None


@dataclass(frozen=True, slots=True, repr=False)
class Claimed:
    """Entries over which a consumer fell silent, and how often they had been delivered before."""

    deliveries: int
    entries: Sequence[RawEntry]


@dataclass(frozen=True, slots=True, repr=False)
class OpenText:
    """A text that is being written, taken for a while.

    Attributes:
        key: its key.
        token: says that nobody else has taken it since.
        attempts: how often it was, without having gone on.
        ending: how it ends; None: it may go on, or there is more of it than this.
        buffer: UTF-8 from ``progress.position`` on.
        source: its id.
        prompt: its prompt.
        progress: how far it is.
        arrived_ms: when it last grew.
    """

    key: bytes
    token: bytes
    attempts: int
    ending: Ending | None
    buffer: bytes
    source: str
    prompt: str | None
    progress: Progress
    arrived_ms: int


@dataclass(frozen=True, slots=True)
class Stored:
    """An answer to a commit: the server's time, and how many entries were committed just then."""

    at_ms: float
    entries: int


@dataclass(frozen=True, slots=True)
class StreamState:
    """What is known of a stream at one moment."""

    size: int
    closed: bool
    unread: int
    level: Level
    loads: Mapping[str, float]


class Server:
    """The server's part in streaming; safe to use from many threads."""

    def __init__(self, client: redis.Redis, incarnation: str) -> None:
        """Use ``client`` under a consumer's name; its answers are bytes."""
        self._client, self._me = client, incarnation
        self._scripts = {
            name: client.register_script(getattr(scripts, name))
            for name in scripts.__all__
            if name not in ("OUTPUT_GROUP", "ADD", "LEAVE")
        }

    def streams(self) -> list[str]:
        """Return the names of all streams."""
        found: Any = self._client.smembers(keys.STREAMS)
        return sorted(name.decode(errors="replace") for name in found)

    def read(self, stream: str, most: int, *, first_need: int, most_unread: int) -> Read:
        """Take entries; pieces of texts go to their texts.

        Args:
            stream: the stream.
            most: entries.
            first_need: characters from which on a new text may be cut.
            most_unread: responses at which nothing is taken until somebody has read some.
        """
        found: Any = self._run(
            "READ",
            [*_both(stream), *_parts(stream, "texts", "ready", "buffered", "out")],
            [scripts.GROUP, self._me, most, *_prefixes(stream), MOST_BUFFERED_BYTES, first_need,
             MOST_NAME_BYTES, most_unread],
        )  # fmt: skip
        last, entries, ready = found
        return Read([(entry_id, fields) for entry_id, fields in entries], ready, last or None)

    def await_entries(self, behind: Mapping[str, bytes], timeout_s: float) -> None:
        """Return once there is an entry behind those ids, or after a while."""
        ids: dict[Any, Any] = {keys.stream(stream, "in"): last for stream, last in behind.items()}
        with suppress(redis.ResponseError):  # a stream was closed meanwhile
            self._client.xread(ids, count=1, block=max(1, int(1000 * timeout_s)))

    def take(self, stream: str, most: int, *, lease_s: float, most_bytes: int) -> list[OpenText]:
        """Take texts that have grown enough, or ended."""
        found: Any = self._run(
            "TAKE",
            [keys.stream(stream, "ready")],
            [most, int(1000 * lease_s), *_prefixes(stream), most_bytes],
        )
        return [
            OpenText(
                key, token, attempts, ending.decode() or None, buffer, source.decode(errors="replace"),
                prompt.decode(errors="replace") or None, Progress(*map(int, progress)), int(at),
            )
            for key, token, attempts, ending, buffer, source, prompt, *progress, at in found
        ]  # fmt: skip

    def commit(
        self, stream: str, response: Sequence[Any], entries: Iterable[tuple[bytes, str, bytes]]
    ) -> Stored:
        """Write one response, and be done with its entries: both or neither.

        Args:
            stream: the stream.
            response: names and values, one after the other.
            entries: of each its id, the JSON of its chunks, their rows; none of what others committed
                meanwhile is written.
        """
        flat = [one for entry in entries for one in entry]
        found: Any = self._run(
            "COMMIT",
            [*_both(stream), keys.stream(stream, "out")],
            [scripts.GROUP, len(response), *response, *flat],
        )
        return _stored(found)

    def commit_text(
        self,
        stream: str,
        text: OpenText,
        *,
        done_bytes: int,
        progress: Progress,
        need: int,
        how: str,
        response: Sequence[Any],
    ) -> Stored:
        """Write what was cut off a text, and how far it is: both or neither.

        Args:
            stream: the stream.
            text: as it was taken.
            done_bytes: of its buffer.
            progress: from there.
            need: bytes from which on it may be cut again.
            how: ``last``: that was its end; ``idle``: it was flushed; else ``more``.
            response: names and values, one after the other; empty: nothing is written.
        """
        found: Any = self._run(
            "COMMIT_TEXT",
            [*_parts(stream, "out", "texts", "ready", "buffered"),
             _text(stream, "text:", text.key), _text(stream, "more:", text.key)],
            [text.key, text.token, done_bytes, progress.position, progress.number, progress.covered,
             need, how, *response],
        )  # fmt: skip
        return _stored(found)

    def claim(self, stream: str, silent_s: float) -> Claimed:
        """Take over what a consumer fell silent over: one entry, or what was given back."""
        found: Any = self._run("CLAIM", _both(stream), [scripts.GROUP, self._me, int(1000 * silent_s)])
        deliveries, entries = found
        return Claimed(deliveries, [(entry_id, fields) for entry_id, fields in entries])

    def refresh(
        self, stream: str, entries: Sequence[bytes], texts: Sequence[OpenText], lease_s: float
    ) -> None:
        """Say that this consumer is still at work on them."""
        if entries:
            self._run("REFRESH", _both(stream), [scripts.GROUP, self._me, *entries])
        if texts:
            pairs = [one for text in texts for one in (text.key, text.token)]
            prefix = _prefixes(stream)[0]
            self._run("RENEW", [keys.stream(stream, "ready")], [int(1000 * lease_s), prefix, *pairs])

    def give_back(
        self, stream: str, entries: Sequence[bytes], texts: Sequence[OpenText], deliveries: int
    ) -> None:
        """Let others have them at once; entries count as delivered so often, texts as never taken."""
        if entries:
            self._run("GIVE_BACK", _both(stream), [scripts.GROUP, self._me, deliveries, *entries])
        if texts:
            pairs = [one for text in texts for one in (text.key, text.token)]
            self._run("LET_GO", [keys.stream(stream, "ready")], [_prefixes(stream)[0], *pairs])

    def give_up(self, stream: str, entry: RawEntry, reason: Sequence[Any], error: Sequence[str]) -> None:
        """Make an entry a dead letter, and tell the reader."""
        entry_id, fields = entry
        letter = [*fields, *reason]
        self._run(
            "GIVE_UP",
            [*_both(stream), keys.stream(stream, "dead"), keys.stream(stream, "out")],
            [scripts.GROUP, entry_id, len(letter), *letter, *error],
        )

    def bury(self, stream: str, text: OpenText, letter: Sequence[Any]) -> None:
        """Make what there is of a text a dead letter."""
        where = [_text(stream, "text:", text.key), keys.stream(stream, "dead")]
        self._run("DROP_TEXT", where, [text.token, len(letter), *letter])

    def turn(self, stream: str, load: float) -> StreamState | None:
        """Say how loaded this machine is; return how the stream is if it is this caller's turn."""
        with self._client.pipeline(transaction=False) as pipe:
            pipe.set(keys.stream(stream, "ticked"), self._me, nx=True, px=TURN_MS)
            pipe.type(keys.stream(stream, "in"))
            for part in ("in", "closed", "out"):
                pipe.xlen(keys.stream(stream, part))
            pipe.hget(keys.stream(stream, "state"), "level")
            pipe.hgetall(keys.STREAM_LOADS)
            mine, kind, size, closed, unread, level, loads = pipe.execute(raise_on_error=False)
        if not mine:
            return None
        is_closed = kind == b"string"
        found = {
            name.decode(): float(said.partition(b" ")[0])
            for name, said in loads.items()
            if name != self._me.encode()
        }
        return StreamState(
            closed if is_closed else size,
            is_closed,
            unread,
            Level(int(level or 0)),
            {**found, self._me: load},
        )

    def say_load(self, load: float) -> None:
        """Say how loaded this machine is; forget those that have said nothing for long."""
        self._run("SAY_LOAD", [keys.STREAM_LOADS], [self._me, f"{load:.3f}", keys.STATE_S])

    def mark(self, entry: str) -> None:
        """Say that this process runs this alone, because workers died of it before."""
        self._client.set(keys.suspect(self._me), f"stream {entry}", ex=keys.FORGET_AFTER_S)

    def unmark(self) -> None:
        """Take that back."""
        self._client.delete(keys.suspect(self._me))

    def leave(self) -> None:
        """Be no consumer any more."""
        with self._client.pipeline(transaction=False) as pipe:
            pipe.hdel(keys.STREAM_LOADS, self._me)
            pipe.delete(keys.stream_consumer(self._me))
            pipe.execute()

    def publish(
        self, stream: str, level: Level, before: Level, *, capacity: int, load: float, per_s: float
    ) -> None:
        """Tell the producers what to do."""
        action = ACTIONS[level]
        name = keys.stream(stream, "state")
        state: Mapping[Any, Any] = {
            "level": int(level),
            "capacity": capacity,
            "throttle_rate": str(action.throttle_rate),
            "shed": int(action.shed_low_priority),
            "load": f"{load:.3f}",
            "per_s": f"{per_s:.1f}",
        }
        with self._client.pipeline(transaction=False) as pipe:
            pipe.hset(name, mapping=state)
            pipe.expire(name, keys.STATE_S)
            if level > before:
                pipe.hincrby(keys.stream(stream, "totals"), "backpressure_events", 1)
                pipe.expire(keys.stream(stream, "totals"), keys.REMEMBER_S)
            pipe.execute()

    def guard(self, stream: str, state: StreamState, capacity: int) -> None:
        """Close the stream to those who ignore what it says, and open it again."""
        if state.closed:
            self._run("OPEN", _both(stream), [capacity // 2])
        elif state.size >= HARD_LIMIT * capacity:
            reason = (
                f"stream {stream} is closed: {state.size} entries wait; add again when there are fewer"
            )
            self._run("CLOSE", _both(stream), [HARD_LIMIT * capacity, reason])

    def rest(self, stream: str, idle_flush_s: float) -> None:
        """Have texts flushed that stopped growing, or for which there is no room."""
        self._run(
            "REST",
            _parts(stream, "texts", "ready", "buffered", "state"),
            [_prefixes(stream)[0], int(1000 * idle_flush_s), 1000 * ABANDONED_S, MOST_OPEN_TEXTS,
             MOST_BUFFERED_BYTES, keys.STATE_S],
        )  # fmt: skip

    def tidy(self, stream: str) -> None:
        """Forget consumers and readers that are long gone."""
        self._run(
            "TIDY",
            _parts(stream, "in", "out"),
            [1000 * keys.FORGET_AFTER_S, scripts.GROUP, scripts.OUTPUT_GROUP],
        )

    def report(self, measured: Mapping[str, Any]) -> None:
        """Publish what this device has measured."""
        self._client.set(keys.stream_consumer(self._me), json.dumps(measured), ex=keys.STATE_S)

    def _run(self, script: str, names: Sequence[Any], arguments: Sequence[Any]) -> Any:
        return self._scripts[script](keys=names, args=arguments)


def _parts(stream: str, *parts: str) -> list[str]:
    return [keys.stream(stream, part) for part in parts]


def _both(stream: str) -> list[str]:
    return _parts(stream, "in", "closed")


def _prefixes(stream: str) -> list[str]:
    return _parts(stream, "text:", "more:")


def _text(stream: str, part: str, key: bytes) -> bytes:
    return keys.stream(stream, part).encode() + key


def _stored(found: Any) -> Stored:
    seconds, micros, entries = found
    return Stored(1000 * int(seconds) + int(micros) / 1000, entries)
