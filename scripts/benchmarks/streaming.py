"""Streams: rates, latencies, behaviour under overload, and losses under faults.

The simulated device takes 1 ms a batch and 0.05 ms a text. Producers, readers, server and workers share
this machine. Rates are vectors delivered over the time from the first entry's arrival to the last
response, by the server's clock.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import psutil
import redis

from scripts.benchmarks.embed import texts_of
from scripts.benchmarks.local import BenchFleet, bench_fleet, elapsed
from scripts.benchmarks.report import median_ratio, percentile
from scripts.benchmarks.stream_faults import faults
from scripts.benchmarks.stream_sink import Sink
from sutra_tasks import EmbeddedChunk, StreamEntry, StreamProducer, embed_many, keys
from sutra_tasks.engines.simulated_engine import vectors_of
from sutra_tasks.settings import Settings
from sutra_tasks.streaming.metrics import bucket, middle_ms, percentiles
from sutra_tasks.streaming.status import stream_status

if TYPE_CHECKING:
    from sutra_tasks.vectors import Floats

FIXED_S: Final = 0.001
TEXT: Final = "the quick brown fox"
TOKENS: Final = 7
"""Of each entry: a number, four words, two special tokens."""
PER_TOKEN_S: Final = 0.00005 / TOKENS
AGREEMENT: Final = 0.9999
LOAD: Final = 0.7


def run(*, quick: bool) -> dict[str, Any]:
    """Run the benchmark."""
    results = {**_simulated(quick=quick), **_real(quick=quick)}
    found = faults(quick=quick)
    results["lost"] += found["lost"]
    return {**results, "faults": found}


def _simulated(*, quick: bool) -> dict[str, Any]:
    single, eight, burst, rounds = (1000, 200, 2000, 1) if quick else (20_000, 4_000, 50_000, 3)
    options = Settings(
        engine="simulated", simulated_fixed_s=FIXED_S, simulated_per_token_s=PER_TOKEN_S,
        stream_buffer_size=60_000,
    )  # fmt: skip
    plan = {
        "single_stream_per_s": (["single"], single),
        "eight_streams_per_s": ([f"of-eight-{one}" for one in range(8)], eight),
        "burst_per_s": (["burst"], burst),
    }
    rates: dict[str, list[float]] = {name: [] for name in plan}
    lost = 0
    with bench_fleet(options, devices=1) as fleet:
        for turn in range(rounds + 1):
            for name, (streams, count) in plan.items():
                rate, missing = _flood(fleet, [f"{one}-{turn}" for one in streams], count)
                lost += missing
                if turn:  # the first one warms up
                    rates[name].append(rate)
    return {
        **{name: statistics.median(found) for name, found in rates.items()},
        "rates": {name: [round(one) for one in found] for name, found in rates.items()},
        "rounds": rounds,
        "lost": lost,
    }


def _flood(fleet: BenchFleet, streams: Sequence[str], count: int) -> tuple[float, int]:
    """Send without pauses; return the rate of delivery, and the number of missing vectors."""
    sinks = [Sink(stream, fleet.options, _is_simulated) for stream in streams]
    producer = _producer(fleet, "--streams", ",".join(streams), "--count", count)
    for sink in sinks:
        sink.start()
    _await(lambda: all(len(sink.rows) >= count for sink in sinks), 120)
    _ended(producer)
    for sink in sinks:
        sink.close()
        assert not sink.wrong, "another vector"
        assert not sink.errors, sink.errors
    with redis.Redis.from_url(fleet.options.broker_url or "") as client:
        for stream in streams:
            client.srem(keys.streams(), stream)  # else devices would read streams of earlier rounds
    first, last = min(sink.first_ms for sink in sinks), max(sink.last_ms for sink in sinks)
    delivered = sum(len(sink.rows) for sink in sinks)
    return 1000 * delivered / (last - first), count * len(sinks) - delivered


def _is_simulated(chunk: EmbeddedChunk, row: Floats) -> bool:
    expected = vectors_of([f"{chunk.id} {TEXT}"], len(row))[0]
    return float(expected @ row) >= AGREEMENT


def _real(*, quick: bool) -> dict[str, Any]:
    count, rounds, paced_s, overload_s = (200, 1, 2, 3) if quick else (1_500, 5, 30, 60)
    texts = texts_of(1_000)
    # One core computes; producers, readers and the server use the others.
    with bench_fleet(Settings(), devices=1, cores=1) as fleet:
        file = Path(fleet.folder) / "texts.json"
        file.write_text(json.dumps(texts))
        encode = _in_process(fleet, texts)
        streamed, alone = [], []
        for turn in range(rounds + 1):
            own = encode()
            sink, _ = offered(fleet, f"over-{turn}", count, 3 * own, file)
            if turn:
                alone.append(own)
                streamed.append(sink.per_s)
        capacity = statistics.median(streamed)
        paced = _paced(fleet, LOAD * capacity, paced_s, file)
        overload = _overload(fleet, 3 * capacity, overload_s, file)
        texts_whole = _continuous(fleet, quick=quick)
    return {
        "stream_over_encode": median_ratio(streamed, alone),
        "real_per_s": {"streamed": capacity, "in_process": statistics.median(alone)},
        **paced,
        "error_rate": overload["error_rate"],
        "overload": overload,
        **texts_whole,
    }


def _in_process(fleet: BenchFleet, texts: Sequence[str]) -> Callable[[], float]:
    """Return a function that measures the engine alone, in batches of 64, on the device's threads."""
    import torch  # noqa: PLC0415 - after the fleet, which needs the cores to start

    from sutra_tasks.engines.load import load_engine  # noqa: PLC0415

    encoder = load_engine(fleet.options)
    torch.set_num_threads(fleet.options.torch_threads)
    numbered = [f"{number} {text}" for number, text in enumerate(texts)]

    def encode() -> float:
        began = time.perf_counter()
        for at in range(0, len(numbered), 64):
            encoder.encode(encoder.tokenize(numbered[at : at + 64], None))
        return len(numbered) / elapsed(began)

    encode()
    return encode


