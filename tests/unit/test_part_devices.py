"""Parts of a long text go to devices that have its model, by whatever name."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from sutra_tasks.batching.batcher import Batcher
from sutra_tasks.batching.jobs import NO_CONTEXT
from sutra_tasks.batching.next_batch import Limits
from sutra_tasks.batching.service import EmbeddingService
from sutra_tasks.client.call import HEADER, VERSION, Call
from sutra_tasks.device.tasks import DeviceTasks
from sutra_tasks.engines.simulated_engine import SimulatedEncoder
from sutra_tasks.errors import InvalidOptionError
from sutra_tasks.fanout.long_texts import LongTexts
from sutra_tasks.fanout.store import NewDocument
from sutra_tasks.membership.fleet import FleetMember
from sutra_tasks.routing.snapshot import Device, Fleet, fleet_of
from sutra_tasks.settings import Settings
from tests.records import record

ENCODER = SimulatedEncoder(model="docs@1", width=4)
OPTIONS = Settings(batch_tokens=256)
LONG = " ".join(f"word{n}" for n in range(3000))


def document_of(model: str, *devices: Device) -> NewDocument:
    """Return the document of a long text that a device fans out."""
    kept: list[NewDocument] = []
    documents: Any = SimpleNamespace(begin=lambda _, __, found: kept.append(found))
    service = EmbeddingService(ENCODER, Batcher(Limits(256, 8, 0)), "g0", OPTIONS)
    texts = LongTexts(lambda *_: service, documents, "g0", OPTIONS, lambda: nullcontext(NO_CONTEXT))
    header = {"v": VERSION, "texts": 1, "bytes": len(LONG), "sent_at": None, "strategy": "round_robin"}
    message = SimpleNamespace(
        headers={HEADER: header}, payload=([], {}, {}), sutra_raw=b"", sutra_weight=0
    )
    prepared = service.prepare(Call.of([LONG], {"model": "docs"}, Settings()))
    texts.fan_out(service, prepared, message, Fleet(devices), model=model)
    return kept[0]


def device(name: str, **facts: Any) -> Device:
    return Device(name, name, **({"space": "another:4"} | facts))


@pytest.mark.parametrize(
    ("having", "chosen"),
    [
        ({"models": ("docs", "docs@1")}, {"g0", "g1"}),
        ({"models": ("/srv/docs",), "space": ENCODER.info.space}, {"g0", "g1"}),
        ({"space": ""}, {"g0", "g1"}),  # of another release: it does not say
        ({"models": ("docs", "docs@2")}, {"g0"}),
        ({}, {"g0"}),
    ],
)
def test_parts_go_to_devices_that_have_the_model(having: dict[str, Any], chosen: set[str]) -> None:
    devices = (device("g0", models=("docs@1",)), device("g1", **having), device("g2"))
    assert set(document_of("docs@1", *devices).devices) == chosen


def test_parts_are_as_many_as_the_devices_that_have_the_model_need() -> None:
    alone = document_of("docs@1", device("g0"))
    others = [device(f"g{n}") for n in range(1, 40)]
    assert len(document_of("docs@1", device("g0"), *others).parts) == len(alone.parts)


def test_a_device_says_of_which_space_its_default_is() -> None:
    (found,) = fleet_of([FleetMember("g0", 0.0, record("g0", space="s:4"))], 6.0).devices
    assert found.space == "s:4"


def test_a_part_is_computed_by_a_model_of_its_space_by_whatever_name() -> None:
    held = SimpleNamespace(service="of the space")

    def by_name(model: str, _: str) -> SimpleNamespace:
        if model != "docs":
            raise InvalidOptionError("model", model, "one of docs")
        return SimpleNamespace(service="by name")

    tasks: Any = SimpleNamespace(
        _models=SimpleNamespace(find_by_space=lambda space: held if space == "s:4" else None),
        _model=by_name,
    )
    service: Any = DeviceTasks.service_of_part
    assert service(tasks, "/another/host/docs", "s:4") == "of the space"
    assert service(tasks, "docs", "t:4") == "by name"
