"""A distill worker: ``SUTRA_MODELS_DIR=models SUTRA_DATA_DIR=texts celery -A workers.distill worker``."""

from sutra_tasks.app import app
from sutra_tasks.roles.apps import distill_app

__all__ = ["app"]

app.config_from_object("celeryconfig")
distill_app()
