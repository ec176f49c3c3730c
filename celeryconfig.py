"""The deployment's Celery settings: ours, from ``SUTRA_*`` variables, and what you add below.

Read by the workers in ``workers/`` only. It is not installed with the package, so it never stands in
for a host project's own ``celeryconfig``.
"""

from sutra_tasks.celery_settings import celery_settings
from sutra_tasks.settings import settings

globals().update(celery_settings(settings()))

# Your own below this line, by Celery's lower-case names.
