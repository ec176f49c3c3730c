"""Faults under a stream's load: no vector may be lost, and a repeated vector must be the same.

Two simulated devices and a server with an append-only file. One producer sends numbered texts; after a
kill it starts again with the same numbers, because it does not know which entries were accepted. Another
producer writes one long text in pieces the whole time.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from scripts.benchmarks.chaos import Server
from scripts.benchmarks.report import percentile
from scripts.benchmarks.stream_sink import Sink
from sutra_tasks import EmbeddedChunk, StreamEntry, StreamProducer
from sutra_tasks.engines.simulated_engine import vectors_of
from sutra_tasks.host.hardware import plan_devices
from sutra_tasks.host.local_fleet import await_devices, run_workers
from sutra_tasks.host.supervisor import Supervisor, worker_specs
from sutra_tasks.settings import Settings

if TYPE_CHECKING:
    from sutra_tasks.vectors import Floats

PART: Final = 4_000
"""Entries of one producer's process; after a kill the next one sends the same ids."""
PER_S: Final = 800.0
TEXT: Final = "the quick brown fox"
WORDS: Final = "a text that is written for as long as the faults go on "
READER_PAUSE_S: Final = 60.0


def faults(*, quick: bool) -> dict[str, Any]:
    """Run the faults; return the numbers of lost, wrong and repeated vectors."""
    draw = random.Random(11)  # noqa: S311 - it draws moments
    plan = ["consumer", "producer", "server_away"] * (1 if quick else 4)
    with _processes() as processes:
        for name in plan:
            time.sleep(draw.uniform(0.5, 2.0))
            print(f"  {len(processes.sink.rows):7,} delivered; {name}", flush=True)
            getattr(processes, name)()
        processes.reader(1.0 if quick else READER_PAUSE_S)
        processes.finish()
        wrong = processes.sink.wrong + processes.written.wrong + (not processes.is_whole())
        return {
            "lost": processes.lost(),
            "wrong": int(wrong),
            "repeats": processes.sink.repeats,
            "delivered": len(processes.sink.rows),
            "errors": len(processes.sink.errors) + len(processes.written.errors),
            "faults": len(plan) + 1,
            "written_chunks": len(processes.written.rows),
            "latency_p95_s": percentile(processes.sink.latencies_ms, 0.95) / 1000,
            "latency_max_s": max(processes.sink.latencies_ms) / 1000,
        }


@dataclass
class _Processes:
    """The processes under test; each method that the plan names is one fault."""

    options: Settings
    server: Server
    supervisor: Supervisor
    devices: list[str]
    sink: Sink
    written: Sink
    ended: threading.Event
    sent: int = 0
    pieces: int = 0
    producing: subprocess.Popen[bytes] | None = None
    turn: int = 0

    def consumer(self) -> None:
        """Kill a device, whatever it is doing."""
        self.turn += 1
        name = self.devices[self.turn % len(self.devices)]
        _until(lambda: name in self.supervisor.pids, 60)
        os.kill(self.supervisor.pids[name], signal.SIGKILL)

    def producer(self) -> None:
        """Kill the producer in the middle of its batches."""
        if self.producing is not None:
            self.producing.kill()

    def server_away(self) -> None:
        """Stop the server for a second."""
        self.server.stop()
        time.sleep(1.0)
        self.server.start()

    def reader(self, seconds: float) -> None:
        """Pause the reader."""
        self.sink.pause(seconds)

    def produce(self) -> None:
        """Send part after part until ``ended``; on a thread of its own."""
        while not self.ended.is_set():
            command = [
                sys.executable, "-m", "scripts.benchmarks.stream_load", "--streams", "docs",
                "--count", str(PART), "--first", str(self.sent), "--per-s", str(PER_S),
            ]  # fmt: skip
            self.producing = subprocess.Popen(
                command,
                env={**os.environ, **self.options.as_env()},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            if self.producing.wait() == 0:
                self.sent += PART

    def write(self) -> None:
        """Write one text in pieces until ``ended``; on a thread of its own."""
        with StreamProducer("written", options=self.options, timeout_s=60) as producer:
            while not self.ended.is_set():
                producer.send(StreamEntry(WORDS, id=f"p{self.pieces}", key="text", seq=self.pieces))
                self.pieces += 1
                time.sleep(0.005)
            producer.send(StreamEntry("", id="end", key="text", seq=self.pieces, end=True))

    def finish(self) -> None:
        """Stop both producers, and wait until every vector has arrived."""
        self.ended.set()
        _until(lambda: self.producing is not None and self.producing.poll() is not None, 60)
        _until(lambda: len(self.sink.rows) >= self.sent, 120)
        _until(lambda: any(not one.overlap_next for one in self.written.chunks.copy().values()), 120)

    def lost(self) -> int:
        """Count the ids without a vector."""
        return sum(str(number) not in self.sink.rows for number in range(self.sent))

    def is_whole(self) -> bool:
        """Return whether the chunks of the written text cover it, and have the right vectors."""
        text = WORDS * self.pieces
        covered = np.zeros(len(text), dtype=bool)
        for chunk in self.written.chunks.values():
            covered[chunk.start : chunk.end] = True
            expected = vectors_of([text[chunk.start : chunk.end]], 384)[0]
            row = np.frombuffer(self.written.rows[chunk.id], dtype="<f4")
            if float(expected @ row) < 0.9999:
                return False
        numbers = sorted(chunk.number for chunk in self.written.chunks.values())
        return bool(covered.all()) and numbers == list(range(len(numbers)))


def _is_right(chunk: EmbeddedChunk, row: Floats) -> bool:
    return float(vectors_of([f"{chunk.id} {TEXT}"], len(row))[0] @ row) >= 0.9999


@contextmanager
def _processes() -> Iterator[_Processes]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sutra-streams-")))
        server = Server(folder)
        stack.callback(server.stop)
        options = Settings(
            engine="simulated", simulated_fixed_s=0.001, simulated_per_token_s=0.0001,
            broker_url=server.start(),
        )  # fmt: skip
        devices = plan_devices(host="faults", engine="simulated", gpus=(), cores=2, count=2)
        specs = worker_specs(options, devices)
        log = stack.enter_context((folder / "workers.log").open("ab"))
        output = {spec.name: log for spec in specs}
        supervisor = stack.enter_context(
            run_workers(options, specs, report=lambda _: None, output=output)
        )
        await_devices(supervisor, options, devices)
        over, ended = threading.Event(), threading.Event()

        def supervise() -> None:
            while not over.is_set():
                over.wait(supervisor.step(time.monotonic()))

        sink, written = Sink("docs", options, _is_right), Sink("written", options)
        processes = _Processes(
            options, server, supervisor, [device.id for device in devices], sink, written, ended
        )
        threads = [
            threading.Thread(target=one) for one in (supervise, processes.produce, processes.write)
        ]
        stack.callback(sink.close)
        stack.callback(written.close)
        for thread in threads:
            thread.start()
            stack.callback(thread.join)
        stack.callback(over.set)
        stack.callback(ended.set)
        sink.start()
        written.start()
        yield processes


def _until(condition: Callable[[], bool], within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the stream stands still")
        time.sleep(0.01)
