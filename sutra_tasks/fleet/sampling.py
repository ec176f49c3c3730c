"""The sample of real traffic that a deployment keeps, if it wants one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sutra_tasks import keys
from sutra_tasks.distillation.sample import Sampler

if TYPE_CHECKING:
    import redis

    from sutra_tasks.settings import Settings

__all__ = ["sampler"]


def sampler(client: redis.Redis, options: Settings) -> Sampler | None:
    """Return the sample of real traffic; None if the deployment keeps none."""
    if not options.sample_texts:
        return None
    return Sampler(
        client, texts=options.sample_texts, retention_s=options.sample_retention_s, key=keys.sample
    )
