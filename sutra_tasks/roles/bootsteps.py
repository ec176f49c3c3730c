"""Celery bootsteps of router and distill workers: what runs beside Celery's consumer."""

from __future__ import annotations

import secrets
import threading
from functools import partial
from typing import Any, Final

from celery import bootsteps

from sutra_tasks.broker.in_flight import in_flight_of
from sutra_tasks.connections import broker_client, results_client
from sutra_tasks.fanout.documents import Documents
from sutra_tasks.fanout.overdue import resend_overdue
from sutra_tasks.membership.reaper import Reaper
from sutra_tasks.routing.router import Router
from sutra_tasks.settings import settings

__all__ = ["ReaperStep", "RouterStep"]

TICK_S: Final = 0.1


class RouterStep(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery is untyped
    """Connects the router to Celery's consumer, and calls its ``tick`` while a connection lasts."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **kwargs: Any) -> None:
        super().__init__(consumer, **kwargs)
        worker, options = consumer.controller, settings()
        client = broker_client(options, retries=False)  # the router runs on Celery's event loop
        name = str(worker.hostname)
        incarnation = worker.app.conf.broker_transport_options["incarnation"]
        self._router = worker.sutra_router = Router(
            options, client, name, incarnation=incarnation, first_ticket=secrets.randbelow(2**32)
        )
        in_flight_of(incarnation).may_take = self._router.may_take
        self._timer: Any = None

    def start(self, consumer: Any) -> None:
        """Begin with no messages: those of a lost connection have been requeued."""
        self._router.attach(consumer)
        self._timer = consumer.timer.call_repeatedly(TICK_S, self._router.tick)

    def stop(self, consumer: Any) -> None:  # noqa: ARG002 - Celery's hook
        """Stop the ticks; messages that wait are requeued when the channel closes."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class ReaperStep(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery is untyped
    """Runs the reaper on a thread, for as long as the process lives."""

    def start(self, worker: Any) -> None:
        """Start the reaper; it keeps this worker's lease while Celery's loop is busy or reconnects."""
        options = settings()
        reaper = Reaper(
            broker_client(options),
            results_client(options),
            worker.app.conf.broker_transport_options["incarnation"],
            sweep=partial(resend_overdue, Documents.of(options)),
            lease_s=options.lease_s,
            device_ttl_s=options.device_ttl_s,
        )
        threading.Thread(target=reaper.run, name="reaper", daemon=True).start()
