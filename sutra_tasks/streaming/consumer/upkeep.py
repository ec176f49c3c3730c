"""Upkeep of streams: refresh what this device has taken, report, and look after each stream in turn."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from sutra_tasks.streaming.backpressure import ACTIONS, next_level
from sutra_tasks.streaming.consumer.items import StreamItem, entry_ids, open_texts

if TYPE_CHECKING:
    from sutra_tasks.settings import Settings
    from sutra_tasks.streaming.consumer.faults import StreamFaults
    from sutra_tasks.streaming.consumer.recorder import Recorder
    from sutra_tasks.streaming.store import StreamStore
    from sutra_tasks.streaming.upkeep_store import UpkeepStore

__all__ = ["Upkeep"]

logger = logging.getLogger(__name__)

UPKEEP_S: Final = 0.2
"""Seconds between two looks at a stream's backlog: a raw producer may go over its limit for so long."""
REPORT_S: Final = 1.0
PRESSURE_S: Final = 1.0
"""Seconds for which a level of backpressure counts: another device may look at the stream next."""
REMOVE_CONSUMERS_S: Final = 600.0


class Upkeep:
    """The upkeep that one device does; :meth:`step` is for one thread."""

    def __init__(
        self,
        store: StreamStore,
        upkeep_store: UpkeepStore,
        recorder: Recorder,
        options: Settings,
        load: Callable[[], float],
        *,
        faults: StreamFaults,
    ) -> None:
        """Begin with everything due.

        Args:
            store: with the entries and texts.
            upkeep_store: with the streams' states.
            recorder: with what this device has measured.
            options: of this deployment.
            load: returns the load of this machine, 0 to 1.
            faults: of single streams; they are reported.
        """
        self._store, self._upkeep_store, self._recorder = store, upkeep_store, recorder
        self._faults, self._options, self._load = faults, options, load
        self._refreshed_at = self._looked_at = self._reported_at = -float("inf")
        self._pressure_at: dict[str, float] = {}
        self._consumers_removed_at: dict[str, float] = {}
        self.pause_s = UPKEEP_S / 2

    def under_pressure(self) -> bool:
        """Whether a stream asked for larger batches of late; for any thread."""
        now = time.monotonic()
        return any(now - at < PRESSURE_S for at in tuple(self._pressure_at.values()))

    def step(self, streams: Sequence[str], taken: Sequence[StreamItem]) -> None:
        """Do what is due.

        Args:
            streams: the names of all streams.
            taken: what this device has taken and not answered.
        """
        now = time.monotonic()
        refresh_s = self._options.stream_claim_s / 4
        if now - self._refreshed_at >= refresh_s:  # first, because a full server allows it
            self._refreshed_at = now
            self._refresh([item for item in taken if now - item.taken_at >= refresh_s], now)
        if now - self._looked_at >= UPKEEP_S:
            self._looked_at = now
            load = self._load()
            self._upkeep_store.report_load(load)
            for stream in streams:
                if self._faults.is_due(stream, "upkeep", now=now):
                    with self._faults.guard(stream, "upkeep", now):
                        self._look_after(stream, load, now)
        if now - self._reported_at >= REPORT_S and streams:
            self._reported_at = now
            report = self._recorder.report(now)
            for stream, reasons in self._faults.reasons(now).items():
                report.setdefault(stream, {})["faults"] = reasons
            self._upkeep_store.report_metrics(report)

    def leave(self) -> None:
        """Remove what this device has reported."""
        try:
            self._upkeep_store.remove_reports()
        except Exception as error:  # noqa: BLE001 - the reports expire
            logger.warning("a device that stops is still listed for some seconds: %s", error)

    def _look_after(self, stream: str, load: float, now: float) -> None:
        """Look after one stream, unless another device has the lease on its upkeep."""
        state = self._upkeep_store.lease(stream, load)
        if state is None:
            return
        capacity = self._options.stream_buffer_size
        self._upkeep_store.enforce_hard_limit(stream, state, capacity)
        self._upkeep_store.flush_texts(stream, self._options.stream_idle_flush_s)
        if now - self._consumers_removed_at.get(stream, -float("inf")) >= REMOVE_CONSUMERS_S:
            self._consumers_removed_at[stream] = now
            self._upkeep_store.remove_silent_consumers(stream)
        fleet_load = sum(state.loads.values()) / len(state.loads)
        level = next_level(state.size / capacity, fleet_load, state.level)
        per_s = self._recorder.rate(stream, now) * len(state.loads)
        self._upkeep_store.publish_backpressure(
            stream, level, state.level, capacity=capacity, load=fleet_load, per_s=per_s
        )
        if ACTIONS[level].increase_batch_size:
            self._pressure_at[stream] = now

    def _refresh(self, items: Sequence[StreamItem], now: float) -> None:
        for stream in {item.stream for item in items}:
            some = [item for item in items if item.stream == stream]
            with self._faults.guard(stream, "refresh", now):
                self._store.refresh(
                    stream, entry_ids(some), open_texts(some), self._options.stream_claim_s
                )
