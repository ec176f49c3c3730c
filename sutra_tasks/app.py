"""The Celery app of this package, which works beside the Celery app of a Django or Flask project.

It does not become the current or default app of the process that imports it, shares no tasks with other
apps, and installs no fix-ups.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from celery import Celery

__all__ = ["Sutra", "app"]


class Sutra(Celery):  # type: ignore[misc]  # Celery is untyped
    """Celery, with :class:`~sutra_tasks.client.results.EmbedResult` as ``app.AsyncResult``."""

    @cached_property
    def AsyncResult(self) -> Any:  # noqa: N802 - Celery's name
        """The class of this app's results."""
        return self.subclass_with_self("sutra_tasks.client.results:EmbedResult")


app = Sutra("sutra", set_as_current=False, fixups=[])
app.config_from_object("sutra_tasks.celery_settings:CLIENT")
app.loader.override_backends = dict.fromkeys(
    ("redis", "rediss"), "sutra_tasks.client.results:ResultBackend"
)
