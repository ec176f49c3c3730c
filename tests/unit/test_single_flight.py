"""Work that several threads ask for runs once, apart from them, and is not waited for for ever."""

import threading

import pytest

from sutra_tasks.models.loaded.single_flight import SingleFlight, StillRunning
from tests.conftest import wait_until

WITHIN_S = 10


def test_the_work_runs_on_a_thread_that_does_not_keep_the_process() -> None:
    thread = SingleFlight[threading.Thread]().do("a", threading.current_thread)
    assert thread is not threading.current_thread()
    assert thread.daemon


def test_an_error_is_raised_where_it_was_asked_for_even_one_of_time() -> None:
    flights = SingleFlight[None]()
    for error in (ValueError("no"), TimeoutError("the server did not answer")):

        def fail(error: Exception = error) -> None:
            raise error

        with pytest.raises(type(error), match=str(error)):
            flights.do("a", fail)
    assert flights.running() == {}


@pytest.mark.parametrize("patience_s", [60, None])
def test_who_has_waited_enough_is_told_how_long_and_the_work_goes_on(patience_s: float | None) -> None:
    now, go_on = [0.0], threading.Event()
    flights = SingleFlight[int](clock=lambda: now[0])

    def slowly() -> int:
        assert go_on.wait(WITHIN_S)
        return 7

    found: list[int] = []
    first = threading.Thread(target=lambda: found.append(flights.do("a", slowly, patience_s)))
    first.start()
    wait_until(lambda: "a" in flights.running())
    now[0] = 61.0
    with pytest.raises(StillRunning) as told:
        flights.do("a", slowly, 60)
    assert told.value.seconds == 61
    assert flights.running() == {"a": 61.0}
    assert flights.do("b", lambda: 8) == 8  # another is not held up
    go_on.set()
    first.join(WITHIN_S)
    assert found == [7]
    assert flights.running() == {}
