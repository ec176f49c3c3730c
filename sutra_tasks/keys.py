r"""Every queue name and Redis key, with its type and lifetime.

==============================  ======  =====================================================
key                             type    lifetime
==============================  ======  =====================================================
``sutra.embed``                 list    a Celery queue: messages that wait for a router
``sutra.device.<id>``           list    a Celery queue: messages that wait for one device
``sutra.distill``               list    a Celery queue: distillations, run by distill workers
``sutra.control``               list    a Celery queue: periodic tasks, run by a router
``sutra:in-flight:<inc.>``      list    messages that the worker of this incarnation has taken and not
                                        acknowledged, the newest first; never expires (it is work)
``sutra:worker:<id>``           string  incarnation of the worker that has the name of a device,
                                        :data:`REMEMBER_S`
``sutra:fleet``                 zset    device id -> time of its last heartbeat (server clock);
                                        members leave on drain, else after :data:`FORGET_AFTER_S`
``sutra:queues``                zset    device id -> time of its last heartbeat; members leave once
                                        the device is forgotten and its queue is empty
``sutra:leases``                hash    incarnation -> its heartbeats so far; a field is deleted when
                                        its process ends, or its lease
``sutra:reaped:<incarnation>``  string  on the results server: its lease has ended, :data:`REAPED_S`
``sutra:unstarted:<inc.>``      string  why the worker of this incarnation could not start, for its
                                        supervisor; :data:`UNSTARTED_S`
``sutra:suspect:<incarnation>`` string  id of the task that this worker runs alone, because workers died
                                        with it before; :data:`FORGET_AFTER_S`
``sutra:load:<id>``             hash    what a device was sent and has not finished: ``messages``,
                                        ``credit`` (tokens), ``tokens_dispatched`` and
                                        ``tokens_completed``; :data:`FORGET_AFTER_S`, and heartbeats
                                        renew it
``sutra:golden``                string  JSON: the fleet's golden vectors, ``SUTRA_LEASE_S``; renewed by
                                        each device that agrees with them
``sutra:backlog``               string  JSON: tokens that wait in the fleet, and its tokens per second,
                                        :data:`BACKLOG_S`
``sutra:dead-letters``          hash    task id -> JSON: a message that was given up, with its reason;
                                        never expires (it is work)
``sutra:document:<task>``       hash    on the results server: the parts of a long text that is fanned
                                        out, and their results; deleted when its outcome is stored,
                                        :data:`DOCUMENT_S` at most
``sutra:documents``             zset    on the results server: task id -> when its missing parts are
                                        overdue; members leave with their document
``sutra:promotion``             string  JSON: the version of a model that devices are to load beside the
                                        one that serves, :data:`PROMOTION_S`
``sutra:distilling:<name>``     string  lock: the run that makes the next version of a model, and its
                                        worker; :data:`DISTILLING_S`, renewed while it runs
``sutra:cancelled:<task>``      string  mark: this distillation is cancelled, for a worker that starts
                                        later as well; :data:`DISTILLED_S`
``sutra:sample:<period>``       zset    text -> its place in the draw: a sample of real traffic,
                                        ``SUTRA_SAMPLE_RETENTION_S``
``sutra:device:<id>``           string  JSON record of one device, :data:`FORGET_AFTER_S`
``sutra:router:<incarnation>``  string  JSON record of one router, ``SUTRA_DEVICE_TTL_S``
``celery-task-meta-<task>``     string  Celery's own: a result, ``SUTRA_RESULT_TTL_S``; of a
                                        distillation, and its progress, :data:`DISTILLED_S`
``sutra:streams``               set     names of the streams that devices read; members leave with
                                        ``sutra stream delete``
``sutra:stream:<s>:in``         stream  entries that wait; never expires (it is work). A string while the
                                        stream is over its hard limit, so that ``XADD`` fails
``sutra:stream:<s>:closed``     stream  entries that wait while ``in`` is a string; later renamed back
``sutra:stream:<s>:out``        stream  responses that nobody has read; never expires (it is work)
``sutra:stream:<s>:dead``       stream  entries given up, and responses that no reader could read; never
                                        expires (it is work)
``sutra:stream:<s>:state``      hash    capacity and throttle, for producers, and up to when idle
                                        texts were looked at, :data:`STATE_S`
``sutra:stream:<s>:totals``     hash    counters since the stream began, :data:`REMEMBER_S`
``sutra:stream:<s>:upkeep``     string  lease: the device that does the stream's upkeep this time;
                                        150 ms
``sutra:stream:<s>:by:<p>``     string  number of a producer's last batch and how many entries it
                                        added, :data:`FORGET_AFTER_S`
``sutra:stream:<s>:texts``      zset    key of an open text -> when it last grew (ms); members leave when
                                        the text has ended or is abandoned
``sutra:stream:<s>:takeable``   zset    key of an open text -> when a device may take it (ms); members
                                        leave with the text
``sutra:stream:<s>:text:<k>``   hash    one open text: its buffer and how much of it is in chunks; gone
                                        when it has ended (``streaming/delivered.py``)
``sutra:stream:<s>:pieces:<k>`` list    pieces of an open text that are not in its buffer yet
``sutra:stream:<s>:buffered``   string  bytes of all open texts; gone when there are none
``sutra:stream-loads``          hash    incarnation -> its machine's load and when it was reported (ms),
                                        :data:`STATE_S`
``sutra:stream-consumer:<i>``   string  JSON: what one device has measured, :data:`STATE_S`
==============================  ======  =====================================================

With ``SUTRA_NAMESPACE=acme`` each of them begins with ``acme:``, and so do the keys of Celery and kombu.
Names of queues stay as they are for Celery; only their lists are named so.

kombu appends ``\x06\x16<priority>`` to a queue's name for its lanes 3, 6 and 9.
"""

