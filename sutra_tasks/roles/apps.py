"""The three worker roles as Celery apps: the client's app with the settings of a role.

``sutra up`` starts them by ``python -m sutra_tasks.roles``, a deployment may start them by
``celery -A workers.router worker``.
"""

from __future__ import annotations

import signal
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

import redis
from celery.signals import celeryd_after_setup, worker_ready
from celery.utils.log import get_logger
from kombu import Queue

from sutra_tasks import keys
from sutra_tasks.app import app
from sutra_tasks.broker.queues import new_incarnation
from sutra_tasks.celery_settings import server_settings
from sutra_tasks.client.embed_task import embed
from sutra_tasks.connections import broker_client, results_client
from sutra_tasks.distillation.distill_task import distill, distill_due
from sutra_tasks.errors import BrokerNotConfiguredError, DeviceNameTakenError, SettingsError
from sutra_tasks.fanout import tasks as parts
from sutra_tasks.membership.names import Patience, claim
from sutra_tasks.membership.unstarted import end_unstarted
from sutra_tasks.roles import control
from sutra_tasks.roles.bootsteps import ReaperStep, RouterStep
from sutra_tasks.roles.consumer import check_servers
from sutra_tasks.settings import settings

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["device_app", "distill_app", "router_app"]

logger = get_logger(__name__)

TRANSPORT: Final = "sutra_tasks.broker.transport:Transport"
CONSUMER: Final = "sutra_tasks.roles.consumer:CheckingConsumer"
RESULTS: Final = "sutra_tasks.fanout.result_backend:ResultBackend"
ROUTER_PREFETCH: Final = 256
ROUTER_QUEUES: Final = (keys.EMBED_QUEUE, keys.CONTROL_QUEUE)
"""An idle router waits on the first."""


def router_app() -> Celery:
    """Return the app of a router worker: ``celery -A workers.router worker``."""
    _configure(
        "router",
        "router",
        None,
        # Messages are forwarded at once: the prefetch bounds only those that wait without a live device.
        {
            "task_queues": [Queue(name, routing_key=name) for name in ROUTER_QUEUES],
            "worker_pool": "threads",
            "worker_concurrency": 1,
            "worker_prefetch_multiplier": ROUTER_PREFETCH,
        },
    )
    _handle_with("sutra_tasks.routing.router:strategy", embed, parts.part, parts.combine)
    _handle_with("sutra_tasks.broker.late_ack:strategy", control.check_health, control.check_memory)
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
        "device",
        options.device_id,
        options.device_id,
        {
            "task_queues": [Queue(queue, routing_key=queue)],
            "worker_pool": "sutra_tasks.device.pool:DevicePool",
            "worker_concurrency": options.task_threads,
            "worker_prefetch_multiplier": 1,
        },
    )
    _handle_with("sutra_tasks.broker.late_ack:strategy", embed, parts.part, parts.combine)
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
        "distill",
        None,
        {
            "task_queues": [Queue(keys.DISTILL_QUEUE, routing_key=keys.DISTILL_QUEUE)],
            "worker_pool": "sutra_tasks.distillation.worker.pool:DistillPool",
            # A run may take a night; its caller asks for the result in the morning.
            "result_expires": max(options.result_ttl_s, keys.DISTILLED_S),
            "worker_concurrency": 1,
            "worker_prefetch_multiplier": 1,
        },
    )
    _handle_with("sutra_tasks.broker.late_ack:strategy", distill, distill_due)
    app.steps["worker"].add(ReaperStep)  # it keeps this worker's lease as well
    return app


def _handle_with(strategy: str, *tasks: Any) -> None:
    for task in tasks:
        task.Strategy = strategy
        task.Request = "sutra_tasks.broker.late_ack:Request"


def _configure(role: str, worker: str, device_id: str | None, of_role: dict[str, Any]) -> None:
    """Add the settings of a role to those of the app.

    Args:
        role: whose rights the worker needs.
        worker: name in log lines.
        device_id: None: the worker serves no device.
        of_role: Celery settings of the role.

    Raises:
        BrokerNotConfiguredError: ``SUTRA_BROKER_URL`` is not set.
    """
    options = settings()
    if options.broker_url is None:
        raise BrokerNotConfiguredError
    servers = server_settings(options)  # again: a deployment's own options may have replaced them
    if ":" in of_role["worker_pool"]:
        import_module(of_role["worker_pool"].partition(":")[0])  # raises now if a package is missing
    incarnation = options.incarnation or new_incarnation(device_id)
    celeryd_after_setup.connect(_check_servers, weak=False)
    celeryd_after_setup.connect(_begin_lease if device_id is None else _claim_device, weak=False)
    celeryd_after_setup.connect(_drain_on_hangup, weak=False)
    app.conf.update(
        of_role,
        sutra_role=role,
        worker_consumer=CONSUMER,
        broker_transport=TRANSPORT,
        result_backend=RESULTS,
        result_backend_transport_options={
            **app.conf.result_backend_transport_options,
            **servers["result_backend_transport_options"],
        },
        broker_transport_options={
            **app.conf.broker_transport_options,
            **servers["broker_transport_options"],
            "incarnation": incarnation,
            "queue_order_strategy": "priority",
        },
        worker_log_format=f"{worker}: %(message)s",
        worker_task_log_format=f"{worker}: %(message)s",
    )


def _check_servers(**_: Any) -> None:
    """End this process before it loads a model if the servers can never serve its role."""
    check_servers(app.conf.sutra_role)


def _begin_lease(**_: Any) -> None:
    """Begin the lease of a worker without a device: two of one name do not disturb each other."""
    with broker_client(settings()) as client:
        try:
            client.hsetnx(keys.leases(), _incarnation(), 0)
        except redis.RedisError as error:
            logger.warning("the lease begins with the first heartbeat: %s", error)


def _claim_device(**_: Any) -> None:
    """Take the name of this worker's device, or end the process where another worker has it."""
    options = settings()
    assert options.device_id is not None
    patience = Patience(silent_s=options.device_ttl_s, unborn_s=options.lease_s)
    with broker_client(options) as client, results_client(options) as results:
        try:
            claim(client, results, options.device_id, _incarnation(), patience=patience)
        except DeviceNameTakenError as error:
            end_unstarted(options, options.device_id, str(error))
        except redis.RedisError as error:
            logger.warning("whether another worker is %s is not known: %s", options.device_id, error)


def _incarnation() -> str:
    return str(app.conf.broker_transport_options["incarnation"])


def _drain_on_hangup(**_: Any) -> None:
    """Have a terminal that closes stop the worker as SIGTERM does, not kill it with its messages.

    Celery replaces this handler in a worker without a terminal.
    """
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))


def _join_fleet(sender: Any, **_: Any) -> None:
    sender.pool.runtime.join_fleet()
