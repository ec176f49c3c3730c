"""Starts a worker: ``python -m sutra_tasks.roles router``, as ``sutra up`` does."""

from __future__ import annotations

import os
import sys
import warnings

from celery.bin.celery import celery
from celery.exceptions import SecurityWarning

from sutra_tasks.errors import SutraError
from sutra_tasks.roles.apps import device_app, distill_app, router_app
from sutra_tasks.settings import forget_foreign_variables, settings

__all__ = ["main"]

APPS = {"router": router_app, "device": device_app, "distill": distill_app}


def main(arguments: list[str]) -> None:
    """Run one worker.

    Args:
        arguments: ``router``, ``device`` or ``distill``, then options of ``celery worker``.
    """
    role, *options = arguments
    forget_foreign_variables()
    try:
        APPS[role]()
    except SutraError as error:
        sys.exit(f"sutra {role}: {error}")
    name = settings().device_id if role == "device" else role
    hostname = f"{name}@{os.uname().nodename}"
    # Gossip and mingle are for workers that coordinate through messages; these do so through Redis.
    quiet = ["--without-gossip", "--without-mingle"]
    # Celery warns root because of pickle, which these workers do not accept.
    warnings.simplefilter("ignore", SecurityWarning)
    words = [
        "--app",
        "sutra_tasks.app:app",
        "--quiet",
        "worker",
        "--hostname",
        hostname,
        *quiet,
        *options,
    ]
    # Celery's own `worker_main` drops the status, and with it the sentence that says why a worker ends.
    sys.exit(celery.main(args=words, standalone_mode=False))


if __name__ == "__main__":
    main(sys.argv[1:])
