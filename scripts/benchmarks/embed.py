"""The real model on the same cores: our fleet, sentence-transformers, and a plain Celery task.

(a) ``SentenceTransformer.encode`` in process, a torch thread per core; (b) our fleet with lists of 64;
(c) our fleet with single texts; (d) a prefork Celery task around ``SentenceTransformer.encode``, one
process and one torch thread per core, as a user would write it. All use the same texts of 12 words and
run by turns: the fleet is idle while (a) or (d) is measured.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import redis

from scripts.benchmarks.local import QUIET, BenchFleet, bench_fleet, elapsed
from scripts.benchmarks.report import median_ratio
from sutra_tasks import embed, embed_many, keys
from sutra_tasks.host.hardware import count_cores
from sutra_tasks.host.processes import spawn, stop
from sutra_tasks.membership.fleet import fleet_members
from sutra_tasks.settings import Settings

MODEL = "all-MiniLM-L6-v2"
WORDS = 12
IN_FLIGHT = 64
AGREEMENT = 0.99999


def texts_of(count: int) -> list[str]:
    """Return texts of 12 plain words (no code) from the Python manual, each different."""
    words = re.findall(r"\b[A-Za-z][a-z]+\b", " ".join(topics.values()))
    return [" ".join(words[i * WORDS : (i + 1) * WORDS]) for i in range(count)]


def run(*, quick: bool) -> dict[str, Any]:
    """Run the benchmark."""
    bulk, singles, plain, rounds = (128, 64, 16, 1) if quick else (1536, 512, 192, 5)
    cores = count_cores()
    texts = texts_of(bulk)
    # sentence-transformers computes in float32.
    with (
        bench_fleet(Settings(dtype="float32"), devices=cores) as fleet,
        _plain_celery(fleet, cores) as plain_task,
    ):
        import torch  # noqa: PLC0415 - after the fleet, which needs the cores to start
        from sentence_transformers import SentenceTransformer  # noqa: PLC0415

        from sutra_tasks.engines.model_folder import locate  # noqa: PLC0415

        torch.set_num_threads(cores)
        model = SentenceTransformer(locate(MODEL), device="cpu")
        reference = model.encode(texts, batch_size=64, normalize_embeddings=True)

        def encode() -> float:
            began = time.perf_counter()
            model.encode(texts, batch_size=64, normalize_embeddings=True)
            return len(texts) / elapsed(began)

        def lists() -> float:
            began = time.perf_counter()
            got = np.vstack(list(embed_many(texts, batch=64)))
            rate = len(texts) / elapsed(began)
            _agree(got, reference)
            return rate

        def single() -> float:
            began = time.perf_counter()
            got = _in_flight(embed.delay, texts[:singles])
            rate = singles / elapsed(began)
            _agree(np.vstack(got), reference[:singles])
            return rate

        def plain_celery() -> float:
            began = time.perf_counter()
            got = _in_flight(plain_task, texts[:plain])
            rate = plain / elapsed(began)
            _agree(np.array(got, dtype=np.float32), reference[:plain])
            return rate

        measured = {
            "encode": encode, "fleet_lists_of_64": lists,
            "fleet_singles": single, "plain_celery_singles": plain_celery,
        }  # fmt: skip
        rates: dict[str, list[float]] = {name: [] for name in measured}
        for measure in measured.values():
            measure()  # warm-up
        for turn in range(rounds):
            order = list(measured)
            for name in order if turn % 2 else reversed(order):
                rates[name].append(measured[name]())
        batches = statistics.median(_batches_for_64(fleet, texts[:64]) for _ in range(rounds))
    return {
        "bulk_over_encode": median_ratio(rates["fleet_lists_of_64"], rates["encode"]),
        "single_over_plain_celery": median_ratio(rates["fleet_singles"], rates["plain_celery_singles"]),
        "batches_for_64": batches,
        "embeddings_per_s": {name: statistics.median(found) for name, found in rates.items()},
        "rounds": rounds,
    }


def _in_flight(send: Any, texts: list[str]) -> list[Any]:
    sent: deque[Any] = deque()
    got = []
    for text in texts:
        if len(sent) == IN_FLIGHT:
            got.append(sent.popleft().get(timeout=120))
        sent.append(send(text))
    return got + [result.get(timeout=120) for result in sent]


def _agree(rows: Any, reference: Any) -> None:
    assert rows.shape == reference.shape, rows.shape
    norms = np.linalg.norm(rows, axis=1)
    assert np.allclose(norms, 1, atol=1e-5), "not unit vectors"
    worst = float((rows * reference).sum(axis=1).min())
    assert worst >= AGREEMENT, f"cosine to sentence-transformers is {worst}"


def _batches_for_64(fleet: BenchFleet, texts: list[str]) -> int:
    """Count the batches for 64 single texts that all wait when one device begins to take."""
    device = fleet.devices[0].id
    control = embed.app.control
    client = redis.Redis.from_url(fleet.options.broker_url or "")
    node = f"{device}@{os.uname().nodename}"
    control.cancel_consumer(keys.device_queue(device), destination=[node], reply=True)
    before = _counts(client, device)
    while (now := _settled(client, device)) != before:
        before = now
    sent = [embed.apply_async((text,), queue=keys.device_queue(device)) for text in texts]
    control.add_consumer(keys.device_queue(device), destination=[node], reply=True)
    for result in sent:
        result.get(timeout=60)
    deadline = time.monotonic() + 10
    while (after := _counts(client, device))[0] < before[0] + len(texts):
        assert time.monotonic() < deadline, "the device's counts did not arrive"
        time.sleep(0.05)
    client.close()
    return after[1] - before[1]


def _settled(client: redis.Redis, device: str) -> tuple[int, int]:
    """Return the counts after the next heartbeat; by then the device's last take has its answer."""
    time.sleep(1.2)
    return _counts(client, device)


def _counts(client: redis.Redis, device: str) -> tuple[int, int]:
    record = next(s.record for s in fleet_members(client) if s.id == device)
    assert record is not None
    return record.texts, record.batches


@contextmanager
def _plain_celery(fleet: BenchFleet, cores: int) -> Iterator[Any]:
    """Run (d) on the same server, in another database."""
    from celery import Celery  # noqa: PLC0415

    address = (fleet.options.broker_url or "").removesuffix("/0") + "/1"
    environ = {
        **os.environ, "BASELINE_BROKER": address, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
    }  # fmt: skip
    command = [
        sys.executable, "-m", "celery", "-A", "scripts.benchmarks.plain_celery", "worker",
        "-c", str(cores), "--without-gossip", "--without-mingle", *QUIET, "--loglevel", "error",
    ]  # fmt: skip
    process = spawn(command, environ=environ, output=subprocess.DEVNULL)
    app = Celery("baseline", broker=address, backend=address, set_as_current=False)
    try:
        app.send_task("embed_one", ("warm",)).get(timeout=120)
        yield lambda text: app.send_task("embed_one", (text,))
    finally:
        app.close()
        stop(process, 20)
