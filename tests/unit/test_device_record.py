"""A device's record, and the device as a strategy sees it."""

import json
from dataclasses import replace

import pytest

from sutra_tasks.errors import UnsupportedVersionError
from sutra_tasks.health.states import DeviceState
from sutra_tasks.membership.device_record import DeviceRecord
from sutra_tasks.membership.fleet import FleetMember
from sutra_tasks.routing.snapshot import fleet_of
from tests.records import RECORD


def test_a_record_reads_back_as_it_was_written() -> None:
    said = replace(RECORD, state=DeviceState.DEGRADED, reason="slow", warnings=("slow", "full"))
    assert DeviceRecord.from_json(said.to_json()) == said
    assert DeviceRecord.from_json(said.to_json().encode()) == said


@pytest.mark.parametrize("version", [0, 1, 3, 5, "4", None])
def test_a_record_of_another_version_is_refused(version: object) -> None:
    text = json.dumps({**json.loads(RECORD.to_json()), "v": version})
    with pytest.raises(UnsupportedVersionError) as refused:
        DeviceRecord.from_json(text)
    assert (refused.value.what, refused.value.supported) == ("device record", 4)
    assert refused.value.version == str(version)


def test_a_device_lives_up_to_its_ttl() -> None:
    assert fleet_of([FleetMember("gpu0", 6.0, RECORD)], 6.0).devices
    assert not fleet_of([FleetMember("gpu0", 6.001, RECORD)], 6.0).devices


@pytest.mark.parametrize("state", DeviceState)
def test_only_a_device_that_has_started_and_joined_serves(state: DeviceState) -> None:
    seen = FleetMember("gpu0", 0.0, replace(RECORD, state=state))
    devices = fleet_of([seen], 6.0).devices
    assert [device.state for device in devices] == (
        [] if state in (DeviceState.STARTING, DeviceState.REFUSED) else [state]
    )
    assert fleet_of([seen], 6.0).known == 1
