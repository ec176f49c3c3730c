"""The lock that many threads share, or one has exclusively."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from sutra_tasks.batching.shared_lock import SharedLock
from tests.conftest import wait_until


def test_many_share_the_lock() -> None:
    lock, met = SharedLock(), threading.Barrier(8)

    def share() -> None:
        with lock.shared():
            met.wait(10)

    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(share) for _ in range(8)]:
            done.result()


def test_an_exclusive_holder_waits_for_those_that_share_and_goes_before_later_ones() -> None:
    lock, order = SharedLock(), list[str]()
    with ThreadPoolExecutor() as threads:

        def alone() -> None:
            with lock.exclusive():
                order.append("alone")

        def shared() -> None:
            with lock.shared():
                order.append("shared")

        with lock.shared():
            first = [threads.submit(alone) for _ in range(3)]
            wait_until(lambda: lock._waiting == 3)
            later = [threads.submit(shared) for _ in range(3)]
            assert order == []
        for done in [*first, *later]:
            done.result(10)
    assert order == 3 * ["alone"] + 3 * ["shared"]


def test_nobody_shares_the_lock_with_an_exclusive_holder() -> None:
    lock, inside, most = SharedLock(), 0, 0
    counting = threading.Lock()

    def visit(alone: bool) -> None:
        nonlocal inside, most
        with lock.exclusive() if alone else lock.shared():
            with counting:
                inside += 1
                most = max(most, inside if alone else 0)
            with counting:
                inside -= 1

    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(visit, n % 3 == 0) for n in range(600)]:
            done.result(10)
    assert most == 1


def test_an_error_releases_the_lock() -> None:
    lock = SharedLock()
    for way in (lock.exclusive, lock.shared, lock.exclusive):
        with pytest.raises(ZeroDivisionError), way():
            raise ZeroDivisionError
