"""The record of a device: before it has a model, and while it serves one."""

from typing import Any

import pytest

from sutra_tasks.broker.load import MOST_CREDIT
from sutra_tasks.device.description import Identity, describe
from sutra_tasks.engines.simulated_engine import SimulatedEncoder
from sutra_tasks.health.memory import Memory
from sutra_tasks.health.monitor import HealthVerdict
from sutra_tasks.health.states import DeviceState, HealthStatus
from sutra_tasks.health.statistics import Statistics
from sutra_tasks.membership.device_record import DeviceRecord
from sutra_tasks.settings import Settings

OPTIONS = Settings(device_id="g0", engine="simulated", model="asked", credit_s=2.0)
VERDICT = HealthVerdict(
    DeviceState.DEGRADED, "slow", HealthStatus(warnings=("slow",)), Memory(1, 4, "test")
)
NOTHING: dict[str, Any] = {
    "encoder": None,
    "models": (),
    "candidate": "",
    "candidate_state": "",
    "waiting_texts": 0,
    "uncounted": (0, 0),
}


def described(*, options: Settings = OPTIONS, **facts: Any) -> DeviceRecord:
    summary = Statistics().summary() | {"tokens_per_s": facts.pop("tokens_per_s", None)}
    return describe(Identity(options, "g0.1", "host", 7, 5.0), VERDICT, summary, **NOTHING | facts)


def test_a_device_that_loads_its_model_says_which_and_of_what_process_it_is() -> None:
    found = described()
    assert (found.id, found.incarnation, found.host, found.pid) == ("g0", "g0.1", "host", 7)
    assert (found.model, found.space, found.width, found.window) == ("asked", "", 0, 0)
    assert (found.attention, found.models) == ("", ())


def test_a_device_that_serves_says_what_its_parts_say() -> None:
    encoder = SimulatedEncoder(model="served", width=8)
    found = described(
        encoder=encoder,
        models=("asked", "served"),
        candidate="p",
        candidate_state="ready",
        waiting_texts=3,
        uncounted=(1, 40),
    )
    assert (found.model, found.space, found.width) == ("served", encoder.info.space, 8)
    assert (found.candidate, found.candidate_state) == ("p", "ready")
    assert (found.waiting_texts, found.uncounted_messages, found.uncounted_tokens) == (3, 1, 40)
    assert (found.state, found.reason, found.warnings) == (DeviceState.DEGRADED, "slow", ("slow",))
    assert (found.memory_bytes, found.memory_share) == (1, 0.25)
    assert (found.attention, found.engine, found.compute) == ("none", "simulated", "none")


@pytest.mark.parametrize(
    ("tokens_per_s", "expected"),
    [(None, MOST_CREDIT), (1.0, MOST_CREDIT), (MOST_CREDIT, 2 * MOST_CREDIT)],
)
def test_a_device_is_given_its_work_of_some_seconds_ahead_but_always_one_message(
    tokens_per_s: float | None, expected: int
) -> None:
    assert described(tokens_per_s=tokens_per_s).credit_tokens == expected
