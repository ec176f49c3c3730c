"""Whatever stands on our queues: no worker ends, no other message waits, and its sender is told."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import uuid
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from sutra_tasks import keys
from sutra_tasks.broker.dead_letters import dead_letters, drop
from sutra_tasks.client.embed_task import embed
from sutra_tasks.errors import InvalidMessageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import redis

    from tests.system.local_fleet import LocalFleet

ROOT = Path(__file__).parents[2]
GOOD = b'[["hi"], {}, {}]'
TOLD_S = 20.0


def raw(body: bytes = GOOD, *, queue: str = keys.EMBED_QUEUE, **headers: Any) -> tuple[str, str]:
    """Return a message as a foreign client sends it, and its id; ``...`` removes a header."""
    task_id = uuid.uuid4().hex
    known = {"task": keys.EMBED_TASK, "id": task_id, "lang": "py", **headers}
    message = {
        "body": base64.b64encode(body).decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {name: value for name, value in known.items() if value is not ...},
        "properties": {
            "delivery_tag": uuid.uuid4().hex,
            "body_encoding": "base64",
            "delivery_info": {"exchange": "", "routing_key": queue},
        },
    }
    return json.dumps(message), task_id


@pytest.fixture
def client(fleet: LocalFleet) -> redis.Redis:
    return fleet.client


@pytest.fixture
def unharmed(fleet: LocalFleet, client: redis.Redis, wait_until: Callable[..., None]) -> Iterator[None]:
    """See that no worker ended, no message is left, and calls are answered."""
    pids = dict(fleet.supervisor.pids)
    yield
    np.testing.assert_allclose(np.linalg.norm(embed.delay("beside").get(timeout=TOLD_S)), 1.0, rtol=1e-5)
    wait_until(fleet.is_empty)
    assert dict(fleet.supervisor.pids) == pids
    drop(client, dead_letters(client))


@pytest.mark.parametrize(
    ("body", "headers", "field"),
    [
        (b'[["hi"], {}]', {}, "body"),
        (b"5", {}, "body"),
        (b"[[", {}, "body"),
        (b"[" * 100_000, {}, "body"),
        (b'[["hi"], {}]', {"sutra_attempts": 3}, None),
        (GOOD, {"compression": "application/zstd-none"}, "headers.compression"),
        (zlib.compress(b" " * (200 << 20)), {"compression": "application/x-gzip"}, "body"),
        (b"x", {"compression": "application/x-gzip"}, "body"),
        (GOOD, {"expires": "soon"}, "headers.expires"),
        (GOOD, {"eta": [5]}, "headers.eta"),
        (GOOD, {"task": "myapp.tasks.add"}, "headers.task"),
        (b'[["hi"], {}, {"callbacks": ["x"]}]', {}, "body[2].callbacks[0]"),
        (b'[["hi"], {}, {"chord": 5}]', {}, "body[2].chord"),
    ],
)
@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.usefixtures("unharmed")
def test_a_sender_with_a_readable_id_is_told_what_is_wrong(
    fleet: LocalFleet, body: bytes, headers: Any, field: str | None, direct: bool
) -> None:
    queue = keys.device_queue(fleet.device_ids[0]) if direct else keys.EMBED_QUEUE
    message, task_id = raw(body, queue=queue, **headers)
    fleet.client.lpush(queue, message)
    error = embed.AsyncResult(task_id).get(timeout=TOLD_S, propagate=False)
    if field is None and not direct:
        assert type(error).__name__ == "PoisonMessageError"
    else:
        assert isinstance(error, InvalidMessageError)
        assert error.field == (field or "body")


@pytest.mark.parametrize("queue", [keys.EMBED_QUEUE, keys.CONTROL_QUEUE, "device"])
@pytest.mark.parametrize(
    "message",
    [
        raw(id=...)[0].encode(),
        raw(id=["x"])[0].encode(),
        b'{"body": "x", "properties": {"delivery_tag": "1", "body_encoding": "base64"}}',
        b"no json \xff\x00",
        b"[" * 100_000,
        b"null",
    ],
)
@pytest.mark.usefixtures("unharmed")
def test_a_message_without_a_readable_id_becomes_a_dead_letter(
    fleet: LocalFleet,
    client: redis.Redis,
    wait_until: Callable[..., None],
    queue: str,
    message: bytes,
) -> None:
    name = keys.device_queue(fleet.device_ids[0]) if queue == "device" else queue
    client.lpush(name, message)
    wait_until(lambda: dead_letters(client))
    [letter] = dead_letters(client)
    assert letter.message.encode("utf-8", "surrogateescape") == message
    assert letter.reason


@pytest.mark.usefixtures("unharmed")
def test_what_is_published_to_the_workers_remote_control_ends_none(
    fleet: LocalFleet, client: redis.Redis
) -> None:
    for text in (
        "x",
        "5",
        "{}",
        '{"properties": {}}',
        '{"body": "x", "properties": {"delivery_tag": 1}}',
    ):
        assert client.publish("/0.celery.pidbox", text) >= len(fleet.supervisor.pids)


@pytest.mark.usefixtures("unharmed")
def test_messages_with_the_same_delivery_tag_are_all_answered(client: redis.Redis) -> None:
    ids = []
    for _ in range(20):
        message, task_id = raw()
        same = json.loads(message)
        same["properties"]["delivery_tag"] = "1"
        client.lpush(keys.EMBED_QUEUE, json.dumps(same))
        ids.append(task_id)
    for task_id in ids:
        assert embed.AsyncResult(task_id).get(timeout=TOLD_S).shape == (384,)


@pytest.mark.usefixtures("unharmed")
def test_a_result_that_can_never_be_stored_ends_as_a_dead_letter(
    client: redis.Redis, wait_until: Callable[..., None]
) -> None:
    good, task_id = raw()
    bad, other_id = raw(b"5")
    try:
        client.execute_command("ACL SETUSER default -setex")
        client.lpush(keys.EMBED_QUEUE, good, bad)
        wait_until(lambda: len(dead_letters(client)) == 2)
    finally:
        client.execute_command("ACL SETUSER default +setex")
    letters = {letter.task_id: letter for letter in dead_letters(client)}
    assert letters.keys() == {task_id, other_id}
    assert all("setex" in letter.reason for letter in letters.values())
    assert letters[task_id].message == good


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("body", [GOOD, b"5"])
def test_what_stands_in_the_place_of_a_result_is_overwritten(
    client: redis.Redis, wait_until: Callable[..., None], body: bytes
) -> None:
    message, task_id = raw(body)
    client.rpush(keys.result(task_id), "another type")
    client.lpush(keys.EMBED_QUEUE, message)
    wait_until(lambda: client.type(keys.result(task_id)) == b"string")
    embed.AsyncResult(task_id).get(timeout=TOLD_S, propagate=False)


@pytest.mark.usefixtures("unharmed")
def test_a_refused_message_tells_its_error_callbacks(client: redis.Redis) -> None:
    told = uuid.uuid4().hex
    errback = {"task": keys.EMBED_TASK, "args": ["told"], "kwargs": {}, "immutable": True,
               "options": {"task_id": told, "queue": keys.EMBED_QUEUE}}  # fmt: skip
    body = json.dumps([["hi"], {}, {"errbacks": [errback]}]).encode()
    message, _ = raw(body, expires="soon")
    client.lpush(keys.EMBED_QUEUE, message)
    assert embed.AsyncResult(told).get(timeout=TOLD_S).shape == (384,)


def test_a_fuzzed_fleet_keeps_serving_and_tells_everybody(tmp_path: Path) -> None:
    report = tmp_path / "fuzz.json"
    command = [sys.executable, "-m", "scripts.benchmarks", "fuzz", "--quick", "--json", str(report)]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SUTRA_")}
    done = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(report.read_text())["results"]
    assert (results["deaths"], results["untold"], results["blocked"]) == (0, 0, 0), done.stdout
