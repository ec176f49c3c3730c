"""How long messages wait under each strategy: fleets of 4 to 256 devices, simulated.

A discrete-event simulation runs the router's own pure functions, ``choose`` and ``Fleet.after_sending``.
One router sees backlogs as they were at most 0.1 s ago, corrected by the messages that it has sent
since. A device serves in order, at its speed and with a small cost per message. The router is not given
speeds: a device is unmeasured at first, then each heartbeat publishes the tokens per second of its last
messages, with noise. Credits are as by default; when no device has credit, messages wait at the router.

All strategies get the same arrivals, texts and noise. Waiting is the time from arrival to the start of
service. A ratio compares two strategies' 95th percentiles in one run, and every figure is the median
over the seeds. A run ends after a fixed number of messages. Strategies that know no speeds overload the
slow devices of a mixed fleet, where only credits bound the waits: to once or twice ``SUTRA_CREDIT_S``.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Final

import numpy as np
import simpy

from scripts.benchmarks.report import median_ratio, percentile
from sutra_tasks.broker.load import MOST_CREDIT
from sutra_tasks.client.call import Demand
from sutra_tasks.host.hardware import count_cores
from sutra_tasks.routing.balancing import STRATEGIES, choose
from sutra_tasks.routing.snapshot import Device, Fleet
from sutra_tasks.settings import Settings

OPTIONS: Final = Settings()
OURS: Final = "shortest_finish"
SLOWEST_TOKENS_PER_S: Final = 10_000.0
MIXED: Final = (1, 2, 4)
MOST_TEXTS: Final = 64
MESSAGE_S: Final = 0.001
"""Seconds that a message costs a device beside its tokens."""

SNAPSHOT_S: Final = 0.1
WORK_NOISE: Final = 0.1
"""Spread of the true cost of a message about its estimated tokens (log-normal)."""

READING_NOISE: Final = 0.05
"""Spread of the published speed about the measured one (log-normal)."""

WINDOW_MESSAGES: Final = 64
SMOOTHING: Final = 1 / 32
BURST_RATES: Final = (2.0, 0.5)
"""Arrivals against the mean rate in a burst and between bursts ..."""

BURST_S: Final = (0.25, 0.5)
"""... and how long each lasts on average: together the mean rate again; short, for a run to see many."""

USUAL_LOAD: Final = 0.8
WARM_UP: Final = 0.4
LOAD_AGREEMENT: Final = 0.05
SIZES: Final = (4, 16, 64, 256)


@dataclass(frozen=True, slots=True)
class Case:
    """A fleet and what arrives at it."""

    devices: int
    mixed: bool
    bursty: bool = False
    load: float = USUAL_LOAD

    @property
    def name(self) -> str:
        """Its name in the results."""
        fleet = f"{'mixed' if self.mixed else 'uniform'}_{self.devices}"
        load = "" if self.load == USUAL_LOAD else f"_load_{100 * self.load:.0f}"
        return fleet + ("_bursty" if self.bursty else "") + load

    @property
    def speeds(self) -> list[float]:
        """Tokens per second of each device."""
        factors = MIXED if self.mixed else (1,)
        return [SLOWEST_TOKENS_PER_S * factors[n % len(factors)] for n in range(self.devices)]

    @property
    def messages(self) -> int:
        """How many to send: enough for each device."""
        return 8000 + 64 * self.devices


CASES: Final = (
    *(
        Case(size, mixed, bursty)
        for mixed in (True, False)
        for bursty in (False, True)
        for size in SIZES
    ),
    *(Case(16, mixed=True, load=load) for load in (0.5, 0.95)),
)
QUICK: Final = (Case(4, mixed=True), Case(16, mixed=False))


@dataclass(frozen=True, slots=True)
class Message:
    """A call on its way; ``work_tokens`` is its true cost, which the router does not know."""

    number: int
    at_s: float
    demand: Demand
    work_tokens: float


@dataclass(frozen=True, slots=True)
class Served:
    """When a message was served."""

    message: Message
    began_s: float
    ended_s: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """The measurements of one run, after its warm-up.

    Attributes:
        wait_s: seconds from arrival to the start of service: 50th, 95th and 99th percentile.
        finish_s: seconds from arrival to the end of service: the same percentiles.
        utilisation: share of the time in which each device served.
    """

    wait_s: tuple[float, ...]
    finish_s: tuple[float, ...]
    utilisation: tuple[float, ...]


def run(*, quick: bool) -> dict[str, Any]:
    """Run the benchmark."""
    cases, seeds = (QUICK, range(1)) if quick else (CASES, range(3))
    jobs = [
        (case, strategy, 1000 if quick else case.messages, seed)
        for case in sorted(cases, key=lambda case: -case.devices)  # the longest first
        for strategy in STRATEGIES
        for seed in seeds
    ]
    found: dict[tuple[str, str], list[Outcome]] = {}
    with ProcessPoolExecutor(count_cores()) as pool:
        for (case, strategy, _, _), outcome in zip(jobs, pool.map(simulate, jobs), strict=True):
            found.setdefault((case.name, strategy), []).append(outcome)
    names = [case.name for case in cases]

    def against(other: str, what: str) -> dict[str, float]:
        return {
            name: median_ratio(
                [getattr(one, what)[1] for one in found[name, OURS]],
                [getattr(one, what)[1] for one in found[name, other]],
            )
            for name in names
        }

    return {
        "p95_wait_vs_round_robin": against("round_robin", "wait_s"),
        "p95_wait_vs_least_loaded": against("least_loaded", "wait_s"),
        "p95_finish_vs_least_loaded": against("least_loaded", "finish_s"),
        "cases": {
            name: {strategy: _summary(found[name, strategy]) for strategy in STRATEGIES}
            for name in names
        },
        "seeds": len(seeds),
    }


def plot(results: Mapping[str, Any], file: Path) -> None:
    """Draw the 95th percentile of waiting against the size of the fleet."""
    import matplotlib as mpl  # noqa: PLC0415 - slow to import, and rarely asked for

    mpl.use("Agg")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "balancing", "font.size": 9})
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(2, 2, figsize=(8, 6), sharex=True, sharey=True, layout="constrained")
    for row, mixed in zip(axes, (True, False), strict=True):
        for panel, bursty in zip(row, (False, True), strict=True):
            cases = [
                case for case in CASES
                if (case.mixed, case.bursty, case.load) == (mixed, bursty, USUAL_LOAD)
                and case.name in results["cases"]
            ]  # fmt: skip
            for strategy in STRATEGIES:
                panel.plot(
                    [case.devices for case in cases],
                    [results["cases"][case.name][strategy]["wait_ms"]["p95"] for case in cases],
                    marker="o", markersize=4, label=strategy, linewidth=2.5 if strategy == OURS else 1,
                )  # fmt: skip
            speeds = "speeds 1x, 2x, 4x" if mixed else "equal speeds"
            panel.set_title(f"{speeds}, {'bursts' if bursty else 'Poisson arrivals'}")
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(SIZES, [str(size) for size in SIZES])
            panel.grid(alpha=0.3)
    for panel in axes[-1]:
        panel.set_xlabel("devices")
    figure.supylabel(f"95th percentile of waiting at {USUAL_LOAD:.0%} load, ms (simulated)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    plt.close(figure)


def simulate(job: tuple[Case, str, int, int]) -> Outcome:
    """Run one strategy through one case."""
    case, strategy, messages, seed = job
    return Simulation(case, strategy, traffic(case, messages, seed), seed).run()


def traffic(case: Case, count: int, seed: int) -> list[Message]:
    """Draw the messages; they are the same for every strategy."""
    rng = np.random.default_rng(seed)
    texts = np.exp(rng.uniform(0, np.log(MOST_TEXTS + 1), count)).astype(int)
    drawn = rng.choice(_paragraph_bytes(), texts.sum())
    sizes = np.add.reduceat(drawn, np.concatenate(([0], texts.cumsum()[:-1])))
    demands = [Demand(int(n), int(size), None, None) for n, size in zip(texts, sizes, strict=True)]
    mean_tokens = statistics.fmean(demand.tokens for demand in demands)
    capacity_per_s = sum(1 / (MESSAGE_S + mean_tokens / speed) for speed in case.speeds)
    noise = rng.lognormal(0, WORK_NOISE, count)
    moments = arrivals(rng, case.load * capacity_per_s, bursty=case.bursty)
    return [
        Message(number, at_s, demand, demand.tokens * factor)
        for number, (demand, factor, at_s) in enumerate(zip(demands, noise.tolist(), moments))  # noqa: B905 - moments have no end
    ]


def arrivals(rng: np.random.Generator, per_s: float, *, bursty: bool) -> Iterator[float]:
    """Yield the moments of a Poisson process, or of one modulated by a two-state Markov chain."""
    now_s, state = 0.0, 0
    until_s = rng.exponential(BURST_S[0]) if bursty else float("inf")
    while True:
        gap_s = rng.exponential(1 / (per_s * (BURST_RATES[state] if bursty else 1)))
        if now_s + gap_s < until_s:
            now_s += gap_s
            yield now_s
        else:  # the process has no memory: it begins anew in the other state
            now_s, state = until_s, 1 - state
            until_s = now_s + rng.exponential(BURST_S[state])


@cache
def _paragraph_bytes() -> Any:
    """Return the sizes of the Python manual's paragraphs, in UTF-8."""
    paragraphs = (" ".join(one.split()) for text in topics.values() for one in text.split("\n\n"))
    return np.array([len(one.encode()) for one in paragraphs if one])


