"""The three worker roles as Celery apps, and the command that runs one.

``python -m sutra_tasks.roles.apps router`` is what ``sutra up`` starts; a deployment can as well run
``celery -A workers.router worker``. Both are the client's app with a role's settings.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import TYPE_CHECKING, Any, Final

import redis
from celery.exceptions import SecurityWarning
from celery.signals import celeryd_after_setup, worker_ready
from celery.utils.log import get_logger
from kombu import Queue

from sutra_tasks import keys
from sutra_tasks.app import app
from sutra_tasks.broker.queues import new_incarnation
from sutra_tasks.client.embed_task import embed
from sutra_tasks.connections import broker_client, results_client
from sutra_tasks.distillation.distill_task import distill, distill_due
from sutra_tasks.errors import BrokerNotConfiguredError, SettingsError, SutraError
from sutra_tasks.fanout import tasks as parts
from sutra_tasks.membership.reaper import reap
from sutra_tasks.roles import control as _control  # noqa: F401 - registers tasks and commands
from sutra_tasks.roles.bootsteps import ReaperStep, RouterStep
from sutra_tasks.settings import settings

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["device_app", "distill_app", "main", "router_app"]

logger = get_logger(__name__)

TRANSPORT: Final = "sutra_tasks.broker.transport:Transport"
RESULTS: Final = "sutra_tasks.fanout.result_backend.ResultBackend"
ROUTER_PREFETCH: Final = 256
ROUTER_QUEUES: Final = (keys.EMBED_QUEUE, keys.CONTROL_QUEUE)
"""The first is the one an idle router waits on."""


def router_app() -> Celery:
    """Return the app of a router worker: ``celery -A workers.router worker``."""
    _configure(
        "router",
        None,
        # Routed messages leave at once, so this bounds only what waits while no device lives.
        {
            "task_queues": [Queue(name, routing_key=name) for name in ROUTER_QUEUES],
            "worker_pool": "threads",
            "worker_concurrency": 1,
            "worker_prefetch_multiplier": ROUTER_PREFETCH,
        },
    )
    _handle_with("sutra_tasks.routing.router:strategy")
    app.steps["consumer"].add(RouterStep)
    app.steps["worker"].add(ReaperStep)
    return app


def device_app() -> Celery:
    """Return the app of a device worker: ``celery -A workers.device worker``.

    Raises:
        SettingsError: ``SUTRA_DEVICE_ID`` is not set.
    """
    options = settings()
    if options.device_id is None:
        raise SettingsError("SUTRA_DEVICE_ID", "", "a device worker needs a name, such as gpu0")
    queue = keys.device_queue(options.device_id)
    _configure(
        options.device_id,
        options.device_id,
        {
            "task_queues": [Queue(queue, routing_key=queue)],
            "worker_pool": "sutra_tasks.device.pool:DevicePool",
            "worker_concurrency": options.task_threads,
            "worker_prefetch_multiplier": 1,
        },
    )
    _handle_with("sutra_tasks.broker.late_ack:strategy")
    worker_ready.connect(_join_fleet, weak=False)
    return app


def distill_app() -> Celery:
    """Return the app of a distill worker: ``celery -A workers.distill worker``.

    Raises:
        SettingsError: ``SUTRA_MODELS_DIR`` is not set.
    """
    options = settings()
    if options.models_dir is None:
        raise SettingsError("SUTRA_MODELS_DIR", "", "a distill worker needs the folder of the registry")
    _configure(
        "distill",
        None,
        {
            "task_queues": [Queue(keys.DISTILL_QUEUE, routing_key=keys.DISTILL_QUEUE)],
            "worker_pool": "sutra_tasks.distillation.worker.pool:DistillPool",
            # Who began a run that takes a night does not wait for it, and asks in the morning.
            "result_expires": max(options.result_ttl_s, keys.DISTILLED_S),
            "worker_concurrency": 1,
            "worker_prefetch_multiplier": 1,
        },
    )
    for task in (distill, distill_due):
        task.Strategy = "sutra_tasks.broker.late_ack:strategy"
    app.steps["worker"].add(ReaperStep)  # keeps this worker's lease, too
    return app


def _handle_with(strategy: str) -> None:
    for task in (embed, parts.part, parts.combine):
        task.Strategy = strategy


def _configure(worker: str, device_id: str | None, role: dict[str, Any]) -> None:
    """Add a role's settings to those the app already has, from us or from ``celeryconfig.py``."""
    options = settings()
    if options.broker_url is None:
        raise BrokerNotConfiguredError
    incarnation = options.incarnation or new_incarnation(device_id)
    celeryd_after_setup.connect(_succeed, weak=False)
    app.conf.update(
        role,
        broker_transport=TRANSPORT,
        result_backend=f"{RESULTS}+{options.results}",
        broker_transport_options={
            **app.conf.broker_transport_options,
            "incarnation": incarnation,
            "queue_order_strategy": "priority",
        },
        worker_log_format=f"{worker}: %(message)s",
        worker_task_log_format=f"{worker}: %(message)s",
    )


def _succeed(sender: str, instance: Any, **_: Any) -> None:  # noqa: ARG001 - a Celery signal
    """Take out a lease, and return what the last process of this worker's name held.

    A supervisor returns it at once; this is for workers that are started by something else.
    """
    options = settings()
    incarnation = app.conf.broker_transport_options["incarnation"]
    name = keys.worker(options.device_id or sender)
    client, results = broker_client(options), results_client(options)
    try:
        client.hsetnx(keys.LEASES, incarnation, 0)
        before: Any = client.set(name, incarnation, ex=keys.REMEMBER_S, get=True)
        if before is not None and before.decode() != incarnation:
            reap(client, results, before.decode())
    except redis.RedisError as error:
        logger.warning("could not return what the last %s held: %s", name, error)
    finally:
        client.close()
        results.close()


def _join_fleet(sender: Any, **_: Any) -> None:
    sender.pool.runtime.join_fleet()


def main(arguments: list[str]) -> None:
    """Run one worker: ``router``, ``device`` or ``distill``, then options of ``celery worker``."""
    role, *options = arguments
    try:
        chosen = {"router": router_app, "device": device_app, "distill": distill_app}[role]()
    except SutraError as error:
        sys.exit(f"sutra {role}: {error}")
    name = settings().device_id if role == "device" else role
    # Gossip and mingle are for workers that coordinate; these do so through Redis.
    quiet = ["--without-gossip", "--without-mingle"]
    node = f"{name}@{os.uname().nodename}"
    # Celery warns root because of pickle, which these workers do not accept.
    warnings.simplefilter("ignore", SecurityWarning)
    chosen.worker_main(["--quiet", "worker", "--hostname", node, *quiet, *options])


if __name__ == "__main__":
    main(sys.argv[1:])
