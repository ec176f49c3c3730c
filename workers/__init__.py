"""The workers of a deployment, one short file a role: ``celery -A workers.<role> worker``."""