class Simulation:
    """One run: arrivals, a router with its snapshot, and the devices."""

    def __init__(self, case: Case, strategy: str, messages: Sequence[Message], seed: int) -> None:
        self._case, self._strategy, self._messages = case, strategy, messages
        self._env = simpy.Environment()
        self._workers = {
            f"{number:03}": Worker(
                self._env, speed,
                first_beat_s=OPTIONS.heartbeat_s * number / case.devices,
                noise=np.random.default_rng([seed, number]),
            )
            for number, speed in enumerate(case.speeds)
        }  # fmt: skip
        self._waiting: deque[Message] = deque()
        self._fleet = Fleet()
        self._ticket = 0
        self._env.process(self._refresh())
        self._env.process(self._arrive())

    def run(self) -> Outcome:
        """Run until every message is served, and measure those after the warm-up."""
        while sum(len(worker.served) for worker in self._workers.values()) < len(self._messages):
            self._env.run(until=self._env.now + 1)
        served = [one for worker in self._workers.values() for one in worker.served]
        numbers = sorted(one.message.number for one in served)
        assert numbers == list(range(len(self._messages))), "a message was lost or served twice"

        first = int(WARM_UP * len(self._messages))
        began_s, ended_s = self._messages[first].at_s, self._messages[-1].at_s
        utilisation = tuple(
            worker.busy_s(began_s, ended_s) / (ended_s - began_s) for worker in self._workers.values()
        )
        if self._strategy == OURS and not self._case.bursty:
            self._check_load(utilisation, self._messages[first:], ended_s - began_s)
        counted = [one for one in served if one.message.number >= first]
        return Outcome(
            wait_s=_percentiles([one.began_s - one.message.at_s for one in counted]),
            finish_s=_percentiles([one.ended_s - one.message.at_s for one in counted]),
            utilisation=utilisation,
        )

    def _check_load(
        self, utilisation: Sequence[float], messages: Sequence[Message], seconds: float
    ) -> None:
        """Check that the fleet was as busy as the offered load requires: it is stable, and all share."""
        speeds = self._case.speeds
        per_message = MESSAGE_S * sum(speed**2 for speed in speeds) / sum(speeds)
        tokens = sum(message.work_tokens + per_message for message in messages)
        offered = tokens / (seconds * sum(speeds))
        busy = sum(u * speed for u, speed in zip(utilisation, speeds, strict=True)) / sum(speeds)
        assert abs(busy - offered) < LOAD_AGREEMENT, f"{offered:.3f} offered, {busy:.3f} busy"

    def _refresh(self) -> Generator[simpy.Event, None, None]:
        while True:
            self._fleet = Fleet(tuple(worker.seen(name) for name, worker in self._workers.items()))
            self._route()
            yield self._env.timeout(SNAPSHOT_S)

    def _arrive(self) -> Generator[simpy.Event, None, None]:
        for message in self._messages:
            yield self._env.timeout(message.at_s - self._env.now)
            self._waiting.append(message)
            self._route()

    def _route(self) -> None:
        while self._waiting and self._fleet.has_credit:
            message = self._waiting.popleft()
            device = choose(
                self._fleet, message.demand, self._ticket,
                default=self._strategy, queue_penalty_s=OPTIONS.queue_penalty_factor,
            )  # fmt: skip
            self._ticket += 1
            self._fleet = self._fleet.after_sending(device, message.demand.tokens)
            self._workers[device.id].take(message)


