"""The job of each extra, in an environment that has no more than it: ``python -I install_jobs.py cli``.

Every function imports what it needs itself, and raises if the job cannot be done. ``SUTRA_BROKER_URL``
names a server; a fleet serves it, unless the job starts one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

WIDTH = 384
WITHIN_S = 60
SHOWN_TEXTS = [f"text {number}" for number in range(100)]


def client() -> None:
    """Embed and stream by the fleet, and in an application's tests without one."""
    from sutra_tasks import StreamingResponse, StreamProducer, StreamReader, embed, embed_many
    from sutra_tasks.testing import local_fleet

    assert embed.delay(["a", "b"]).get(timeout=WITHIN_S).shape == (2, WIDTH)
    assert len(list(embed_many(SHOWN_TEXTS))) == len(SHOWN_TEXTS)
    name = f"try-{os.getpid()}"
    with StreamProducer(name) as producer:
        producer.send_many(SHOWN_TEXTS)
    found = 0
    with StreamReader(name, timeout_s=WITHIN_S) as reader:
        for response in reader:
            assert isinstance(response, StreamingResponse), response
            found += len(response.embeddings)
            if found == len(SHOWN_TEXTS):
                break
    with local_fleet():
        assert embed.delay("a").get(timeout=WITHIN_S).shape == (WIDTH,)


def cli() -> None:
    """Use the commands that need no worker."""
    sutra = str(Path(sys.executable).with_name("sutra"))

    def said(*arguments: str, given: str | None = None) -> str:
        return subprocess.run(
            [sutra, *arguments], input=given, stdout=subprocess.PIPE, text=True, check=True
        ).stdout

    assert "healthy" in said("status")
    assert len(json.loads(said("embed", "one text"))["vector"]) == WIDTH
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "texts.csv"
        source.write_text("text\na\nb\n")
        assert len(said("embed", str(source)).splitlines()) == 2
    name = f"cli-{os.getpid()}"
    said("stream", "send", name, given="a\nb\n")
    assert name in said("stream", "status")
    said("stream", "delete", name, "--force")
    said("health")


def local() -> None:
    """Run the packaged server, and find the packaged model."""
    import redis

    from sutra_tasks.engines.model_folder import locate
    from sutra_tasks.host.embedded_server import embedded_server

    with embedded_server() as address, redis.Redis.from_url(address) as server:
        assert server.ping()
    assert (Path(locate("all-MiniLM-L6-v2")) / "model.safetensors").is_file()


def flower() -> None:
    """Show the fleet's workers."""
    from sutra_tasks.host.embedded_server import free_port

    port = free_port()
    shown = subprocess.Popen(
        [sys.executable, "-m", "celery", "-A", "sutra_tasks", "flower", f"--port={port}"],
        env={**os.environ, "FLOWER_UNAUTHENTICATED_API": "true"},
    )
    try:
        await_true(lambda: "router@" in _page(f"http://127.0.0.1:{port}/api/workers?refresh=true"))
    finally:
        shown.terminate()
        shown.wait()


def worker() -> None:
    """Serve the packaged model, and give sentence-transformers' own vectors."""
    import numpy as np
    from sentence_transformers import SentenceTransformer

    from sutra_tasks import embed
    from sutra_tasks.settings import settings

    with ExitStack() as stack:
        _start_fleet(stack)
        found = embed.delay(["a text", "another one"]).get(timeout=WITHIN_S)
    theirs = SentenceTransformer(settings().model, device="cpu").encode(["a text", "another one"])
    cosines = np.sum(found * theirs, axis=1)
    assert np.all(cosines > 0.999), cosines


def distill() -> None:
    """Make a version of a smaller model, of texts in a Parquet file."""
    from importlib import import_module
    from pydoc_data.topics import topics

    from sutra_tasks import DistillationConfig
    from sutra_tasks import distill as task

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        os.environ |= {"SUTRA_DATA_DIR": str(folder), "SUTRA_MODELS_DIR": str(folder / "models")}
        (folder / "models").mkdir()
        lines = sorted({line.strip() for text in topics.values() for line in text.splitlines()} - {""})
        arrow: Any = import_module("pyarrow")
        import_module("pyarrow.parquet").write_table(
            arrow.table({"text": lines[:400]}), folder / "a.parquet"
        )
        _start_fleet(stack)
        recipe = DistillationConfig(
            teacher=os.environ["SUTRA_MODEL"], texts=("a.parquet",), name="small", student="projection",
            output_dim=64, held_out=100,
        )  # fmt: skip
        made = task.delay(recipe).get(timeout=4 * WITHIN_S)
        assert made["model"] == "small@1"
        assert (folder / "models" / "small" / "1" / made["report"]).is_file()


def _start_fleet(stack: ExitStack) -> None:
    from sutra_tasks.host.hardware import plan_devices
    from sutra_tasks.host.local_fleet import await_devices, run_workers
    from sutra_tasks.host.supervisor import worker_specs
    from sutra_tasks.settings import settings

    options = settings()
    devices = plan_devices(host="job", engine=options.engine, gpus=(), cores=1, count=1)
    specs = worker_specs(options, devices)
    supervisor = stack.enter_context(run_workers(options, specs, report=print))
    await_devices(supervisor, options, devices)


def _page(address: str) -> str:
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return str(answer.read().decode())
    except OSError:
        return ""


def await_true(condition: Any) -> None:
    """Return once the condition is true."""
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline, f"not true within {WITHIN_S} s"
        time.sleep(0.1)


JOBS = {"": client, "cli": cli, "local": local, "flower": flower, "worker": worker, "distill": distill}

if __name__ == "__main__":
    JOBS[sys.argv[1]]()
