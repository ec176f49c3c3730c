"""The Celery app: a guest in the process that imports it.

It never becomes the process's current or default app, shares no task with other apps and installs
no fix-up, so a Django or Flask project's own Celery app keeps working beside it.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from celery import Celery

__all__ = ["Sutra", "app"]


class Sutra(Celery):  # type: ignore[misc]  # Celery is untyped
    """Celery, but ``app.AsyncResult`` is ours, too."""

    @cached_property
    def AsyncResult(self) -> Any:  # noqa: N802 - Celery's name
        """The class of this app's results."""
        return self.subclass_with_self("sutra_tasks.client.results:EmbedResult")


app = Sutra("sutra", set_as_current=False, fixups=[])
app.config_from_object("sutra_tasks.celery_settings:CLIENT")
app.loader.override_backends = dict.fromkeys(
    ("redis", "rediss"), "sutra_tasks.client.results:ResultBackend"
)
