"""Any interleaving of producers, devices, deaths and repeats: every text is answered once."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Any

import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from sutra_tasks import keys
from sutra_tasks.streaming import upkeep_store
from sutra_tasks.streaming.backpressure import Level
from sutra_tasks.streaming.chunker import TextProgress
from sutra_tasks.streaming.client.producer_core import ADD_ENTRIES
from sutra_tasks.streaming.upkeep_store import StreamState
from tests.redis.streams.peers import (
    AFTER,
    BUFFERED,
    CLOSED,
    DEAD,
    ERROR,
    FIRST_NEED,
    IN,
    OUT,
    RESPONSE,
    TAKEABLE,
    TEXTS,
    Device,
    S,
    backlog,
    expire,
    grew,
    silence,
    written,
)

if TYPE_CHECKING:
    from sutra_tasks.streaming.delivered import CommitResult, OpenText, RawEntry

NUMBERED, PLAIN, OTHER = WRITTEN = ("numbered", "plain", "other")
"""Keys of texts that are written in pieces; the pieces of one have numbers, and may come again."""
CAPACITY = 6
DEVICES = 3

FATES = ("commit", "error", "dead letter", "keep")
"""What a device does with an entry or a text that it has taken."""

index = st.integers(0, 10**6)
fates = st.lists(st.sampled_from(FATES), min_size=1, max_size=4)


class Writer:
    """A producer's view of the texts of one key: one after the other, in pieces."""

    def __init__(self, key: str) -> None:
        self.key, self.texts, self.pieces = key, 0, list[dict[str, Any]]()

    @property
    def source(self) -> str:
        return f"{self.key}-{self.texts}"

    def piece(self, ahead: int, content: str, *, ends: bool) -> dict[str, Any]:
        found = {"key": self.key, "id": self.source, "text": content}
        if self.key == NUMBERED:
            found["seq"] = str(len(self.pieces) + ahead)
        return {**found, "end": "1"} if ends else found

    def accepted(self, piece: dict[str, Any]) -> None:
        self.pieces.append(piece)
        if "end" in piece:
            self.texts, self.pieces = self.texts + 1, []


