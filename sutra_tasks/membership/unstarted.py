"""A worker that cannot start ends with one sentence, which its supervisor passes on.

What another try cannot mend ends a worker with the exit status :data:`CANNOT_START`: a model that is
not there, a broken GPU, a package that is missing. The sentence goes to the supervisor through the
server, or to standard error if nobody supervises the worker.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final, NoReturn

import redis

from sutra_tasks import keys
from sutra_tasks.connections import broker_client

if TYPE_CHECKING:
    from sutra_tasks.settings import Settings

__all__ = ["CANNOT_START", "end_unstarted", "why_unstarted"]

CANNOT_START: Final = 78
"""EX_CONFIG of the system's ``sysexits.h``: systemd's ``RestartPreventExitStatus`` can name it."""


def end_unstarted(options: Settings, worker: str, reason: str) -> NoReturn:
    """End this process by :class:`SystemExit`, and say why.

    Args:
        options: of the worker; its supervisor set ``incarnation``.
        worker: name of the worker, such as its device.
        reason: a sentence for people.
    """
    if not _told(options, reason):
        print(f"{worker} cannot start: {reason}", file=sys.stderr, flush=True)  # noqa: T201 - for people
    raise SystemExit(CANNOT_START)


def _told(options: Settings, reason: str) -> bool:
    if options.incarnation is None:
        return False
    try:
        with broker_client(options, retries=False) as client:
            client.set(keys.unstarted(options.incarnation), reason, ex=keys.UNSTARTED_S)
    except redis.RedisError:
        return False
    return True


def why_unstarted(client: redis.Redis, incarnation: str) -> str | None:
    """Return what a worker said with :func:`end_unstarted`; None: it is in its output."""
    try:
        found: Any = client.get(keys.unstarted(incarnation))
    except redis.RedisError:
        return None
    return None if found is None else found.decode(errors="replace")
