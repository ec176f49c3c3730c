"""The floor: many at once, or one alone."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from sutra_tasks.batching.shared_lock import Floor
from tests.conftest import wait_until


def test_many_share_the_floor() -> None:
    floor, met = Floor(), threading.Barrier(8)

    def share() -> None:
        with floor.shared():
            met.wait(10)

    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(share) for _ in range(8)]:
            done.result()


def test_who_wants_to_be_alone_is_and_goes_before_who_comes_later() -> None:
    floor, order = Floor(), list[str]()
    with ThreadPoolExecutor() as threads:

        def alone() -> None:
            with floor.alone():
                order.append("alone")

        def shared() -> None:
            with floor.shared():
                order.append("shared")

        with floor.shared():
            first = [threads.submit(alone) for _ in range(3)]
            wait_until(lambda: floor._wanting == 3)
            later = [threads.submit(shared) for _ in range(3)]
            assert order == []
        for done in [*first, *later]:
            done.result(10)
    assert order == 3 * ["alone"] + 3 * ["shared"]


def test_nobody_shares_the_floor_with_who_is_alone() -> None:
    floor, inside, most = Floor(), 0, 0
    counting = threading.Lock()

    def visit(alone: bool) -> None:
        nonlocal inside, most
        with floor.alone() if alone else floor.shared():
            with counting:
                inside += 1
                most = max(most, inside if alone else 0)
            with counting:
                inside -= 1

    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(visit, n % 3 == 0) for n in range(600)]:
            done.result(10)
    assert most == 1


def test_an_error_leaves_the_floor() -> None:
    floor = Floor()
    for way in (floor.alone, floor.shared, floor.alone):
        with pytest.raises(ZeroDivisionError), way():
            raise ZeroDivisionError
