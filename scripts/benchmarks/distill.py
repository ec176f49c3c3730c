"""Distillation: what students keep of MiniLM, how fast they are, and whether faults change the result.

Everything runs as users run it: recipes are tasks, a distill worker makes versions in a registry, and
devices serve them. Texts are glosses of WordNet and the words they explain; labels are words and their
glosses. Quality is measured on texts from which no student learned.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import redis

from scripts.benchmarks import glosses
from scripts.benchmarks.embed import texts_of
from scripts.benchmarks.local import BenchFleet, bench_fleet
from scripts.benchmarks.report import percentile
from scripts.benchmarks.streaming import offered
from sutra_tasks import DistillationConfig, Embeddings, EmbedResult, distill, embed
from sutra_tasks.cli.models import run_add
from sutra_tasks.host.embedded_server import embedded_server
from sutra_tasks.models.registry.manifest import VersionFacts
from sutra_tasks.models.registry.model_registry import ModelRegistry
from sutra_tasks.models.registry.resolve import open_registry
from sutra_tasks.models.rollout.gate import Thresholds
from sutra_tasks.models.rollout.promotion import promote
from sutra_tasks.settings import Settings

if TYPE_CHECKING:
    from scripts.benchmarks.stream_sink import Sink
    from sutra_tasks.vectors import Floats

TEACHER: Final = "all-MiniLM-L6-v2"
WIDTH: Final = 384
WIDTHS: Final = {"two_thirds": 256, "half": 192, "third": 128}
SEED: Final = 7
AGREEMENT: Final = 0.999
KILLS: Final = 3
MOST_DIFFERENCE: Final = 1e-4
LOAD: Final = 0.5
CLIENTS: Final = 64
RECIPES: Final[dict[str, dict[str, Any]]] = {
    "layers3": {"layers": 3, "max_epochs": 3},
    "layers2": {"layers": 2, "max_epochs": 2},
    "static": {"student": "static", "max_epochs": 4},
}


def run(*, quick: bool) -> dict[str, Any]:
    """Run the benchmark."""
    # One server for all fleets, because this process stays a client of its first server.
    with tempfile.TemporaryDirectory(prefix="sutra-distill-") as name, embedded_server() as address:
        options = replace(_prepared(Path(name), quick=quick), broker_url=address)
        results = _projections(quick=quick)
        resumed = _resumed(options, quick=quick)
        results |= _students(options, quick=quick)
        results["static"] |= _streamed(options, quick=quick)
        results["swap"] = _swap(options, quick=quick)
        return {**results, "resume": resumed, "texts": glosses.source_title(_source(quick=quick))}


def _source(*, quick: bool) -> str:
    return "docstrings" if quick else "wordnet"


def _prepared(folder: Path, *, quick: bool) -> Settings:
    """Write the texts, and create a registry with the teacher in it."""
    source = _source(quick=quick)
    sentences, words, pairs = (600, 200, 100) if quick else (26_000, 8_000, 3_000)
    texts = glosses.sentences(sentences, SEED, source) + glosses.words(words, SEED, source)
    (folder / "texts").mkdir()
    with (folder / "texts" / "corpus.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    with (folder / "texts" / "pairs.jsonl").open("w") as file:
        for query, positive in glosses.retrieval(pairs, SEED, source):
            file.write(json.dumps({"query": query, "positive": positive}) + "\n")
    options = Settings(
        data_dir=str(folder / "texts"),
        models_dir=str(folder / "models"),
        models=TEACHER,
        distill_pause_s=0,
    )
    run_add(options, "search", TEACHER)
    ModelRegistry(folder / "models").promote("search", 1)
    return options


def _projections(*, quick: bool) -> dict[str, Any]:
    """Fit projections on some vectors, and measure how well they keep other vectors.

    On sentences of manuals and on glosses: how much a narrow space holds depends on the texts.
    """
    from sutra_tasks.distillation.data.local_embedding import embed_locally  # noqa: PLC0415 - torch takes seconds to import
    from sutra_tasks.distillation.measuring.correlation import draw_pairs, spearman  # noqa: PLC0415
    from sutra_tasks.distillation.measuring.ranking import neighbour_overlap  # noqa: PLC0415
    from sutra_tasks.distillation.training.projection import ceiling, jl, project, svd  # noqa: PLC0415
    from sutra_tasks.engines.load import load_engine  # noqa: PLC0415

    fit, measured = (300, 100) if quick else (3_000, 1_000)
    engine = load_engine(Settings(torch_threads=os.cpu_count() or 1))
    pairs = draw_pairs(measured, 50_000, np.random.default_rng(SEED))
    results: dict[str, Any] = {}
    sources = {"projection": "docstrings"} | ({} if quick else {"projection_of_glosses": "wordnet"})
    for title, source in sources.items():
        vectors = embed_locally(engine, glosses.sentences(fit + measured, SEED, source))
        held_out = vectors[fit:]
        found: dict[str, Any] = {"texts": glosses.source_title(source)}
        for kind in ("svd", "jl"):
            for name, width in WIDTHS.items():
                matrix: Floats = (
                    svd(vectors[:fit], width)
                    if kind == "svd"
                    else jl(WIDTH, width, np.random.default_rng(SEED))
                )
                narrow = project(matrix, held_out)
                found.setdefault(kind, {})[name] = {
                    "cosine": ceiling(matrix, held_out),
                    "spearman": spearman(held_out, narrow, pairs),
                    "top10": float(np.mean(neighbour_overlap(held_out, narrow))),
                }
        results[title] = found
    return results


def _students(options: Settings, *, quick: bool) -> dict[str, Any]:
    """Have the fleet distil each student, and read its report."""
    results: dict[str, Any] = {}
    with bench_fleet(options, devices=1) as fleet:
        for name, recipe in RECIPES.items():
            began = time.perf_counter()
            config = _config(name, quick=quick, **recipe)
            result = distill.delay(config)
            _ended(result, fleet, 1200)
            made = result.get(timeout=10)
            report = json.loads((_version(options, made["model"]) / "report.json").read_text())
            results[name] = _figures(report, time.perf_counter() - began)
    return results


def _config(name: str, *, quick: bool, **recipe: Any) -> DistillationConfig:
    small: dict[str, Any] = {"max_epochs": 1, "held_out": 100} if quick else {}
    defaults: dict[str, Any] = {
        "teacher": TEACHER,
        "texts": ("corpus.jsonl",),
        "pairs": "pairs.jsonl",
        "name": name,
        "output_dim": WIDTH // 2,
        "seed": SEED,
    }
    return DistillationConfig(**(defaults | recipe | small))


def _figures(report: dict[str, Any], seconds: float) -> dict[str, Any]:
    quality, sizes = report["quality"], report["sizes"]
    parameters, on_disk, a_vector = (
        sizes[name] for name in ("parameters", "bytes_on_disk", "bytes_per_vector")
    )
    intervals = {
        name: [quality[name]["low"], quality[name]["high"]]
        for name in ("cosine", "lifted_cosine", "spearman", "ndcg_ratio")
    }
    return {
        **{name: quality[name]["value"] for name in ("cosine", "lifted_cosine", "spearman", "top10")},
        "cosine_p5": quality["cosine_p5"]["value"],
        "ceiling": quality["ceiling"],
        "mse": quality["mse"]["value"],
        "ndcg_ratio": quality["ndcg_ratio"]["value"],
        "ndcg_teacher": quality["ndcg_teacher"]["value"],
        "ranking_ndcg": quality["ranking_ndcg"]["value"],
        "intervals": intervals,
        "speedup": report["speed"]["speed_improvement"],
        "bytes_ratio": on_disk[0] / on_disk[1],
        "parameters_ratio": parameters[0] / parameters[1],
        "vector_bytes_ratio": a_vector[0] / a_vector[1],
        "seconds": seconds,
    }


def _version(options: Settings, reference: str) -> Path:
    store = ModelRegistry(Path(options.models_dir or ""))
    return store.folder(*store.resolve(reference))


def _ended(result: EmbedResult, fleet: BenchFleet, timeout_s: float) -> None:
    """Wait for the result; meanwhile the supervisor restarts workers that die."""
    deadline = time.monotonic() + timeout_s
    while not result.ready():
        assert time.monotonic() < deadline, result.info
        time.sleep(fleet.supervisor.step(time.monotonic()))


def _streamed(options: Settings, *, quick: bool) -> dict[str, Any]:
    """Stream short texts through a fleet that serves the static student."""
    count, rounds = (2_000, 1) if quick else (30_000, 3)
    ModelRegistry(Path(options.models_dir or "")).promote("static", 1)
    served = replace(options, model="static", data_dir=None, stream_buffer_size=60_000)
    rates = []
    with bench_fleet(served, devices=1, cores=1) as fleet:
        file = fleet.folder / "texts.json"
        file.write_text(json.dumps(texts_of(1_000)))
        for turn in range(rounds + 1):
            sink: Sink
            sink, _ = offered(fleet, f"static-{turn}", count, 0, file)
            if turn:
                rates.append(sink.per_s)
    return {"stream_per_s": statistics.median(rates), "stream_rates": [round(rate) for rate in rates]}


def _swap(options: Settings, *, quick: bool) -> dict[str, Any]:
    """Promote a student to the teacher's place under load, and check every answer."""
    tasks, warm = (200, 50) if quick else (2_000, 200)
    store = ModelRegistry(Path(options.models_dir or ""))
    made = store.manifest("layers3", 1)
    student = store.add(
        "search",
        store.folder("layers3", 1),
        VersionFacts(space=made.space, width=made.width, golden=made.golden, metrics=made.metrics),
    ).version
    served = replace(options, model="search", data_dir=None)
    texts = texts_of(64)
    expected = {
        store.manifest("search", version).space: _expected(served, f"search@{version}", texts)
        for version in (1, student)
    }
    with bench_fleet(served, devices=2) as fleet:
        client = redis.Redis.from_url(fleet.options.broker_url or "")
        _load(texts, warm, 20.0, expected)
        rate = _rate(texts, warm)
        before = _load(texts, tasks // 2, rate, expected)
        swapper = threading.Thread(
            target=promote,
            args=(client, store, "search", student),
            kwargs={"thresholds": Thresholds(), "options": fleet.options},
        )
        swapper.start()
        during = _load(texts, tasks, rate, expected, until=swapper)
        swapper.join()
        after = _load(texts, tasks // 4, rate, expected)
        assert set(after.spaces) == {store.manifest("search", student).space}
        assert not any(part.failed or part.mixed for part in (before, during, after))
    return {
        "failed": before.failed + during.failed + after.failed,
        "mixed": before.mixed + during.mixed + after.mixed,
        "p99_ratio": percentile(during.seconds, 0.99) / percentile(before.seconds, 0.99),
        "tasks": len(during.seconds),
        "tasks_per_s": rate,
        "p99_before_ms": 1000 * percentile(before.seconds, 0.99),
        "p99_during_ms": 1000 * percentile(during.seconds, 0.99),
        "spaces_during": sorted(during.spaces.values()),
    }


@dataclass(slots=True)
class LoadResult:
    """Answers under load.

    Attributes:
        seconds: of each task.
        spaces: answers by embedding space.
        failed: tasks without an answer.
        mixed: answers whose vector is not that of their space.
    """

    seconds: list[float] = field(default_factory=list)
    spaces: Counter[str] = field(default_factory=Counter)
    failed: int = 0
    mixed: int = 0


def _expected(options: Settings, reference: str, texts: list[str]) -> Floats:
    """Compute a version's vectors in this process, because no device has loaded it yet."""
    from sutra_tasks.distillation.data.local_embedding import embed_locally  # noqa: PLC0415
    from sutra_tasks.models.loaded.loading import load_version  # noqa: PLC0415

    return embed_locally(load_version(options, open_registry(options), reference), texts)


def _rate(texts: list[str], count: int) -> float:
    """Return half of the fleet's rate of single tasks, at which no queue grows."""
    began = time.perf_counter()
    sent = [embed.delay(texts[number % len(texts)]) for number in range(count)]
    for result in sent:
        result.get(timeout=60)
    return LOAD * count / (time.perf_counter() - began)


def _load(
    texts: list[str],
    count: int,
    per_s: float,
    expected: Mapping[str, Floats],
    *,
    until: threading.Thread | None = None,
) -> LoadResult:
    """Send tasks at a steady rate, and check each answer's time, space and vector.

    Args:
        texts: the texts, sent by turns.
        count: tasks, at least.
        per_s: tasks a second.
        expected: the vectors of ``texts`` in each space.
        until: a thread; tasks are sent until it has ended.
    """
    found, lock = LoadResult(), threading.Lock()
    began = time.perf_counter()

    def one(number: int, due: float) -> None:
        at = number % len(texts)
        try:
            answer: Embeddings = embed.delay(texts[at], details=True).get(timeout=60)
        except Exception:  # noqa: BLE001 - counted
            with lock:
                found.failed += 1
            return
        seconds = time.perf_counter() - due
        row = expected[answer.space][at]
        right = len(row) == len(answer.vectors) and float(row @ answer.vectors) >= AGREEMENT
        with lock:
            found.seconds.append(seconds)
            found.spaces[answer.space] += 1
            found.mixed += not right

    with ThreadPoolExecutor(max_workers=CLIENTS) as pool:
        number = 0
        while number < count or (until is not None and until.is_alive()):
            due = began + number / per_s
            time.sleep(max(0.0, due - time.perf_counter()))
            pool.submit(one, number, due)
            number += 1
    return found


def _resumed(options: Settings, *, quick: bool) -> dict[str, Any]:
    """Kill the distill worker at random moments of a run; compare weights with an undisturbed run."""
    recipe: dict[str, Any] = {
        "layers": 2, "max_epochs": 2, "checkpoint_steps": 8, "half_precision": False, "pairs": None,
        "max_texts": 300 if quick else 1_500, "held_out": 100,
    }  # fmt: skip
    draw, repeated, killed = np.random.default_rng(SEED), 0, 0
    weights = []
    with bench_fleet(options, devices=1) as fleet:
        for name, kills in (("undisturbed", 0), ("killed", KILLS)):
            result = distill.delay(_config(name, quick=False, **recipe))
            seen: Any = None
            for _ in range(kills):
                at = _trained(result, fleet, int(draw.integers(2, 10)), unlike=seen)
                if result.ready():
                    break
                killed += 1
                os.kill(fleet.supervisor.pids["distill"], signal.SIGKILL)
                seen = result.info
                repeated = max(repeated, at - _trained(result, fleet, 0, unlike=seen))
            _ended(result, fleet, 600)
            weights.append(_weights(_version(options, result.get(timeout=10)["model"])))
    difference = max(float(np.abs(weights[0][name] - weights[1][name]).max()) for name in weights[0])
    assert difference <= MOST_DIFFERENCE
    return {
        "max_weight_difference": difference,
        "kills": killed,
        "most_steps_repeated": repeated,
        "checkpoint_steps": recipe["checkpoint_steps"],
    }


def _trained(result: EmbedResult, fleet: BenchFleet, steps: int, *, unlike: Any) -> int:
    """Wait until one process has trained ``steps`` steps; return the run's step, or 0 if it has ended.

    Progress that equals ``unlike`` is ignored: a process that was killed left it.
    """
    first: int | None = None
    while not result.ready():
        info = result.info
        if isinstance(info, dict) and info.get("phase") == "training" and info != unlike:
            first = info["step"] if first is None else first
            if info["step"] - first >= steps:
                return int(info["step"])
        time.sleep(fleet.supervisor.step(time.monotonic()))
    return 0


def _weights(folder: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file  # noqa: PLC0415

    return {
        f"{path.relative_to(folder)}:{name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