from __future__ import annotations

from typing import Final

from sutra_tasks.settings import settings

__all__ = [
    "BACKLOG_S",
    "COMBINE_TASK",
    "CONTROL_QUEUE",
    "DEVICES_GROUP",
    "DEVICE_QUEUE_PREFIX",
    "DISTILLED_S",
    "DISTILLING_S",
    "DISTILL_DUE_TASK",
    "DISTILL_QUEUE",
    "DISTILL_TASK",
    "DOCUMENT_S",
    "EMBED_QUEUE",
    "EMBED_TASK",
    "FORGET_AFTER_S",
    "HEALTH_TASK",
    "MEMORY_TASK",
    "OWN_TASK_PREFIX",
    "PART_TASK",
    "PROMOTION_S",
    "READERS_GROUP",
    "REAPED_S",
    "REFUSED_TASK",
    "REMEMBER_S",
    "STATE_S",
    "UNSTARTED_S",
    "backlog",
    "cancelled",
    "dead_letters",
    "device",
    "device_queue",
    "distilling",
    "document",
    "documents",
    "fleet",
    "golden",
    "in_flight",
    "leases",
    "load",
    "named",
    "prefix",
    "promotion",
    "queues",
    "reaped",
    "result",
    "router",
    "sample",
    "stream",
    "stream_consumer",
    "stream_loads",
    "streams",
    "suspect",
    "unstarted",
    "worker",
]

OWN_TASK_PREFIX: Final = "sutra."
EMBED_TASK: Final = "sutra.embed"
PART_TASK: Final = "sutra.part"
COMBINE_TASK: Final = "sutra.combine"
EMBED_QUEUE: Final = "sutra.embed"
DEVICE_QUEUE_PREFIX: Final = "sutra.device."
CONTROL_QUEUE: Final = "sutra.control"
DISTILL_QUEUE: Final = "sutra.distill"
DISTILL_TASK: Final = "sutra.distill"
DISTILL_DUE_TASK: Final = "sutra.distill_due"
HEALTH_TASK: Final = "sutra.health"
MEMORY_TASK: Final = "sutra.memory"
REFUSED_TASK: Final = "sutra.refused"
"""Stands for the task of a message that is refused, inside the worker that took it."""

DEVICES_GROUP: Final = "sutra"
"""Consumer group of a stream's entries: its consumers are devices."""
READERS_GROUP: Final = "readers"
"""Consumer group of a stream's responses."""

PROMOTION_S: Final = 300
"""Seconds after which devices evict a version that was announced and not promoted."""

DISTILLING_S: Final = 60
"""Seconds without a renewal after which another run may make the next version of a model."""

DISTILLED_S: Final = 7 * 24 * 3600
"""Seconds for which result and progress of a distillation are kept: its caller may be away for days."""

