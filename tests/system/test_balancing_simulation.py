"""The simulation behind ``scripts/bench balancing``: what arrives, and what a run counts."""

from itertools import islice, pairwise
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest

from scripts.benchmarks import __main__ as bench
from scripts.benchmarks import balancing as simulation
from scripts.benchmarks.balancing import (
    BURST_RATES,
    BURST_S,
    MESSAGE_S,
    OPTIONS,
    SLOWEST_TOKENS_PER_S,
    SNAPSHOT_S,
    Case,
    Message,
    Simulation,
    arrivals,
    simulate,
    traffic,
)
from sutra_tasks.client.call import Demand
from sutra_tasks.settings import STRATEGIES

ALONE = Case(1, mixed=False)
SMALL = Case(4, mixed=True)


def messages(*at_s: float, tokens: int = 1000) -> list[Message]:
    demand = Demand(texts=0, bytes=4 * tokens, sent_at=None, strategy=None)
    return [Message(number, moment, demand, float(tokens)) for number, moment in enumerate(at_s)]


def gaps(*, bursty: bool, count: int = 20_000) -> list[float]:
    moments = arrivals(np.random.default_rng(1), 100.0, bursty=bursty)
    return [later - sooner for sooner, later in pairwise(islice(moments, count))]


def test_bursts_keep_the_mean_rate() -> None:
    shares = [time / sum(BURST_S) for time in BURST_S]
    assert sum(rate * share for rate, share in zip(BURST_RATES, shares, strict=True)) == pytest.approx(1)


@pytest.mark.parametrize("bursty", [False, True])
def test_messages_arrive_at_the_rate_asked_for(bursty: bool) -> None:
    assert fmean(gaps(bursty=bursty)) == pytest.approx(1 / 100, rel=0.05)


def test_gaps_vary_as_poissons_do_and_more_in_bursts() -> None:
    # Squared coefficients of variation: 1 for exponential gaps.
    plain, bursts = (np.var(g) / np.mean(g) ** 2 for g in (gaps(bursty=False), gaps(bursty=True)))
    assert plain == pytest.approx(1, abs=0.05)
    assert bursts > 1.2


def test_every_strategy_meets_the_same_traffic() -> None:
    again = traffic(SMALL, 200, 3)
    assert traffic(SMALL, 200, 3) == again
    assert traffic(SMALL, 200, 4) != again
    assert {message.demand.texts for message in again} >= {1, 2, 4}
    assert max(message.demand.texts for message in again) <= 64


def test_waiting_lasts_until_those_in_front_are_served() -> None:
    took_s = MESSAGE_S + 1000 / SLOWEST_TOKENS_PER_S
    sent = messages(0.0, 0.0, 10.0, tokens=1000)
    outcome = Simulation(ALONE, "round_robin", sent, seed=0).run()
    # After the warm-up: the second message waits for the first, the third for none.
    assert outcome.wait_s == pytest.approx((took_s, took_s, took_s))
    assert outcome.finish_s == pytest.approx((2 * took_s,) * 3)
    assert outcome.utilisation == pytest.approx((2 * took_s / 10,))


def test_what_no_device_has_credit_for_waits_at_the_router() -> None:
    # Until it is measured a device has credit for 1,024 tokens, which a large message uses up.
    run = Simulation(ALONE, "round_robin", messages(*[0.0] * 20, tokens=2048), seed=0)
    run._env.run(until=1.5 * SNAPSHOT_S)
    assert len(run._waiting) == 19
    assert not run._fleet.has_credit


def test_a_device_is_measured_not_given() -> None:
    run = Simulation(ALONE, "round_robin", messages(0.0, tokens=1000), seed=0)
    worker = run._workers["000"]
    run._env.run(until=0.5 * OPTIONS.heartbeat_s)
    assert worker.seen("000").tokens_per_s is None
    run._env.run(until=1.5 * OPTIONS.heartbeat_s)
    seen = worker.seen("000")
    assert seen.tokens_per_s == pytest.approx(SLOWEST_TOKENS_PER_S, rel=0.3)
    assert seen.tokens_per_s != SLOWEST_TOKENS_PER_S
    assert seen.latency_s == pytest.approx(MESSAGE_S + 1000 / SLOWEST_TOKENS_PER_S)
    assert (seen.backlog_tokens, seen.backlog_messages, seen.credit_used) == (0, 0, 0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_serves_every_message_and_can_be_repeated(strategy: str) -> None:
    outcome = simulate((SMALL, strategy, 400, 0))  # it asserts that each is served once
    assert simulate((SMALL, strategy, 400, 0)) == outcome
    assert all(0 < share <= 1 for share in outcome.utilisation)


def test_a_message_served_twice_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    take_once = simulation.Worker.take

    def take(worker: simulation.Worker, message: Message) -> None:
        take_once(worker, message)
        if message.number == 0:
            take_once(worker, message)

    monkeypatch.setattr(simulation.Worker, "take", take)
    with pytest.raises(AssertionError, match="served twice"):
        simulate((SMALL, "round_robin", 100, 0))


def test_a_fleet_less_busy_than_what_it_was_offered_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    busy_s = simulation.Worker.busy_s
    monkeypatch.setattr(simulation.Worker, "busy_s", lambda *args: 0.8 * busy_s(*args))
    with pytest.raises(AssertionError, match="offered"):
        simulate((SMALL, "shortest_finish", 2000, 0))


def test_results_are_complete_and_can_be_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / name for name in ("results.json", "plot.svg")]
    command = ["bench", "balancing", "--quick", "--json", str(files[0]), "--plot", str(files[1])]
    monkeypatch.setattr("sys.argv", command)
    bench.main()
    assert all(file.stat().st_size for file in files)
    assert "p95_wait_vs_least_loaded.mixed_4" in capsys.readouterr().out
    drawn = files[1].read_text()
    assert all(name in drawn for name in STRATEGIES)


def test_a_benchmark_without_a_plot_refuses_before_it_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "overhead", "--plot", "plot.svg"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "no plot of overhead" in capsys.readouterr().err
