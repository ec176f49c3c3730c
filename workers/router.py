"""A router worker: ``celery -A workers.router worker``."""

from sutra_tasks.app import app
from sutra_tasks.roles.apps import router_app

__all__ = ["app"]

app.config_from_object("celeryconfig")
router_app()