def offered(
    fleet: BenchFleet, stream: str, count: int, per_s: float, texts: Path, *, batch: int = 64
) -> tuple[Sink, dict[str, Any]]:
    """Stream texts at ``per_s`` (0: without pauses); return the reader, and the producer's report."""
    sink = Sink(stream, fleet.options)
    producer = _producer(
        fleet, "--streams", stream, "--count", count, "--per-s", per_s, "--batch", batch,
        "--texts", texts,
    )  # fmt: skip
    sink.start()
    _await(lambda: len(sink.rows) >= count, 600)
    report = _ended(producer)
    sink.close()
    assert not sink.wrong, "another vector"
    assert not sink.errors, sink.errors
    return sink, report


def _paced(fleet: BenchFleet, per_s: float, seconds: float, texts: Path) -> dict[str, Any]:
    """Offer fewer texts than the device can embed, one by one, at random times."""
    sink, _ = offered(fleet, "paced", int(per_s * seconds), per_s, texts, batch=1)
    time.sleep(1.5)  # devices report once a second
    with redis.Redis.from_url(fleet.options.broker_url or "") as client:
        (status,) = stream_status(client, "paced")
    measured = status.measured
    ours = {bucket(one): 0 for one in sink.latencies_ms}
    for one in sink.latencies_ms:
        ours[bucket(one)] += 1
    return {
        "end_to_end_p95_ms": float(percentile(sink.latencies_ms, 0.95)),
        "chunk_p95_ms": percentiles(measured.chunk)[95],
        "batch_formation_p95_ms": percentiles(measured.formation)[95],
        "paced": {
            "per_s": per_s,
            "end_to_end_p50_ms": float(percentile(sink.latencies_ms, 0.5)),
            "end_to_end_p99_ms": float(percentile(sink.latencies_ms, 0.99)),
            "histograms": {
                name: [[round(middle_ms(number), 3), count] for number, count in sorted(found.items())]
                for name, found in (
                    ("end to end", ours),
                    ("its batch computed", measured.chunk),
                    ("waiting for a batch", measured.formation),
                )
            },
        },
    }


def _overload(fleet: BenchFleet, per_s: float, seconds: float, texts: Path) -> dict[str, Any]:
    """Offer three times the device's capacity; the producer waits whenever the stream says so."""
    sink = Sink("overload", fleet.options)
    producer = _producer(
        fleet, "--streams", "overload", "--count", 10**9, "--seconds", seconds, "--per-s", per_s,
        "--texts", texts,
    )  # fmt: skip
    sink.start()
    server, worker = _bytes(fleet), _rss(fleet)
    most_server, most_worker = 0, 0
    at_half: tuple[int, int] | None = None
    began = time.monotonic()
    while producer.poll() is None:
        time.sleep(0.25)
        most_server, most_worker = max(most_server, _bytes(fleet)), max(most_worker, _rss(fleet))
        if at_half is None and time.monotonic() - began > seconds / 2:
            at_half = most_server, most_worker
    report = _ended(producer)
    _await(lambda: len(sink.rows) >= report["accepted"], 300)
    sink.close()
    assert at_half is not None
    assert not sink.wrong, "another vector"
    return {
        "offered_per_s": per_s,
        "accepted": report["accepted"],
        "delivered": len(sink.rows),
        "signals": report["signals"],
        "error_rate": len(sink.errors) / max(1, report["accepted"]),
        "p95_s": percentile(sink.latencies_ms, 0.95) / 1000,
        "server_mb": {"before": server / 1e6, "at_half": at_half[0] / 1e6, "most": most_server / 1e6},
        "worker_mb": {"before": worker / 1e6, "at_half": at_half[1] / 1e6, "most": most_worker / 1e6},
    }


