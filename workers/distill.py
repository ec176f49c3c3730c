"""A distill worker: ``SUTRA_DATA_DIR=texts SUTRA_MODELS_DIR=m celery -A workers.distill worker``."""

from sutra_tasks.app import app
from sutra_tasks.roles.apps import distill_app

__all__ = ["app"]

app.config_from_object("celeryconfig")
distill_app()
