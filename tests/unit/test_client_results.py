"""Results and errors mean the same in copies, and it is known which ones a task may wait for."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from celery.result import AsyncResult

from sutra_tasks import EmbedResult, Vectors, embed
from sutra_tasks.app import app
from sutra_tasks.client.results import _may_wait
from sutra_tasks.settings import settings
from tests.redis.results import ERRORS, VALUES, described

COPIES = [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))]


@pytest.fixture(autouse=True)
def _configured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SUTRA_BROKER_URL", "redis://127.0.0.1:1/0")
    settings.cache_clear()
    yield
    settings.cache_clear()


def result(task_id: str = "1", **options: Any) -> EmbedResult:
    made: EmbedResult = embed.AsyncResult(task_id, **options)
    return made


def come(value: Any, status: str = "SUCCESS") -> EmbedResult:
    one = result()
    one._cache = {"status": status, "result": value, "traceback": None, "children": [], "task_id": "1"}
    return one


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_is_an_equal_result_of_the_same_app(copied: Callable[[Any], Any]) -> None:
    made = copied(result())
    assert made == result()
    assert isinstance(made, EmbedResult)
    assert made.app is app
    assert made.id == "1"
    assert made.backend is app.backend


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_keeps_what_came_before(copied: Callable[[Any], Any]) -> None:
    for value in VALUES.values():
        assert described(copied(come(value)).get()) == described(value)
    made = copied(come(Vectors.of(np.ones((2, 3), np.float32)))).get()
    assert isinstance(made, Vectors)


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("error", list(ERRORS.values()), ids=list(ERRORS))
def test_every_error_survives_a_copy_of_itself_and_of_its_result(
    copied: Callable[[Any], Any], error: Exception
) -> None:
    assert described(copied(error)) == described(error)
    with pytest.raises(type(error)) as told:
        copied(come(error, "FAILURE")).get()
    assert described(told.value) == described(error)


@pytest.mark.parametrize("copied", COPIES)
def test_the_parents_of_a_chains_result_are_copied_with_it(copied: Callable[[Any], Any]) -> None:
    parent = AsyncResult("host", app=app)
    made = copied(result("2", parent=result("1", parent=parent)))
    assert (made.id, made.parent.id, made.parent.parent.id) == ("2", "1", "host")


@pytest.mark.parametrize("copied", COPIES)
def test_the_result_of_a_group_is_copied_with_what_came(copied: Callable[[Any], Any]) -> None:
    group = app.GroupResult("g", [come(VALUES["one"]), result("2")])
    made = copied(group)
    assert made == group
    assert made.app is app
    assert (made.results[0].get() == VALUES["one"]).all()


def test_the_public_class_is_a_result_of_this_app() -> None:
    assert EmbedResult("1").app is app


@pytest.mark.parametrize(
    ("awaited", "may_wait"),
    [
        (lambda own, _: own, True),
        (lambda own, _: app.GroupResult("g", [own, own]), True),
        (lambda own, _: result("2", parent=app.GroupResult("g", [own, own])), True),
        (lambda _, host: result("2", parent=host), False),
        (lambda own, host: app.GroupResult("g", [own, host]), False),
        (lambda own, host: app.GroupResult("g", [own, result("2", parent=host)]), False),
    ],
)
def test_a_task_of_a_host_may_wait_for_what_the_fleet_alone_computes(
    awaited: Callable[[Any, Any], Any], may_wait: bool
) -> None:
    host = AsyncResult("host", app=app)  # of Celery's own class, as those of a project's app
    one = awaited(result("1"), host)
    assert _may_wait([one]) is may_wait
