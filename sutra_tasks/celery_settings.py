"""Celery's configuration, made from this package's settings; ``celeryconfig.py`` is for deployments.

The client's app reads :data:`CLIENT` when it is first used and not when it is imported, so that a Django
settings module may set ``SUTRA_*`` variables before or after it imports this package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sutra_tasks import keys
from sutra_tasks.settings import settings

if TYPE_CHECKING:
    from sutra_tasks.server_address import ServerAddress
    from sutra_tasks.settings import Settings

__all__ = ["celery_settings", "server_settings"]

PERIODIC: Final = {keys.HEALTH_TASK: 30.0, keys.MEMORY_TASK: 300.0}
"""Seconds between two runs of each monitoring task, from the specification."""


def celery_settings(options: Settings) -> dict[str, Any]:
    """Return Celery's lower-case settings, of clients and workers alike."""
    return {
        **server_settings(options),
        "broker_transport": "sutra_tasks.client.transport:Transport",
        "broker_connection_retry_on_startup": True,
        # A server without memory answers with an error, which would end a worker without this.
        "broker_channel_error_retry": True,
        "result_expires": options.result_ttl_s,
        "result_backend_thread_safe": True,
        "task_serializer": "json",
        "result_serializer": "json",
        "accept_content": ["json"],
        "result_accept_content": ["json"],
        # Extended results have a task's arguments in them: the texts.
        "result_extended": False,
        "task_default_queue": keys.EMBED_QUEUE,
        "task_acks_late": True,
        "task_track_started": False,
        # Celery skips the join of a chord for a message that it finds done, and the chord never ends.
        "worker_deduplicate_successful_tasks": False,
        "worker_prefetch_multiplier": 1,
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "worker_enable_prefetch_count_reduction": False,
        "worker_redirect_stdouts": False,
        "beat_schedule": _schedule(options),
        "task_routes": {
            name: {"queue": keys.DISTILL_QUEUE} for name in (keys.DISTILL_TASK, keys.DISTILL_DUE_TASK)
        },
    }


def server_settings(options: Settings) -> dict[str, Any]:
    """Return Celery's settings of the broker and the results server; none if there is no broker.

    The broker's URL is for reports, and has no password. Transports and result backends of this package
    connect to the option ``address``.
    """
    if options.broker_url is None:
        return {"broker_url": None, "result_backend": None}
    broker = options.broker_address
    return {
        "broker_url": broker.celery_url(),
        "broker_use_ssl": _tls_for_flower(broker),
        "broker_transport_options": _connecting(broker, options),
        "result_backend": "sutra_tasks.client.results:ResultBackend",
        "result_backend_transport_options": _connecting(options.results_address, options),
    }


def _connecting(address: ServerAddress, options: Settings) -> dict[str, Any]:
    given = {"address": address, "socket_timeout": options.socket_timeout_s}
    if options.namespace:
        given["global_keyprefix"] = f"{options.namespace}:"
    if check_s := address.options.get("health_check_interval"):
        given["health_check_interval"] = check_s  # kombu checks by itself what waits for messages
    return given


def _tls_for_flower(address: ServerAddress) -> dict[str, Any] | bool:
    # Flower's page of the broker connects by itself.
    tls = address.tls or {}
    return {name: value for name, value in tls.items() if name != "ssl_password"} or False


def _schedule(options: Settings) -> dict[str, Any]:
    schedule = {name: _every(name, seconds, keys.CONTROL_QUEUE) for name, seconds in PERIODIC.items()}
    if options.distill_every_s:
        name = keys.DISTILL_DUE_TASK
        schedule[name] = _every(name, options.distill_every_s, keys.DISTILL_QUEUE)
    return schedule


def _every(task: str, seconds: float, queue: str) -> dict[str, Any]:
    # A message expires before the next one is due, so they do not pile up while no worker takes them.
    # The distillation that it starts is a message of its own, which does not expire.
    options = {"queue": queue, "expires": seconds * 0.8}
    return {"task": task, "schedule": seconds, "options": options}


def __getattr__(name: str) -> dict[str, Any]:
    if name == "CLIENT":
        return celery_settings(settings())
    raise AttributeError(name)
