"""Beside a host project's own Celery app: links, chains and chords, run by its own worker."""

import os
import sys
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from celery import Celery, chain, chord, group
from celery.exceptions import ChordError

from sutra_tasks import (
    CallbackQueueError,
    InvalidInputError,
    InvalidOptionError,
    InvalidTextError,
    embed,
    embed_many,
)
from sutra_tasks.engines.simulated_engine import vectors_of
from sutra_tasks.host.processes import spawn, stop
from tests.conftest import disconnect

HOST = """
import sutra_tasks
import celery, redis, sys
from celery import Celery

app = Celery("host", broker=sys.argv[1], backend=sys.argv[1])
app.conf.task_default_queue = "host"
store = redis.Redis.from_url(sys.argv[1])

@app.task(name="host.save")
def save(vectors, key):
    store.set(key, vectors.tobytes(), ex=60)
    return list(vectors.shape)

@app.task(name="host.shout")
def shout(text):
    return text.upper()

@app.task(name="host.stack")
def stack(parts):
    return [list(part.shape) for part in parts]

@app.task(name="host.shape")
def shape(vectors):
    return list(vectors.shape)

@app.task(name="host.note")
def note(task_id):
    store.set("failed:" + task_id, 1, ex=60)

@app.task(name="host.wait")
def wait(text):
    "What Celery forbids among the tasks of one app."
    one = sutra_tasks.embed.delay(text).get(timeout=20)
    rows = celery.group([sutra_tasks.embed.s(text)] * 2).apply_async().get(timeout=20)
    many = list(sutra_tasks.embed_many(text for _ in range(200)))
    assert all((one == row).all() for row in [*rows, *many]), "other vectors"
    return len(many), [list(one.shape)], len(wait.request.children)

@app.task(name="host.wait_for_host")
def wait_for_host():
    (shout.s("a") | sutra_tasks.embed.s()).apply_async().get(timeout=20)

app.worker_main(["--quiet", "worker", "-P", "prefork", "-c", "2", "-n", "host@%h",
                 "--without-gossip", "--without-mingle"])
"""


@contextmanager
def host_worker(server, tmp_path):
    script = tmp_path / "host.py"
    script.write_text(HOST)
    with (tmp_path / "host.log").open("wb") as log:
        environ = {**os.environ, "SUTRA_BROKER_URL": server}
        process = spawn([sys.executable, str(script), server], environ=environ, output=log)
        app = Celery("host", broker=server, backend=server, set_as_current=False)
        app.conf.task_default_queue = "host"
        try:
            yield app
        finally:
            disconnect(app.backend)
            app.close()
            stop(process, 20)


@pytest.fixture(scope="module")
def host(_shared_fleet, tmp_path_factory):
    """Run a worker of a project's own app, with forked children, beside the fleet."""
    with host_worker(_shared_fleet.options.broker_url, tmp_path_factory.mktemp("host")) as app:
        yield app


def task(host, name, *args, **options):
    return host.signature(f"host.{name}", args=args, **options).set(queue="host")


def test_links_chains_and_chords_of_a_host_app_run_on_its_worker(fleet, host, wait_until):
    linked = task(host, "save", kwargs={"key": "linked"})
    embed.apply_async(("text",), link=linked).get(timeout=30)
    wait_until(lambda: fleet.client.exists("linked"))

    saved = chain(embed.s(["a", "b"]), task(host, "save", kwargs={"key": "chained"})).apply_async()
    assert saved.get(timeout=30) == [2, 384]

    upper = chain(task(host, "shout", "loud"), embed.s(details=True)).apply_async().get(timeout=30)
    assert (upper.vectors == embed.delay("LOUD").get(timeout=30)).all()

    header = [embed.s("a"), embed.s(["b", "c"]), embed.s([])]
    shapes = chord(header, task(host, "stack")).apply_async()
    assert shapes.get(timeout=30) == [[384], [2, 384], [0, 384]]


@pytest.mark.usefixtures("fleet")
def test_canvases_in_canvases_give_what_their_parts_give(host):
    shape, stack, shout = task(host, "shape"), task(host, "stack"), task(host, "shout", "a")
    groups = group(embed.s("a"), group(embed.s(["b"]), embed.s(["c", "d"])))
    assert [rows.shape for rows in groups().get(timeout=30)] == [(384,), (1, 384), (2, 384)]
    spread = chain(embed.s(["a", "b"]), group(shape, shape))
    assert spread.apply_async().get(timeout=30) == [[2, 384]] * 2
    gathered = chain(group(embed.s("a"), embed.s(["b"])), stack)
    assert gathered.apply_async().get(timeout=30) == [[384], [1, 384]]
    body = chord([shout, shout], embed.s())
    assert body.apply_async().get(timeout=30).shape == (2, 384)
    nested = chord(
        [chain(shout, embed.s()), chain(shout, embed.s(), group(shape, shape))], embed.si("z")
    )
    assert nested.apply_async().get(timeout=30).shape == (384,)
    twice = chain(embed.s("a"), chord([shape, shape], embed.si("b")), shape)
    assert twice.apply_async().get(timeout=30) == [384]


