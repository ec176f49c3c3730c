"""The Celery app: a guest in the process that imports it.

It never becomes the process's current or default app, shares no task with other apps and installs
no fix-up, so a Django or Flask project's own Celery app keeps working beside it.
"""

from __future__ import annotations

from celery import Celery

__all__ = ["app"]

app = Celery("sutra", set_as_current=False, fixups=[])
app.config_from_object("sutra_tasks.configuration:CLIENT")
