"""Every key of a fleet begins with its namespace, and the names of its queues stay as they are."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import pytest

from sutra_tasks import keys
from sutra_tasks.broker.queues import lane, lanes, queue_of
from sutra_tasks.celery_settings import celery_settings
from sutra_tasks.errors import SettingsError
from sutra_tasks.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

KEYS = [
    function
    for name, function in inspect.getmembers(keys, inspect.isfunction)
    if name in keys.__all__ and name not in ("prefix", "device_queue")
]


@pytest.fixture
def _acme(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(keys, "settings", lambda: Settings(namespace="acme"))
    lanes.cache_clear()
    yield
    lanes.cache_clear()


@pytest.mark.usefixtures("_acme")
@pytest.mark.parametrize("key", KEYS, ids=lambda function: function.__name__)
def test_every_key_begins_with_the_namespace(key: object) -> None:
    assert callable(key)
    names = ("x",) * len(inspect.signature(key).parameters)
    assert key(*names).startswith("acme:")


@pytest.mark.usefixtures("_acme")
def test_lists_of_queues_have_the_namespace_and_queues_have_not() -> None:
    assert lane(keys.EMBED_QUEUE, 0) == "acme:sutra.embed"
    assert all(name.startswith("acme:sutra.device.gpu0") for name in lanes(keys.device_queue("gpu0")))
    assert {queue_of(name) for name in lanes(keys.EMBED_QUEUE)} == {keys.EMBED_QUEUE}


def test_celerys_own_keys_begin_with_it_as_well() -> None:
    found = celery_settings(Settings(broker_url="redis://localhost", namespace="acme"))
    assert found["broker_transport_options"]["global_keyprefix"] == "acme:"
    assert found["result_backend_transport_options"]["global_keyprefix"] == "acme:"


def test_without_a_namespace_nothing_is_put_before_a_name() -> None:
    assert keys.prefix() == ""
    assert keys.fleet() == "sutra:fleet"


@pytest.mark.parametrize("name", ["a b", "a:b", "a*", "é", "-a", "a" * 65, "[a]"])
def test_a_name_that_would_mean_something_else_to_the_server_is_refused(name: str) -> None:
    with pytest.raises(SettingsError, match="SUTRA_NAMESPACE"):
        Settings(namespace=name)