@pytest.mark.usefixtures("fleet")
def test_a_call_that_fails_in_a_canvas_is_told_to_whoever_waits(fleet, host, wait_until):
    shape, note = task(host, "shape"), task(host, "note")
    bad = embed.s("a", prompt="no such")
    failing: list[tuple[Any, Any]] = [
        (chain(bad, shape), InvalidOptionError),
        (chain(embed.s("a"), embed.s()), InvalidTextError),  # vectors are no texts
        (chain(embed.s("a"), embed.s(), shape), InvalidTextError),
        (chord([embed.s("a"), embed.s("b")], embed.s()), InvalidTextError),
        (chord([embed.s("a"), bad], task(host, "stack")), (ChordError, InvalidOptionError)),
        (chord([embed.s("a"), bad], embed.s()), (ChordError, InvalidOptionError)),
        (group(embed.s("a"), bad), InvalidOptionError),
        (group(embed.s("a"), chain(embed.s("b"), embed.s())), InvalidTextError),
    ]
    for canvas, error in failing:
        with pytest.raises(error):
            canvas.apply_async().get(timeout=30)
    told = task(host, "stack").on_error(note)
    for canvas in [bad.on_error(note), chain(bad, shape).on_error(note), chord([bad], told)]:
        canvas.apply_async()
        wait_until(lambda: fleet.client.keys("failed:*"))
        fleet.client.delete(*fleet.client.keys("failed:*"))


@pytest.mark.usefixtures("fleet")
def test_a_task_of_the_host_may_wait_for_the_fleet_and_not_for_the_host(host):
    waited = task(host, "wait", "a text").apply_async()
    count, shapes, children = waited.get(timeout=60)
    assert (count, shapes) == (200, [[384]])
    assert children <= 3  # those of embed_many are none
    with pytest.raises(RuntimeError, match="Never call"):
        task(host, "wait_for_host").apply_async().get(timeout=30)


def test_a_callback_that_cannot_be_sent_is_refused_before_anything_is(server, client, wait_until):
    host = Celery("host", broker=server, backend=server, set_as_current=False)
    save = host.signature("host.save")
    with pytest.raises(CallbackQueueError, match=r"host\.save"):
        embed.apply_async(("text",), link=save)
    with pytest.raises(CallbackQueueError):
        chain(embed.s("a"), save).apply_async()
    queued = save.clone(args=(object(),)).set(queue="host")
    with pytest.raises(InvalidInputError, match="JSON"):
        embed.apply_async(("text",), link=queued)
    assert client.dbsize() == 0
    wait_until(lambda: not client.pubsub_channels())  # nobody waits for what was not sent


def test_fifty_thousand_texts_leave_the_server_flat(start_fleet, client):
    with start_fleet(2):
        count, sizes = 0, []
        for vector in embed_many((f"text {i}" for i in range(50_000)), batch=200, in_flight=8):
            assert vector.shape == (384,)
            count += 1
            if count % 5_000 == 0:
                sizes.append(client.info("memory")["used_memory"])
        assert count == 50_000
        assert max(sizes) < 80e6  # 50,000 stored vectors are 102 MB; this is connections' buffers
        assert max(sizes[5:]) <= 1.5 * max(sizes[:5])
        assert not list(client.scan_iter("celery-task-meta-*"))


def test_a_slow_caller_gets_what_expired_meanwhile(start_fleet, client, wait_until):
    def kept():
        return list(client.scan_iter("celery-task-meta-*"))

    with start_fleet(result_ttl_s=1):
        texts = [f"text {n}" for n in range(40)]
        vectors = embed_many(texts, batch=4, in_flight=8)
        rows = [next(vectors)]
        wait_until(lambda: len(kept()) == 7)
        client.client_kill_filter(_type="pubsub")  # what the caller was sent and has not read is lost
        wait_until(lambda: not kept())
        rows += vectors
    assert np.allclose(rows, vectors_of(texts, 384), atol=1e-6)


GUEST = """
import {framework}
from celery import Celery, current_app
host = Celery("{framework}_project", broker="memory://", backend="cache+memory://")
host.set_default()

@host.task
def own(x):
    return x + 1

import sutra_tasks
from sutra_tasks import embed

assert current_app.main == "{framework}_project", current_app.main
assert "sutra.embed" not in host.tasks
host.conf.task_always_eager = True
assert own.delay(1).get() == 2
assert embed.delay("text").get(timeout=30).shape == (384,)
assert current_app.main == "{framework}_project"
import sys
assert not {{"torch", "transformers", "sentence_transformers"}} & set(sys.modules)
print("both work")
"""


@pytest.mark.usefixtures("fleet")
@pytest.mark.parametrize("framework", ["django", "flask"])
def test_a_host_projects_own_app_stays_the_current_one(run_python, framework):
    assert "both work" in run_python(GUEST.format(framework=framework))
