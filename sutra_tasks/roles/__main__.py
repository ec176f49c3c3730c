"""Starts a worker: ``python -m sutra_tasks.roles router``, as ``sutra up`` does."""

from __future__ import annotations

import os
import sys
import warnings

from celery.bin.celery import celery
from celery.exceptions import SecurityWarning

from sutra_tasks.errors import SutraError
from sutra_tasks.extras import how_to_install
from sutra_tasks.host.processes import end_on_signals
from sutra_tasks.membership.unstarted import CANNOT_START, end_unstarted
from sutra_tasks.settings import forget_foreign_variables, settings

__all__ = ["main"]


def main(arguments: list[str]) -> None:
    """Run one worker.

    Args:
        arguments: ``router``, ``device`` or ``distill``, then options of ``celery worker``.
    """
    end_on_signals()
    role, *options = arguments
    forget_foreign_variables()
    try:
        _configure(role)
    except SutraError as error:
        sys.stderr.write(f"sutra {role}: {error}\n")
        sys.exit(CANNOT_START)
    except ModuleNotFoundError as error:
        if (needed := how_to_install(error)) is None:
            raise
        end_unstarted(settings(), role, needed)
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


def _configure(role: str) -> None:
    # Its modules need packages that may be missing.
    from sutra_tasks.roles import apps  # noqa: PLC0415

    {"router": apps.router_app, "device": apps.device_app, "distill": apps.distill_app}[role]()


if __name__ == "__main__":
    main(sys.argv[1:])
