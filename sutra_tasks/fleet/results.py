"""The workers' result backend: Celery's own for Redis, with one round trip where it makes two.

Celery reads a task's stored state before each write, to keep a success final, and then sends the vectors
twice, to be stored and to be published. Here a script decides on the server, where nothing can come in
between, and the vectors travel once. Clients read results with the stock backend.
"""

from __future__ import annotations

from typing import Any, Final

from celery import states
from celery.backends.redis import RedisBackend

from sutra_tasks import keys

__all__ = ["LeaseEnded", "ResultBackend"]

STORE: Final = """
if ARGV[3] ~= 'SUCCESS' then
  if redis.call('EXISTS', KEYS[2]) == 1 then return -1 end
  local stored = redis.call('GET', KEYS[1])
  if stored and string.find(stored, '"status": "SUCCESS"', 1, true) then return 0 end
end
redis.call('SETEX', KEYS[1], ARGV[2], ARGV[1])
redis.call('PUBLISH', KEYS[1], ARGV[1])
return 1
"""
"""KEYS: the result, the mark of a lease that ended. ARGV: the record, seconds it is kept, its state. A
success is never overwritten by anything but a success, whose vectors are the same; and a process whose
work others do by now stores no errors: -1."""


class LeaseEnded(Exception):  # noqa: N818 - not an error: others do the work
    """This process was silent for too long, and what it says of a failure does not count.

    Raised rather than passed over: a message it took since then is nobody else's, and must go back.
    """


class ResultBackend(RedisBackend):  # type: ignore[misc]  # Celery is untyped
    """``result_backend`` of the workers."""

    @property
    def _mark(self) -> str:
        return keys.reaped(self.app.conf.broker_transport_options.get("incarnation", ""))

    def mark_as_failure(self, task_id: str, exc: Any, *args: Any, **kwargs: Any) -> Any:
        """Store an error and let its chord know.

        Raises:
            LeaseEnded: others do this process's work by now; nobody was told.
        """
        if self.client.exists(self._mark):
            raise LeaseEnded(task_id)
        return super().mark_as_failure(task_id, exc, *args, **kwargs)

    def _store_result(
        self,
        task_id: str,
        result: Any,
        state: str,
        traceback: Any = None,
        request: Any = None,
        **_: Any,
    ) -> Any:
        meta = self._get_result_meta(result=result, state=state, traceback=traceback, request=request)
        meta["task_id"] = task_id
        expires = self.failure_expires if state == states.FAILURE else self.expires
        stored = self.ensure(
            self.client.eval,
            (
                STORE,
                2,
                self.get_key_for_task(task_id),
                self._mark,
                self.encode(meta),
                int(expires),
                state,
            ),
        )
        if stored == -1:
            raise LeaseEnded(task_id)
        return result
