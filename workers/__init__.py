"""One short file a role, for ``celery -A workers.<role> worker``. Wiring only."""
