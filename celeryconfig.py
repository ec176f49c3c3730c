"""The deployment's Celery settings: those of this package, from ``SUTRA_*`` variables, and your own.

Only the workers in ``workers/`` read it. It is not installed with the package, so it never replaces the
``celeryconfig`` of a host project.
"""

from sutra_tasks.celery_settings import celery_settings
from sutra_tasks.settings import settings

globals().update(celery_settings(settings()))

# Add your own below this line, by Celery's lower-case names.
