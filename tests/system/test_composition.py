"""Beside a host project's own Celery app: links, chains and chords, run by its own worker."""

import os
import sys
from contextlib import contextmanager

import pytest
from celery import Celery, chain, chord

from sutra_tasks import CallbackQueueError, embed, embed_many
from sutra_tasks.host.processes import spawn, stop
from tests.conftest import disconnect

HOST = """
import sutra_tasks
from celery import Celery
import redis, sys

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

app.worker_main(["--quiet", "worker", "-P", "threads", "-c", "2", "-n", "host@%h",
                 "--without-gossip", "--without-mingle"])
"""


@contextmanager
def host_worker(server, tmp_path):
    script = tmp_path / "host.py"
    script.write_text(HOST)
    with (tmp_path / "host.log").open("wb") as log:
        process = spawn([sys.executable, str(script), server], environ=os.environ, output=log)
        app = Celery("host", broker=server, backend=server, set_as_current=False)
        app.conf.task_default_queue = "host"
        try:
            yield app
        finally:
            disconnect(app.backend)
            app.close()
            stop(process, 20)


def test_links_chains_and_chords_of_a_host_app_run_on_its_worker(fleet, tmp_path, wait_until):
    with host_worker(fleet.options.broker_url, tmp_path) as host:
        save = host.signature("host.save").set(queue="host")
        shout = host.signature("host.shout", args=("loud",)).set(queue="host")
        stack = host.signature("host.stack").set(queue="host")

        linked = save.clone(kwargs={"key": "linked"})
        embed.apply_async(("text",), link=linked).get(timeout=30)
        wait_until(lambda: fleet.client.exists("linked"))

        saved = chain(embed.s(["a", "b"]), save.clone(kwargs={"key": "chained"})).apply_async()
        assert saved.get(timeout=30) == [2, 384]

        upper = chain(shout, embed.s(details=True)).apply_async().get(timeout=30)
        assert (upper.vectors == embed.delay("LOUD").get(timeout=30)).all()

        shapes = chord([embed.s("a"), embed.s(["b", "c"]), embed.s([])], stack).apply_async()
        assert shapes.get(timeout=30) == [[384], [2, 384], [0, 384]]


def test_a_callback_without_a_queue_is_refused_before_anything_is_sent(server, client):
    host = Celery("host", broker=server, backend=server, set_as_current=False)
    save = host.signature("host.save")
    with pytest.raises(CallbackQueueError, match=r"host\.save"):
        embed.apply_async(("text",), link=save)
    with pytest.raises(CallbackQueueError):
        chain(embed.s("a"), save).apply_async()
    assert client.dbsize() == 0


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
