"""The lock on a model's next version: at most one distillation run makes it at a time.

A run can be silent for minutes, while a slow fleet embeds its texts, so a thread renews the lock. If the
lock is lost, the run learns it from :meth:`RunLock.check`.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, Self

import redis

from sutra_tasks import keys, lua
from sutra_tasks.broker.result_backend import LeaseEnded
from sutra_tasks.errors import DistillationUnderWayError

__all__ = ["RunLock"]

RENEW_S: Final = keys.DISTILLING_S / 4

TAKE_RUN_LOCK: Final = lua.script("distillation/worker/take_run_lock")
DELETE_IF_EQUAL: Final = lua.script("delete_if_equal")


class RunLock:
    """A context manager that has the lock; enter it once."""

    def __init__(
        self,
        client: redis.Redis,
        name: str,
        task_id: str,
        incarnation: str,
        *,
        renew_s: float = RENEW_S,
    ) -> None:
        """Prepare the lock.

        Args:
            client: of the server with the queues.
            name: of the model.
            task_id: of the run.
            incarnation: of this process.
            renew_s: seconds between two renewals.
        """
        self._client, self._name, self._renew_s = client, name, renew_s
        self._task, self._incarnation = f"{task_id} ", incarnation
        self._lost: Exception | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="run-lock", daemon=True)

    def __enter__(self) -> Self:
        """Take the lock.

        Raises:
            DistillationUnderWayError: another task has it.
        """
        self._take(renew=False)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the lock, if it was not lost."""
        self._ended.set()
        self._thread.join()
        value = self._task + self._incarnation
        with suppress(redis.RedisError):  # the lock expires
            DELETE_IF_EQUAL(self._client, key=keys.distilling(self._name), value=value)

    def check(self) -> None:
        """Raise an error if the lock was lost.

        Raises:
            DistillationUnderWayError: another task has it.
            LeaseEnded: another process runs this task and has it.
        """
        if self._lost is not None:
            raise self._lost

    def _keep(self) -> None:
        while not self._ended.wait(self._renew_s):
            try:
                self._take(renew=True)
            except redis.RedisError:
                continue  # a server that is away keeps its locks
            except (DistillationUnderWayError, LeaseEnded) as error:
                self._lost = error
                return

    def _take(self, *, renew: bool) -> None:
        found: Any = TAKE_RUN_LOCK(
            self._client,
            lock=keys.distilling(self._name),
            task=self._task,
            incarnation=self._incarnation,
            ttl_s=keys.DISTILLING_S,
            renew=int(renew),
        )
        if found is None:
            return
        holder = found.decode()
        if holder.startswith(self._task):
            raise LeaseEnded
        raise DistillationUnderWayError(self._name, holder.partition(" ")[0])
