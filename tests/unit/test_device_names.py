"""Names of a machine's devices: short enough for a setting, and different on different machines."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sutra_tasks.host.hardware import MOST_HOST_CHARS, host_name, plan_devices
from sutra_tasks.settings import Settings


def test_a_short_name_stays_readable() -> None:
    assert host_name("web1") == "web1"
    assert host_name("web1.example.com") == "web1-example-com"


def test_pods_that_agree_in_their_first_characters_have_devices_of_different_names() -> None:
    pods = [
        f"embeddings-for-the-product-search-in-europe-{end}" for end in ("7d9f4-abcde", "7d9f4-abcdf")
    ]
    assert len({host_name(pod) for pod in pods}) == 2


@given(st.text(max_size=300))
def test_every_host_gives_a_name_that_a_device_may_have(host: str) -> None:
    assert len(host_name(host)) <= MOST_HOST_CHARS
    for device in plan_devices(
        host=host, engine="simulated", gpus=(), cores=2, count=12, replicas=2, number=99
    ):
        assert Settings(device_id=device.id).device_id == device.id


def test_the_second_fleet_of_a_machine_has_other_names() -> None:
    first, second = (
        {
            one.id
            for one in plan_devices(host="h", engine="simulated", gpus=(), cores=2, count=2, number=n)
        }
        for n in (1, 2)
    )
    assert first.isdisjoint(second)
