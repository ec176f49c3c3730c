"""Long texts: gains of attention, of precision and of chunking; fan-out; quality of the vectors.

``speedup`` and ``memory_reduction`` compare the product's choice on this machine with the standard:
plain attention in one pass, in float32. Further results separate the gains. ``one_pass`` is the fused
kernel over all tokens, and computes the same vector. ``chunked`` computes less, because each chunk sees
only itself, and gives another vector. ``sliding_window`` is chunks without fused attention.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from scripts.benchmarks import fan_out, long_model, quality
from sutra_tasks.batching.batcher import Batcher
from sutra_tasks.batching.next_batch import Limits
from sutra_tasks.batching.service import EmbeddingService
from sutra_tasks.client.call import Call
from sutra_tasks.host.hardware import count_cores
from sutra_tasks.settings import Settings

if TYPE_CHECKING:
    from sutra_tasks.vectors import Floats

LENGTHS: Final = (1024, 2048, 4096)
SPEEDUP: Final = {1024: 2.3, 2048: 4.3, 4096: 8.5}
MEMORY_REDUCTION: Final = {1024: 0.75, 2048: 0.82, 4096: 0.87}
"""The specification's table."""

REPEATS: Final = 5
LEAST_COSINE: Final = 0.999
WARM_TOKENS: Final = 256


@dataclass(frozen=True, slots=True)
class Way:
    """One way to embed a long text."""

    attention: str
    dtype: str
    chunked: bool

    def settings(self) -> Settings:
        """Return the default settings with the attention, precision and chunking of this way."""
        return Settings(
            attention=self.attention,
            dtype=self.dtype,
            sequence_threshold=None if self.chunked else long_model.POSITIONS,
        )


STANDARD: Final = "standard"
OURS: Final = "chunked"
WAYS: Final = {
    STANDARD: Way("eager", "float32", chunked=False),
    "one_pass.float32": Way("auto", "float32", chunked=False),
    "one_pass": Way("auto", "auto", chunked=False),
    "sliding_window": Way("eager", "float32", chunked=True),
    "chunked.float32": Way("auto", "float32", chunked=True),
    OURS: Way("auto", "auto", chunked=True),
}
"""The last way is the product's default."""


def run(*, quick: bool) -> dict[str, Any]:
    """Run the benchmark."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    lengths = LENGTHS[:1] if quick else LENGTHS
    with (
        tempfile.TemporaryDirectory(prefix="sutra-bench-") as folder,
        # Each measurement has a new process, because a process seldom returns memory to the system.
        ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes,
    ):
        model = str(processes.submit(long_model.build, Path(folder)).result())
        timed = processes.submit(_times, model, lengths, 1 if quick else REPEATS).result()
        memory = {
            name: {n: processes.submit(_memory, model, name, n).result() for n in lengths}
            for name in (WAYS if not quick else (STANDARD, OURS))
        }
    return {
        **_ratios(timed, memory, lengths),
        "fan_out": fan_out.run(quick=quick),
        "quality": quality.run(quick=quick),
    }


def _ratios(timed: dict[str, Any], memory: dict[str, Any], lengths: tuple[int, ...]) -> dict[str, Any]:
    results: dict[str, Any] = {"chosen": timed["chosen"]}
    for name in WAYS:
        place = results
        for part in name.split("."):
            place = place.setdefault(part, {})
        place["seconds"] = {str(n): timed["seconds"][name][n] for n in lengths}
        place["cosine"] = {str(n): timed["cosine"][name][n] for n in lengths}
        if name != STANDARD:
            place["speedup"] = {
                str(n): timed["seconds"][STANDARD][n] / timed["seconds"][name][n] for n in lengths
            }
        if name in memory:
            place["memory_mb"] = {str(n): memory[name][n] / 1e6 for n in lengths}
            place["memory_reduction"] = {
                str(n): 1 - memory[name][n] / memory[STANDARD][n] for n in lengths
            }
    if 4096 in lengths:
        for name in ("one_pass", STANDARD):
            grown = memory[name][4096] / memory[name][2048]
            results[name]["memory_growth"] = {"4096_over_2048": grown}
    return {
        "speedup": results[OURS]["speedup"],
        "memory_reduction": results[OURS]["memory_reduction"],
        "specification": {
            "speedup": {str(n): SPEEDUP[n] for n in lengths},
            "memory_reduction": {str(n): MEMORY_REDUCTION[n] for n in lengths},
        },
        **results,
    }


@contextmanager
def _service(model: str, way: Way) -> Iterator[EmbeddingService]:
    from sutra_tasks.engines.torch_engine.encoder import TorchEncoder  # noqa: PLC0415 - seconds to import

    options = way.settings()
    encoder = TorchEncoder(
        model, threads=count_cores(), attention=options.attention, dtype=options.dtype
    )
    batcher = Batcher(Limits(options.batch_tokens, options.batch_texts, 0))
    batcher.start()
    try:
        yield EmbeddingService(encoder, batcher, "bench", options)
    finally:
        batcher.close(10)


def _embed(service: EmbeddingService, text: str) -> Floats:
    call = Call.of((text,), {}, Settings())
    return np.asarray(service.answer(service.prepare(call)))


def _times(model: str, lengths: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """Measure all ways by turns; return median seconds and cosines to the standard by way and length."""
    with ExitStack() as stack:
        services = {name: stack.enter_context(_service(model, way)) for name, way in WAYS.items()}
        seconds: dict[str, Any] = {name: {} for name in WAYS}
        cosine: dict[str, Any] = {name: {} for name in WAYS}
        for tokens in lengths:
            text = long_model.text_of(tokens)
            vectors = {name: _embed(service, text) for name, service in services.items()}  # warm-up
            took: dict[str, list[float]] = {name: [] for name in WAYS}
            for _ in range(repeats):
                for name, service in services.items():
                    began = time.perf_counter()
                    _embed(service, text)
                    took[name].append(time.perf_counter() - began)
            for name in WAYS:
                seconds[name][tokens] = statistics.median(took[name])
                cosine[name][tokens] = float(vectors[name] @ vectors[STANDARD])
                if not WAYS[name].chunked:
                    assert cosine[name][tokens] > LEAST_COSINE, (name, cosine[name][tokens])
        chosen = services[OURS].encoder.attention  # type: ignore[attr-defined]  # torch's engine has one
        return {
            "seconds": seconds,
            "cosine": cosine,
            "chosen": {"attention": str(chosen.implementation), "dtype": chosen.dtype},
        }


def _memory(model: str, name: str, tokens: int) -> int:
    """Return by how many bytes this process's peak memory grows for one text, after a warm-up."""
    with _service(model, WAYS[name]) as service:
        _embed(service, long_model.text_of(WARM_TOKENS))
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the memory in use now
        before = _status("VmRSS")
        _embed(service, long_model.text_of(tokens))
        return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