def _continuous(fleet: BenchFleet, *, quick: bool) -> dict[str, Any]:
    """Write several open texts by turns in random pieces; compare their chunks with batch embeddings."""
    draw = random.Random(5)  # noqa: S311 - it draws pieces
    words = " ".join(texts_of(300 if quick else 3_000))
    whole = {f"text-{number}": words[number * 4_000 : (number + 1) * 4_000] for number in range(2)}
    if not quick:
        whole = {f"text-{n}": words[n * 10_000 : (n + 1) * 10_000] for n in range(len(words) // 10_000)}
    left = {key: (0, text) for key, text in whole.items()}
    sink = Sink("texts", fleet.options)
    sink.start()
    with StreamProducer("texts", options=fleet.options) as producer:
        while left:
            key = draw.choice(sorted(left))
            seq, text = left[key]
            piece, rest = text[: (cut := draw.randint(1, 800))], text[cut:]
            producer.send(StreamEntry(piece, key=key, seq=seq, end=not rest))
            left[key] = (seq + 1, rest)
            if not rest:
                del left[key]

    def ended() -> bool:
        return sum(not one.overlap_next for one in sink.chunks.copy().values()) == len(whole)

    _await(ended, 120)
    sink.close()
    chunks = list(sink.chunks.values())
    slices = [whole[chunk.key or ""][chunk.start : chunk.end] for chunk in chunks]
    batch = np.vstack(list(embed_many(slices)))
    rows = np.vstack([np.frombuffer(sink.rows[chunk.id], dtype="<f4") for chunk in chunks])
    covered = {key: np.zeros(len(text), dtype=bool) for key, text in whole.items()}
    for chunk in chunks:
        covered[chunk.key or ""][chunk.start : chunk.end] = True
    return {
        "overlap_coverage": float(np.concatenate(list(covered.values())).mean()),
        "consistency_cosine": float((batch * rows).sum(axis=1).min()),
        "chunks_compared": len(chunks),
    }


def _producer(fleet: BenchFleet, *arguments: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "scripts.benchmarks.stream_load", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, env=fleet.environ)


def _ended(producer: subprocess.Popen[bytes]) -> dict[str, Any]:
    report, _ = producer.communicate(timeout=120)
    assert producer.returncode == 0, "the producer failed"
    found: dict[str, Any] = json.loads(report)
    return found


def _await(condition: Callable[[], bool], within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the stream stands still")
        time.sleep(0.01)


def _bytes(fleet: BenchFleet) -> int:
    with redis.Redis.from_url(fleet.options.broker_url or "") as client:
        info: Any = client.info("memory")
    return int(info["used_memory"])


def _rss(fleet: BenchFleet) -> int:
    return int(psutil.Process(fleet.supervisor.pids[fleet.devices[0].id]).memory_info().rss)


def plot(results: dict[str, Any], file: Path) -> None:
    """Draw the latencies at 70 % of the capacity."""
    import matplotlib as mpl  # noqa: PLC0415 - for this only

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    histograms = results["paced"]["histograms"]
    asked = {"end to end": 100, "its batch computed": 50, "waiting for a batch": 10}
    figure, axes = plt.subplots(1, 3, figsize=(10, 2.6))
    for axis, (name, found) in zip(axes, histograms.items(), strict=True):
        values, counts = [one for one, _ in found], [count for _, count in found]
        axis.bar(values, counts, width=[0.07 * one for one in values], color="#4477aa")
        axis.axvline(asked[name], color="#cc3311", linewidth=1)
        axis.set_title(f"{name}: p95 asked {asked[name]} ms", fontsize=9)
        axis.set_xlabel("ms")
        axis.set_xlim(0, 1.15 * max(asked[name], *values))
    axes[0].set_ylabel("texts")
    figure.tight_layout()
    figure.savefig(file)
    plt.close(figure)
