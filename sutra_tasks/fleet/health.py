"""How a device is: pure decisions over what was counted."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["State"]


class State(StrEnum):
    """Where a device is in its life; docs/fleet.md draws the ways between these."""

    STARTING = "starting"
    HEALTHY = "healthy"
    DEGRADED = "degraded"
    UNHEALTHY = "unhealthy"
    PROBING = "probing"
    REFUSED = "refused"
    DEAD = "dead"
