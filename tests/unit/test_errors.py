"""Errors keep their class, facts and message on the way from a worker to the caller."""

import inspect
import pickle
import re
from types import ModuleType
from typing import Any

import pytest
from celery import Celery
from celery.backends.base import Backend
from kombu.utils import json as kombu_json

import sutra_tasks
from sutra_tasks import errors
from sutra_tasks.errors import SutraError

json: Any = kombu_json  # untyped

FACTS: dict[str, tuple[Any, ...]] = {
    "BackpressureSignal": (10_000, 10_000, 0.8, 0.25, 3),
    "BrokerNotConfiguredError": (),
    "CallbackQueueError": ("project.tasks.save", "link"),
    "CorruptMessageError": ("the rows of a part",),
    "CorruptResultError": ("data is not base64",),
    "EncodingError": ("gpu0", 3, "RuntimeError"),
    "FleetSaturated": (1_200_000, 61.0),
    "IncompleteDocumentError": (3, 40, 420.0),
    "InvalidInputError": ("embed() needs texts",),
    "InvalidOptionError": ("dimensions", "0", "1 or more"),
    "DeviceNameTakenError": ("gpu0",),
    "InvalidMessageError": ("headers.expires", "it must be a time"),
    "ResultRefusedError": ("WRONGTYPE Operation against a key holding the wrong kind of value",),
    "InvalidTextError": (7, "a str is needed, not None"),
    "MissingRightsError": ("app", "+publish '~sutra:fleet' '&x'", "SUTRA_BROKER_URL", ""),
    "ModelError": ("all-MiniLM-L6-v2", "cannot be loaded"),
    "NoHealthyWorkersError": (4, 31.5, 30.0),
    "PoisonMessageError": (3, "its workers died"),
    "DistillationUnderWayError": ("search", "5f1b"),
    "TrainingDivergedError": (12, 400, "loss inf, gradient norm nan, first loss 0.93", 0.5, 8),
    "PromotionRefusedError": ("search", 3, "quality 0.81 is under 0.90"),
    "ServerUnavailableError": ("ConnectionError",),
    "SettingsError": ("SUTRA_ENGINE", "onnx", "must be one of torch, simulated"),
    "SpaceUnavailableError": ("search@3", "a:384", "b:192"),
    "StreamFaultError": ("docs", "WRONGTYPE Operation against a key holding the wrong kind of value"),
    "SutraError": ("said plainly",),
    "TooLargeError": ("texts in one call", 10_001, 10_000, "SUTRA_MAX_TEXTS"),
    "TooLittleTextError": (120, 3_000, 7, 40),
    "UnconfirmedEntriesError": (["a", "b"], "ConnectionError"),
    "UnsupportedVersionError": ("message", "2", 1),
}
PUBLIC = [name for name, _ in inspect.getmembers(errors, inspect.isclass)]


def sample(name: str) -> SutraError:
    made: SutraError = getattr(errors, name)(*FACTS[name])
    return made


def alike(one: BaseException, other: BaseException) -> bool:
    return (
        type(one) is type(other)
        and str(one) == str(other)
        and vars(one) == vars(other)
        and list(one.args) == list(other.args)
    )


@pytest.mark.parametrize("name", PUBLIC)
def test_the_caller_gets_the_error_that_was_raised(name: str) -> None:
    error = sample(name)
    assert alike(type(error)(*json.loads(json.dumps(error.args))), error)

    backend = Backend(Celery(set_as_current=False), serializer="json")
    stored = json.loads(json.dumps(backend.prepare_exception(error)))
    assert alike(backend.exception_to_python(stored), error)


@pytest.mark.parametrize("name", PUBLIC)
def test_an_error_survives_a_process_pool(name: str) -> None:
    error = sample(name)
    assert alike(pickle.loads(pickle.dumps(error)), error)


@pytest.mark.parametrize("name", PUBLIC)
def test_an_error_says_its_facts(name: str) -> None:
    said = str(sample(name))
    for fact in FACTS[name]:
        shown = f"{fact:,.0f}" if isinstance(fact, int | float) else fact
        shown = f"{len(fact)} entries" if isinstance(fact, list) else shown
        assert shown in said
    assert said


@pytest.mark.parametrize(
    ("oldest_s", "said"), [(None, "none has ever registered"), (31.4, "heartbeat 31 s ago")]
)
def test_a_fleet_that_never_was_differs_from_one_that_died(oldest_s: float | None, said: str) -> None:
    assert said in str(errors.NoHealthyWorkersError(4, oldest_s, 30.0))


def test_the_tree_that_is_drawn_is_the_tree_that_is() -> None:
    path: dict[int, str] = {}
    drawn = {}
    for line in (errors.__doc__ or "").splitlines():
        if found := re.match(r"    ([ │├└─]*)([A-Z]\w+)", line):
            depth = len(found[1])
            path[depth] = found[2]
            drawn[found[2]] = path.get(depth - 4, "Exception")
    assert drawn == {name: getattr(errors, name).__mro__[1].__name__ for name in PUBLIC}


def test_every_error_is_named_by_its_module_and_by_the_package() -> None:
    assert errors.__all__ == sorted(PUBLIC)
    assert set(PUBLIC) <= set(sutra_tasks.__all__)


def test_the_packages_names_are_all_listed_and_sorted() -> None:
    names = {name: getattr(sutra_tasks, name) for name in dir(sutra_tasks) if name[0] != "_"}
    public = [name for name, value in names.items() if not isinstance(value, ModuleType)]
    assert sutra_tasks.__all__ == sorted(public)


@pytest.mark.parametrize("name", ["SettingsError", "InvalidInputError"])
def test_a_wrong_value_is_a_value_error(name: str) -> None:
    assert issubclass(getattr(errors, name), ValueError)