class StreamMachine(RuleBasedStateMachine):
    """One stream, its producers and its devices; a device that is thought dead may still commit."""

    client: redis.Redis

    def __init__(self) -> None:
        super().__init__()
        self.client.flushdb()
        self.client.sadd(keys.streams(), S)
        self.names = self.batches = self.contents = 0
        self.devices = [self.new_device() for _ in range(DEVICES)]
        self.writers = {key: Writer(key) for key in WRITTEN}
        self.entries: list[tuple[Device, RawEntry]] = []
        self.texts: list[tuple[Device, OpenText]] = []
        self.commits: list[Callable[[], CommitResult]] = []
        self.whole: set[bytes] = set()
        self.expected: defaultdict[bytes, bytes] = defaultdict(bytes)
        self.given_up = Counter[bytes]()

    def new_device(self) -> Device:
        self.names += 1
        return Device(self.client, f"device {self.names}")

    def new_content(self) -> str:
        self.contents += 1
        return f"<{self.contents}>"

    # Producers.

    @rule(
        kinds=st.lists(
            st.tuples(st.sampled_from(["whole", "again", *WRITTEN]), st.booleans()),
            min_size=1,
            max_size=8,
        ),
        is_repeated=st.booleans(),
    )
    def send(self, kinds: list[tuple[str, bool]], *, is_repeated: bool) -> None:
        """Add a batch; if its answer is lost, it is sent again."""
        entries: list[dict[str, Any]] = []
        ended = set[str]()
        for kind, ends in kinds:
            content = self.new_content()
            if kind == "whole":
                entries.append({"id": content, "text": content})
            elif kind == "again":
                entries += self.writers[NUMBERED].pieces[-1:] if NUMBERED not in ended else []
            elif kind not in ended:
                ahead = sum(one.get("key") == kind and one not in self.writers[kind].pieces
                            for one in entries)  # fmt: skip
                entries.append(self.writers[kind].piece(ahead, content, ends=ends))
                ended |= {kind} if ends else set()
        if not entries:
            return
        self.batches += 1
        added = self.add(entries)
        if is_repeated:
            assert self.add(entries) == added
        for entry in entries[:added]:
            self.accept(entry)

    def add(self, entries: list[dict[str, Any]]) -> int:
        flat = [[one for pair in entry.items() for one in pair] for entry in entries]
        added, *_ = ADD_ENTRIES(
            self.client,
            entries=IN,
            closed_entries=CLOSED,
            state=keys.stream(S, "state"),
            last_batch=keys.stream(S, "by:producer"),
            streams=keys.streams(),
            totals=keys.stream(S, "totals"),
            stream=S,
            batch=self.batches,
            default_capacity=CAPACITY,
            priorities=[0] * len(flat),
            field_counts=[len(one) for one in flat],
            fields=[one for fields in flat for one in fields],
        )
        return int(added)

    def accept(self, entry: dict[str, Any]) -> None:
        writer = self.writers.get(entry.get("key", ""))
        if writer is None:
            self.whole.add(entry["id"].encode())
        elif entry not in writer.pieces:
            self.expected[entry["id"].encode()] += entry["text"].encode()
            writer.accepted(entry)

    @rule()
    def send_as_any_client(self) -> None:
        """Add with ``XADD``, heeding nothing: it fails while the stream is closed."""
        content = self.new_content()
        entry: Any = {"id": content, "text": content}
        with suppress(redis.ResponseError):
            self.client.xadd(IN, entry)
            self.accept(entry)

    # Devices.

    @rule(which=index, most=st.integers(1, 12), most_bytes=st.integers(1, 20), fates=fates, done=index)
    def work(self, which: int, most: int, most_bytes: int, fates: list[str], done: int) -> None:
        """Take what there is, and do something with all that this device has taken and kept so far."""
        device = self.devices[which % DEVICES]
        found = device.read(S, most, first_need=1, most_unread=1000).entries
        for entry in [*device.claim(S, 30).entries, *found]:
            assert b"key" not in entry[1]
            self.entries.append((device, entry))
        for text in device.take_texts(S, most, lease_s=60, most_bytes=most_bytes).texts:
            self.texts.append((device, text))
        fate = cycle(fates)
        self.settle_entries(device, [(one, next(fate)) for who, one in self.entries if who is device])
        for one in [one for who, one in self.texts if who is device]:
            self.settle_text(device, one, next(fate), done, 1 + done % 7)

    @precondition(lambda self: self.entries or self.texts)
    @rule(fate=st.sampled_from(FATES), done=index)
    def commit_late(self, fate: str, done: int) -> None:
        """A device does something with the oldest it has; another may have that by now."""
        if self.entries:
            device, entry = self.entries[0]
            self.settle_entries(device, [(entry, fate)])
        if self.texts:
            self.settle_text(*self.texts[0], fate, done, 1 + done % 7)

    def settle_entries(self, device: Device, entries: list[tuple[RawEntry, str]]) -> None:
        """Commit entries in one response, or as an error each; or make them dead letters."""
        for entry, fate in entries:
            if fate != "keep":
                self.entries.remove((device, entry))
            if fate == "error":
                answer = (entry[0], "", b"")
                self.done(partial(device.commit, S, error_of(entry), [answer]))
            elif fate == "dead letter":
                letters = self.client.xlen(DEAD)
                for _ in range(2):  # the answer to the first was lost
                    device.dead_letter(S, entry, ["reason", "died"], error_of(entry))
                self.given_up[source_of(entry)] += self.client.xlen(DEAD) - letters
        answers = [answer_of(entry) for entry, fate in entries if fate == "commit"]
        if answers:
            self.done(partial(device.commit, S, RESPONSE, answers))

    def settle_text(self, device: Device, text: OpenText, fate: str, done: int, need: int) -> None:
        """Commit a stretch of a text, or make all of it that was taken a dead letter."""
        if fate == "keep":
            return
        self.texts.remove((device, text))
        is_all = fate in ("error", "dead letter") or done % 2
        size, letters = len(text.buffer), self.client.xlen(DEAD)
        letter = ["text", text.buffer] if fate == "dead letter" else []
        self.cut(device, text, size if is_all else done % (size + 1), need, letter)
        self.given_up[text.buffer] += self.client.xlen(DEAD) - letters

    def cut(
        self, device: Device, text: OpenText, done: int, need: int = 1, letter: Sequence[Any] = ()
    ) -> None:
        at = text.progress.position + done
        ended = AFTER[text.ending] == "ended"
        self.done(
            partial(
                device.commit_text,
                S,
                text,
                done_bytes=done,
                progress=TextProgress(at, text.progress.number + 1, at),
                need=need,
                text_after="open" if ended and done < len(text.buffer) else AFTER[text.ending],
                response=["source", text.source, "text", text.buffer[:done]] if done else [],
                letter=letter,
            )
        )

    def done(self, commit: Callable[[], CommitResult]) -> None:
        commit()
        assert commit().entries == 0  # the answer to the first was lost
        self.commits.append(commit)

    @precondition(lambda self: self.commits)
    @rule(which=index)
    def commit_again(self, which: int) -> None:
        """A device that was thought dead commits what is long done."""
        assert self.commits[which % len(self.commits)]().entries == 0

    @rule(which=index, deliveries=st.integers(-1, 2))
    def refresh_or_requeue(self, which: int, deliveries: int) -> None:
        device = self.devices[which % DEVICES]
        if deliveries < 0:
            device.refresh(S, *self.taken_by(device), 60)
        else:
            device.requeue(S, *self.taken_by(device), deliveries)

    def taken_by(self, device: Device) -> tuple[list[bytes], list[OpenText]]:
        entries = [entry[0] for owner, entry in self.entries if owner is device]
        return entries, [text for owner, text in self.texts if owner is device]

    @rule(which=index, is_dead=st.booleans())
    def fall_silent(self, which: int, *, is_dead: bool) -> None:
        device = self.devices[which % DEVICES]
        if ids := [entry[0] for owner, entry in self.entries if owner is device]:
            owned: Any = self.client.xpending_range(
                self.stream(), keys.DEVICES_GROUP, "-", "+", 1000, device._incarnation
            )
            if found := [one["message_id"] for one in owned if one["message_id"] in ids]:
                silence(self.client, device._incarnation, *found, stream=self.stream())
        expire(self.client)
        if is_dead:
            self.devices[which % DEVICES] = self.new_device()

    # Upkeep.

    @rule(key=st.sampled_from(WRITTEN), may_abandon=st.booleans())
    def flush(self, key: str, *, may_abandon: bool) -> None:
        """Numbered texts are not abandoned: the pieces behind would be errors."""
        is_over = may_abandon and key != NUMBERED
        grew(self.client, upkeep_store.ABANDONED_S + 9 if is_over else 9, key)
        self.devices[0].flush_texts(S, 5)

    @rule()
    def close_or_open(self) -> None:
        is_closed = self.client.type(IN) == b"string"
        state = StreamState(backlog(self.client), is_closed, 0, Level.NORMAL, {})
        self.devices[0].enforce_hard_limit(S, state, CAPACITY // 2)

    @rule()
    def forget_scripts(self) -> None:
        self.client.script_flush()

    def stream(self) -> str:
        return CLOSED if self.client.exists(CLOSED) else IN

    # Laws.

    @invariant()
    def buffered_adds_up(self) -> None:
        with self.client.pipeline(transaction=False) as pipe:
            for key in WRITTEN:
                pipe.hget(keys.stream(S, f"text:{key}"), "bytes")
            pipe.get(BUFFERED)
            pipe.zrange(TEXTS, 0, -1)
            *sizes, buffered, texts = pipe.execute()
        found = {key.encode(): int(size) for key, size in zip(WRITTEN, sizes, strict=True) if size}
        assert sum(found.values()) == int(buffered or 0)
        assert set(texts) == found.keys()

    def teardown(self) -> None:
        self.read_all()
        assert self.client.exists(CLOSED, TEXTS, TAKEABLE, BUFFERED) == 0
        assert not any(self.client.exists(keys.stream(S, f"pieces:{key}")) for key in WRITTEN)
        answered, texts = Counter[bytes](), defaultdict[bytes, bytes](bytes)
        for fields in written(self.client):
            if b"source" in fields:
                texts[fields[b"source"]] += fields[b"text"]
            else:
                chunks = [one["id"] for one in json.loads(fields.get(b"chunks", b"[]"))]
                names = chunks or json.loads(fields[b"ids"])
                answered.update(name.encode() for name in names)
        assert answered == Counter(self.whole)
        assert texts == {source: text for source, text in self.expected.items() if text}
        assert Counter(fields[b"text"] for fields in written(self.client, DEAD)) == +self.given_up
        self.client.delete(IN, OUT, DEAD, keys.streams())
        assert [name for name in self.client.scan_iter() if self.client.ttl(name) == -1] == []

    def read_all(self) -> None:
        """End all texts, and let a last device do all there is."""
        last = self.devices[0]
        for writer in self.writers.values():
            while self.client.exists(CLOSED):
                self.work_off(last)
            last_piece: dict[Any, Any] = writer.piece(0, "", ends=True)
            self.client.xadd(IN, last_piece)
        for _ in range(100):
            if not self.client.xlen(IN) and not self.client.exists(TEXTS):
                return
            self.work_off(last)
        raise AssertionError("the stream is not worked off")

    def work_off(self, device: Device) -> None:
        with suppress(redis.ResponseError):  # nobody has read yet
            owned: Any = self.client.xpending_range(self.stream(), keys.DEVICES_GROUP, "-", "+", 1000)
            for one in owned:
                name = one["consumer"].decode()
                silence(self.client, name, one["message_id"], stream=self.stream())
        expire(self.client)
        found = list(device.read(S, 100, first_need=FIRST_NEED, most_unread=1000).entries)
        while claimed := device.claim(S, 30).entries:
            found += claimed
        for entry in found:
            device.commit(S, RESPONSE, [answer_of(entry)])
        for text in device.take_texts(S, 100, lease_s=60, most_bytes=10**6).texts:
            self.cut(device, text, len(text.buffer))
        device.enforce_hard_limit(S, StreamState(0, True, 0, Level.NORMAL, {}), 100)


def error_of(entry: RawEntry) -> list[str]:
    return [*ERROR[:4], "ids", json.dumps([source_of(entry).decode()])]


def answer_of(entry: RawEntry) -> tuple[bytes, str, bytes]:
    return entry[0], json.dumps({"id": source_of(entry).decode()}), entry[0]


def source_of(entry: RawEntry) -> bytes:
    return entry[1][entry[1].index(b"id") + 1]


def test_whatever_happens_every_text_is_answered_once_to_the_byte(client: redis.Redis) -> None:
    class OnServer(StreamMachine):
        pass

    OnServer.client = client
    run_state_machine_as_test(
        OnServer,
        settings=settings(
            max_examples=60,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    client.flushdb()
