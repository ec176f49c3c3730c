"""Devices whose engine fails, with 1,200 tasks under way: each task ends as it must."""

from collections.abc import Callable

import pytest
from celery import group

from sutra_tasks import EncodingError, PoisonMessageError, embed
from sutra_tasks.broker.dead_letters import dead_letters, drop
from sutra_tasks.health.states import DeviceState
from tests.system.faulty_device import COMPUTED
from tests.system.work import LOADED, Work


@pytest.fixture
def faults(tmp_path):
    folder = tmp_path / "faults"
    folder.mkdir()
    return folder


def test_a_text_that_cannot_be_embedded_fails_alone(start_fleet, client, faults):
    with start_fleet(2, faults=faults, **LOADED) as fleet:
        work = Work(client)
        work.send((f"!raise {n}" for n in range(10)), error=EncodingError)
        work.fill(fleet)
        work.send((f"!raise {n}" for n in range(10, 20)), error=EncodingError)
        work.check()
        assert {device.state for device in fleet.status().devices} == {DeviceState.HEALTHY}
        assert fleet.reports == []


def test_a_device_that_begins_to_give_no_numbers_gets_no_work(start_fleet, client, faults, wait_until):
    with start_fleet(2, faults=faults, **LOADED) as fleet:
        work = Work(client)
        work.fill(fleet)
        work.send(["!once-nan it goes wrong here"])
        work.check()
        wait_until(lambda: DeviceState.UNHEALTHY in {device.state for device in fleet.status().devices})
        broken = next(one for one in fleet.status().devices if one.state is DeviceState.UNHEALTHY)
        assert "known texts" in broken.record.reason
        assert broken.record.tasks < len(work.sent)
        before = broken.record.tasks
        work.send(f"afterwards {n}" for n in range(100))
        work.check()
        assert fleet.device(broken.id).record.tasks == before


def test_a_device_that_hangs_is_ended_and_its_work_goes_on(start_fleet, client, faults):
    with start_fleet(2, faults=faults, batch_timeout_s=1.0, **LOADED) as fleet:
        work = Work(client)
        work.fill(fleet)
        work.send(["!once-hang for good"])
        work.check()
        assert [line for line in fleet.reports if "a batch hung" in line]
        assert "most recent call first" in fleet.log.read_text()  # with the stacks, for who debugs it


def test_texts_that_end_their_process_become_dead_letters_and_nothing_else_does(
    start_fleet, client, faults
):
    deadly = ["!die of this", "!die of that"]
    with start_fleet(2, faults=faults, **LOADED) as fleet:
        work = Work(client)
        work.fill(fleet)
        work.send(deadly, error=PoisonMessageError)
        work.check()
        letters = dead_letters(client)
        assert {one.task_id for one in letters} == {work.sent[text].id for text in deadly}
        assert {one.attempts for one in letters} == {fleet.options.max_attempts}
        drop(client, letters)


def alone(text: str) -> None:
    embed.delay(text).get(timeout=60)


def in_a_group(text: str) -> None:
    group(embed.s(text)).apply_async().get(timeout=60)


@pytest.mark.parametrize(
    ("sent", "times"),
    # A member of a group may be one of a chord that has not counted it.
    [(alone, 1), (in_a_group, 2)],
)
def test_what_a_device_answered_just_before_it_died_is_computed_again_only_in_a_group(
    start_fleet, faults, wait_until, sent: Callable[[str], None], times: int
):
    text = "!once-answer and end"
    with start_fleet(1, faults=faults) as fleet:
        [device] = fleet.device_ids
        pid = fleet.pid(device)
        sent(text)
        fleet.await_replacement(device, pid)

        def computed():
            return (faults / COMPUTED).read_text().splitlines().count(text)

        wait_until(lambda: computed() >= times and fleet.is_empty())
        assert computed() == times
        assert len(fleet.reports) == 1
