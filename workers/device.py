"""A device worker: ``SUTRA_DEVICE_ID=gpu0 CUDA_VISIBLE_DEVICES=0 celery -A workers.device worker``."""

from sutra_tasks.app import app
from sutra_tasks.roles.apps import device_app

__all__ = ["app"]

app.config_from_object("celeryconfig")
device_app()