FORGET_AFTER_S: Final = 3600
"""Seconds without a heartbeat after which a device is forgotten and leaves ``sutra status``."""

REAPED_S: Final = 24 * 3600
"""Seconds for which a worker that lost its lease, and does not know yet, can store no errors."""

DOCUMENT_S: Final = 7 * 24 * 3600
"""Seconds for which the parts of a long text wait for a device."""

STATE_S: Final = 10
"""Seconds for which reports of devices about a stream count."""

UNSTARTED_S: Final = 60
"""Seconds within which a supervisor asks why a worker could not start."""

BACKLOG_S: Final = 5
"""Seconds for which clients use the backlog that a router published."""

REMEMBER_S: Final = 30 * 24 * 3600
"""Seconds for which the worker that has the name of a device is remembered."""


def prefix() -> str:
    """Beginning of every key: ``SUTRA_NAMESPACE`` and a colon; empty without a namespace."""
    namespace = settings().namespace
    return f"{namespace}:" if namespace else ""


def named(name: str) -> str:
    """Key of this name in the namespace; of a Celery queue, its list of the highest priority."""
    return prefix() + name


def fleet() -> str:
    """Devices, by the time of their last heartbeat."""
    return named("sutra:fleet")


def queues() -> str:
    """Devices whose queue may have messages, by the time of their last heartbeat."""
    return named("sutra:queues")


def leases() -> str:
    """Heartbeats so far, by incarnation."""
    return named("sutra:leases")


def promotion() -> str:
    """The version of a model that is being promoted."""
    return named("sutra:promotion")


def golden() -> str:
    """The fleet's golden vectors."""
    return named("sutra:golden")


def backlog() -> str:
    """What waits in the fleet, for clients."""
    return named("sutra:backlog")


def dead_letters() -> str:
    """Messages that were given up."""
    return named("sutra:dead-letters")


def documents() -> str:
    """Long texts that are fanned out, by when their missing parts are overdue."""
    return named("sutra:documents")


def streams() -> str:
    """Names of the streams."""
    return named("sutra:streams")


def stream_loads() -> str:
    """Loads of the devices' machines, for producers of streams."""
    return named("sutra:stream-loads")


def device_queue(device_id: str) -> str:
    """Celery queue of one device."""
    return DEVICE_QUEUE_PREFIX + device_id


def in_flight(incarnation: str) -> str:
    """Messages that one worker process has taken and not acknowledged."""
    return named(f"sutra:in-flight:{incarnation}")


def worker(device_id: str) -> str:
    """Incarnation of the worker that has the name of a device."""
    return named(f"sutra:worker:{device_id}")


def device(device_id: str) -> str:
    """Record of one device."""
    return named(f"sutra:device:{device_id}")


def router(incarnation: str) -> str:
    """Record of one router."""
    return named(f"sutra:router:{incarnation}")


def load(device_id: str) -> str:
    """Tokens dispatched to a device and completed by it."""
    return named(f"sutra:load:{device_id}")


def document(task_id: str) -> str:
    """Parts of a long text, and their vectors."""
    return named(f"sutra:document:{task_id}")


def result(task_id: str) -> str:
    """Celery's key of a result."""
    return named(f"celery-task-meta-{task_id}")


def reaped(incarnation: str) -> str:
    """Mark that the lease of one worker process has ended."""
    return named(f"sutra:reaped:{incarnation}")


def unstarted(incarnation: str) -> str:
    """Why one worker process could not start."""
    return named(f"sutra:unstarted:{incarnation}")


def suspect(incarnation: str) -> str:
    """Name of the task that one worker process runs alone."""
    return named(f"sutra:suspect:{incarnation}")


def stream(name: str, part: str) -> str:
    """One of the keys of a stream, as the table above names them."""
    return named(f"sutra:stream:{name}:{part}")


def stream_consumer(incarnation: str) -> str:
    """Measurements of the streams by one worker process."""
    return named(f"sutra:stream-consumer:{incarnation}")


def distilling(name: str) -> str:
    """Who makes the next version of a model."""
    return named(f"sutra:distilling:{name}")


def cancelled(task_id: str) -> str:
    """Mark that a distillation is not wanted any more."""
    return named(f"sutra:cancelled:{task_id}")


def sample(period: int) -> str:
    """Sample of the texts of one period."""
    return named(f"sutra:sample:{period}")
