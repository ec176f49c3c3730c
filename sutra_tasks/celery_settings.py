"""Celery's configuration, made from this package's settings; ``celeryconfig.py`` is for deployments.

The client's app reads :data:`CLIENT` when it is first used and not when it is imported, so that a Django
settings module may set ``SUTRA_*`` variables before or after it imports this package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sutra_tasks import keys
from sutra_tasks.connections import socket_options
from sutra_tasks.settings import settings

if TYPE_CHECKING:
    from sutra_tasks.settings import Settings

__all__ = ["celery_settings"]

PERIODIC: Final = {keys.HEALTH_TASK: 30.0, keys.MEMORY_TASK: 300.0}
"""Seconds between two runs of each monitoring task, from the specification."""


def celery_settings(options: Settings) -> dict[str, Any]:
    """Return Celery's lower-case settings, of clients and workers alike."""
    transport = socket_options(options.socket_timeout_s)
    namespaced = {"global_keyprefix": f"{options.namespace}:"} if options.namespace else {}
    conf: dict[str, Any] = {
        "broker_url": options.broker_url,
        "broker_transport": "sutra_tasks.client.transport:Transport",
        "broker_transport_options": transport | namespaced,
        "broker_connection_retry_on_startup": True,
        # A server without memory answers with an error, which would end a worker without this.
        "broker_channel_error_retry": True,
        "result_backend": options.results,
        "result_backend_transport_options": namespaced,
        "result_expires": options.result_ttl_s,
        "result_backend_thread_safe": True,
        **{f"redis_{name}": value for name, value in transport.items()},
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
    if options.broker_url and options.broker_url.startswith("rediss://"):
        # By default kombu does not check the certificate.
        conf["broker_use_ssl"] = conf["redis_backend_use_ssl"] = {"ssl_cert_reqs": "required"}
    return conf


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