class Worker:
    """A device: it serves in order, and publishes its measured speed with each heartbeat."""

    def __init__(
        self,
        env: simpy.Environment,
        tokens_per_s: float,
        *,
        first_beat_s: float,
        noise: np.random.Generator,
    ) -> None:
        self._env, self._tokens_per_s, self._noise = env, tokens_per_s, noise
        self._inbox = simpy.Store(env)
        self._backlog_tokens = self._backlog_messages = self._credit_used = 0
        self._window: deque[tuple[int, float]] = deque(maxlen=WINDOW_MESSAGES)
        self._latency_s = self._latency_per_token_s = 0.0
        self._published = Device("", "", credit_tokens=MOST_CREDIT)
        self.served: list[Served] = []
        env.process(self._serve())
        env.process(self._beat(first_beat_s))

    def take(self, message: Message) -> None:
        """Queue a message."""
        self._load(message.demand.tokens, 1)
        self._inbox.put(message)

    def seen(self, name: str) -> Device:
        """Return the device as the router can see it now."""
        return replace(
            self._published,
            id=name,
            backlog_tokens=self._backlog_tokens,
            backlog_messages=self._backlog_messages,
            credit_used=self._credit_used,
        )

    def busy_s(self, began_s: float, ended_s: float) -> float:
        """Return for how many seconds of a period it was serving."""
        return sum(
            max(0.0, min(one.ended_s, ended_s) - max(one.began_s, began_s)) for one in self.served
        )

    def _load(self, tokens: int, messages: int) -> None:
        self._backlog_messages += messages
        self._backlog_tokens += messages * tokens
        self._credit_used += messages * min(tokens, MOST_CREDIT)

    def _serve(self) -> Generator[simpy.Event, Message, None]:
        while True:
            message = yield self._inbox.get()
            began_s, tokens = self._env.now, message.demand.tokens
            seconds = MESSAGE_S + message.work_tokens / self._tokens_per_s
            yield self._env.timeout(seconds)
            self.served.append(Served(message, began_s, self._env.now))
            self._load(tokens, -1)
            weight = SMOOTHING if self._window else 1.0
            self._latency_s += weight * (seconds - self._latency_s)
            self._latency_per_token_s += weight * (seconds / tokens - self._latency_per_token_s)
            self._window.append((tokens, seconds))

    def _beat(self, first_s: float) -> Generator[simpy.Event, None, None]:
        yield self._env.timeout(first_s)
        while True:
            noise = self._noise.lognormal(0, READING_NOISE)
            if self._window:
                tokens, seconds = map(sum, zip(*self._window, strict=True))
                speed = noise * tokens / seconds
                self._published = replace(
                    self._published,
                    credit_tokens=max(MOST_CREDIT, round(OPTIONS.credit_s * speed)),
                    tokens_per_s=speed,
                    latency_s=self._latency_s,
                    latency_per_token_s=self._latency_per_token_s,
                )
            yield self._env.timeout(OPTIONS.heartbeat_s)


def _percentiles(seconds: Sequence[float]) -> tuple[float, ...]:
    return tuple(percentile(seconds, share) for share in (0.5, 0.95, 0.99))


def _summary(outcomes: Sequence[Outcome]) -> dict[str, dict[str, float]]:
    def milliseconds(what: str) -> dict[str, float]:
        columns = zip(*(getattr(one, what) for one in outcomes), strict=True)
        return {
            name: 1000 * statistics.median(column)
            for name, column in zip(("p50", "p95", "p99"), columns, strict=True)
        }

    return {
        "wait_ms": milliseconds("wait_s"),
        "finish_ms": milliseconds("finish_s"),
        "utilisation": {
            name: statistics.median(of(one.utilisation) for one in outcomes)
            for name, of in (("mean", statistics.fmean), ("least", min), ("most", max))
        },
    }
