"""What foreign and damaged messages do to a live fleet: to its workers, its senders, and calls beside.

A fleet with a router, two simulated devices and a distill worker gets seeded messages on every queue,
while a client calls ``embed`` all the time. ``deaths`` counts workers that ended, ``untold`` messages
whose sender heard nothing of this package (and, without an id, that became no dead letter), ``blocked``
calls beside them that were not answered within :data:`CALL_S`, and messages that are left. ``p50_ratio``
compares the calls' median latency with that beside as fast a flood of valid calls.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import redis
from celery.exceptions import TimeoutError as CeleryTimeoutError

from scripts.benchmarks.local import bench_fleet
from scripts.benchmarks.message_fuzzer import FuzzedMessage, Fuzzer
from scripts.benchmarks.report import percentile
from sutra_tasks import errors as errors_module
from sutra_tasks import keys
from sutra_tasks.broker.dead_letters import dead_letters
from sutra_tasks.broker.queues import queue_lengths
from sutra_tasks.client.embed_task import embed
from sutra_tasks.errors import FleetSaturated
from sutra_tasks.host.embedded_server import embedded_server
from sutra_tasks.settings import Settings

__all__ = ["run"]

MESSAGES: Final = 3000
QUICK_MESSAGES: Final = 300
SEED: Final = 14
DEVICES: Final = 2
CALL_S: Final = 10.0
"""Seconds after which a call beside the messages counts as blocked."""
TOLD_S: Final = 60.0
"""Seconds after the last message within which every sender must have been told."""
MESSAGES_AT_ONCE: Final = 20
OUR_MODULES: Final = (errors_module.__name__,)


class _Caller(threading.Thread):
    """Calls ``embed`` all the time, and times each call."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seconds: list[float] = []
        self.blocked = 0
        self.ended = threading.Event()

    def run(self) -> None:
        """Call until ``ended`` is set."""
        while not self.ended.is_set():
            began = time.perf_counter()
            try:
                vector = embed.delay("beside").get(timeout=CALL_S)
            except (CeleryTimeoutError, FleetSaturated):
                self.blocked += 1
            else:
                assert vector.shape == (384,)
                self.seconds.append(time.perf_counter() - began)


def run(*, quick: bool, messages: int | None = None, seed: int = SEED) -> dict[str, Any]:
    """Measure.

    Args:
        quick: few messages, to see that it works.
        messages: how many.
        seed: of the messages.
    """
    count = messages or (QUICK_MESSAGES if quick else MESSAGES)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sutra-fuzz-")))
        for name in ("texts", "models"):
            (folder / name).mkdir()
        address = stack.enter_context(embedded_server())
        options = Settings(
            broker_url=address, engine="simulated", data_dir=str(folder / "texts"),
            models_dir=str(folder / "models"), result_ttl_s=3600,
        )  # fmt: skip
        fleet = stack.enter_context(bench_fleet(options, devices=DEVICES))
        client = stack.enter_context(redis.Redis.from_url(address))
        pids = dict(fleet.supervisor.pids)
        fuzzer = Fuzzer(seed, [one.id for one in fleet.devices])
        valid, _ = _told_beside_calls(client, list(fuzzer.valid_messages(count // 3)))
        sent = list(fuzzer.messages(count))
        caller, untold = _told_beside_calls(client, sent)
        fleet.supervisor.step(time.monotonic())
        after = fleet.supervisor.pids
        deaths = sum(after.get(name) != pid for name, pid in pids.items())
        left = sum(queue_lengths(client, list(keys_of_queues(fleet.devices))).values())
        for one, what in untold[:20]:
            print(f"untold ({what}): {one.queue} {', '.join(one.changes)}")
            print("  ", one.raw[:400].decode(errors="replace"))
    return {
        "messages": len(sent),
        "deaths": deaths,
        "untold": len(untold),
        "blocked": caller.blocked + left,
        "calls_beside": len(caller.seconds),
        "beside_valid_ms": _percentiles(valid.seconds),
        "beside_fuzzed_ms": _percentiles(caller.seconds),
        "p50_ratio": statistics.median(caller.seconds) / statistics.median(valid.seconds),
    }


def keys_of_queues(devices: Any) -> list[str]:
    """Return the names of all queues of a fleet."""
    queues = [keys.EMBED_QUEUE, keys.CONTROL_QUEUE, keys.DISTILL_QUEUE]
    return [*queues, *(keys.device_queue(one.id) for one in devices)]


def _told_beside_calls(
    client: redis.Redis, sent: list[FuzzedMessage]
) -> tuple[_Caller, list[tuple[FuzzedMessage, str]]]:
    """Send messages beside calls; return the caller, and the messages whose sender was not told."""
    caller = _Caller()
    caller.start()
    _send(client, sent)
    untold = _untold(client, sent)
    caller.ended.set()
    caller.join(2 * CALL_S)
    return caller, untold


def _percentiles(seconds: list[float]) -> dict[str, float]:
    return {f"p{share}": 1000 * percentile(seconds, share / 100) for share in (50, 95)}


def _send(client: redis.Redis, sent: list[FuzzedMessage]) -> None:
    """Send the messages, a few at once, as fast as they are taken."""
    for at in range(0, len(sent), MESSAGES_AT_ONCE):
        for one in sent[at : at + MESSAGES_AT_ONCE]:
            client.lpush(keys.named(one.queue), one.raw)
        deadline = time.monotonic() + CALL_S
        while client.llen(keys.named(keys.EMBED_QUEUE)) and time.monotonic() < deadline:
            time.sleep(0.002)


def _untold(client: redis.Redis, sent: list[FuzzedMessage]) -> list[tuple[FuzzedMessage, str]]:
    """Return the messages whose sender was not told, once nothing more can be expected."""
    deadline = time.monotonic() + TOLD_S
    while True:
        letters = Counter(one.message for one in dead_letters(client))
        found = [(one, what) for one in sent if (what := _problem(client, one, letters))]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def _problem(client: redis.Redis, one: FuzzedMessage, letters: Counter[str]) -> str:
    """Return what is wrong with how the sender of a message was told; empty: nothing."""
    if one.id is None:
        text = one.raw.decode("utf-8", "surrogateescape")
        return "" if letters[text] or _is_nothing(one.raw) else "no dead letter"
    stored: Any = client.get(keys.result(one.id))
    if stored is None:
        return "" if _ignores_result(one.raw) or letters_name(letters, one.id) else "no result"
    record = json.loads(stored)
    if record["status"] in ("SUCCESS", "REVOKED"):
        return ""
    error = record.get("result") or {}
    if record["status"] != "FAILURE":
        return f"state {record['status']}"
    ours = error.get("exc_module") in OUR_MODULES
    return "" if ours else f"{error.get('exc_module')}.{error.get('exc_type')}"


def letters_name(letters: Counter[str], task_id: str) -> bool:
    """Return whether a dead letter has this id in it."""
    return any(json.dumps(task_id)[1:-1] in text for text in letters)


def _is_nothing(raw: bytes) -> bool:
    return raw == b""


def _ignores_result(raw: bytes) -> bool:
    """Return whether the sender wants no result, or a time far ahead."""
    message = json.loads(raw)
    headers = message.get("headers") or {}
    if not isinstance(headers, dict):
        return False
    silent = headers.get("task") in (keys.HEALTH_TASK, keys.MEMORY_TASK, keys.PART_TASK)
    ahead = str(headers.get("eta")).startswith("9999")
    return headers.get("ignore_result") is True or silent or ahead
