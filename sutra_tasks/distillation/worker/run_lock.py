"""Only one run at a time makes the next version of a model, for as long as it lasts.

A run may be silent for minutes: while a slow fleet embeds, or a large model. So a thread keeps the lock,
and what it finds is raised where the run looks up next.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, Self

import redis

from sutra_tasks import keys
from sutra_tasks.broker.result_backend import LeaseEnded
from sutra_tasks.errors import DistillationUnderWayError

__all__ = ["RunLock"]

KEEP_S: Final = keys.DISTILLING_S / 4

TAKE: Final = """#!lua flags=allow-oom
local held = redis.call('GET', KEYS[1])
if held and held ~= ARGV[1] .. ARGV[2] then
  if ARGV[4] == 'keep' or string.sub(held, 1, #ARGV[1]) ~= ARGV[1] then return held end
end
redis.call('SET', KEYS[1], ARGV[1] .. ARGV[2], 'EX', ARGV[3])
return false
"""
"""KEYS: who makes a model's next version. ARGV: the task, its process, seconds, 'take' or 'keep'.
Returns who holds it, if it is another task. One that is delivered again after a death takes over from
itself; the process it was taken from does not take it back."""

LET_GO: Final = """
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""


class RunLock:
    """See the module's docstring; a context manager, entered once."""

    def __init__(
        self, client: redis.Redis, name: str, task_id: str, incarnation: str, *, keep_s: float = KEEP_S
    ) -> None:
        """Prepare.

        Args:
            client: of the server with the queues.
            name: of the model.
            task_id: of the run.
            incarnation: of this process.
            keep_s: seconds between two renewals.
        """
        self._client, self._name, self._keep_s = client, name, keep_s
        self._task, self._incarnation = f"{task_id} ", incarnation
        self._lost: Exception | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="run-lock", daemon=True)

    def __enter__(self) -> Self:
        """Take it.

        Raises:
            DistillationUnderWayError: another task has it.
        """
        self._take("take")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of it."""
        self._ended.set()
        self._thread.join()
        mine = self._task + self._incarnation
        with suppress(redis.RedisError):  # it expires
            self._client.eval(LET_GO, 1, keys.distilling(self._name), mine)

    def check(self) -> None:
        """Raise what was found since.

        Raises:
            DistillationUnderWayError: another task has it.
            LeaseEnded: another process has it, and runs this task.
        """
        if self._lost is not None:
            raise self._lost

    def _keep(self) -> None:
        while not self._ended.wait(self._keep_s):
            try:
                self._take("keep")
            except redis.RedisError:
                continue  # a server that is away keeps its locks
            except (DistillationUnderWayError, LeaseEnded) as error:
                self._lost = error
                return

    def _take(self, how: str) -> None:
        lock, task = keys.distilling(self._name), self._task
        seconds = str(keys.DISTILLING_S)
        found: Any = self._client.eval(TAKE, 1, lock, task, self._incarnation, seconds, how)
        if found is None:
            return
        holder = found.decode()
        if holder.startswith(task):
            raise LeaseEnded
        raise DistillationUnderWayError(self._name, holder.partition(" ")[0])
