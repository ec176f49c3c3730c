"""The parity gate: a device joins the fleet only if its golden vectors agree with the fleet's.

The fleet's golden vectors are those of the first device. They stay on the server for as long as one
device that agrees with them lives, and change when a device goes on with another model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sutra_tasks import keys, lua
from sutra_tasks.engines.golden import GoldenVectors
from sutra_tasks.errors import SutraError

if TYPE_CHECKING:
    import redis

__all__ = ["FleetGolden"]

PUBLISH_GOLDEN: Final = lua.script("health/publish_golden")


class FleetGolden:
    """The fleet's golden vectors on the server, as one device reads and renews them."""

    def __init__(self, client: redis.Redis, keep_s: int) -> None:
        """Begin before the device has joined.

        Args:
            client: the broker.
            keep_s: seconds until vectors that no device renews expire.
        """
        self._client, self._keep_s = client, keep_s
        self._published: GoldenVectors | None = None

    def disagreement(self, golden: GoldenVectors) -> str | None:
        """Publish a device's vectors if the fleet has none; else say why they do not agree, if so."""
        if golden.disagreement(golden) is not None:  # NaN, for example, does not equal itself
            return "its vectors are no directions: not a number, infinite or zero"
        fleets = self._publish_first(golden)
        try:
            reason = golden.disagreement(GoldenVectors.from_json(fleets)) if fleets else None
        except SutraError as error:
            return str(error)
        if reason is None:
            self._published = golden
        return reason

    def renew(self, golden: GoldenVectors) -> None:
        """Keep the fleet's vectors from expiring, or replace them after a change of the model."""
        if self._published is not golden:  # devices that join from now on need the new model
            self._client.set(keys.golden(), golden.to_json(), ex=self._keep_s)
            self._published = golden
        elif not self._client.expire(keys.golden(), self._keep_s):
            self._publish_first(golden)

    def _publish_first(self, golden: GoldenVectors) -> bytes | None:
        """Publish vectors unless the fleet has some; return what it had."""
        fleets: bytes | None = PUBLISH_GOLDEN(
            self._client, golden=keys.golden(), golden_json=golden.to_json(), keep_s=self._keep_s
        )
        return fleets
