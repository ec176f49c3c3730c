"""A thread on each device: loads announced versions, and serves the registry's version."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from celery.utils.log import get_logger

from sutra_tasks import keys
from sutra_tasks.models.loaded.model_cache import RETRY_S
from sutra_tasks.models.rollout.promotion import (
    LOADING,
    READY,
    Promotion,
    followed_model,
    is_affected,
)

if TYPE_CHECKING:
    import redis

    from sutra_tasks.models.loaded.loading import LoadedModel
    from sutra_tasks.models.loaded.model_cache import ModelCache
    from sutra_tasks.settings import Settings

__all__ = ["Follower", "lower_thread_priority"]

logger = get_logger(__name__)

POLL_S: Final = 0.5
NICE: Final = 10
REASON_CHARS: Final = 300
"""Length at which the reason for a failed load is cut in the device's record."""


def lower_thread_priority() -> None:
    """Give other threads precedence on busy cores: loading a version is less urgent than a batch.

    A roll-out on two busy cores, four times: the slowest hundredth of calls took 0.5 to 0.8 s, and 1.1
    to 1.2 s without this.
    """
    if sys.platform == "linux":  # elsewhere it would be the whole process
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)


class Follower:
    """The thread of one device; see the module.

    Attributes:
        candidate_state: "" before the announced version is loaded, then ``loading``, then ``ready`` or
            the reason why loading failed.
    """

    def __init__(
        self,
        client: redis.Redis,
        models: ModelCache,
        options: Settings,
        *,
        swap: Callable[[LoadedModel], None],
        hasten: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create the thread; :meth:`start` starts it.

        Args:
            client: of the server with the queues.
            models: of this device.
            options: the deployment's settings.
            swap: makes a model the device's default; returns when it serves.
            hasten: sends the device's record now, because it changed.
            clock: gives seconds that only grow.
        """
        self._client, self._models, self._options = client, models, options
        self._swap, self._hasten, self._clock = swap, hasten, clock
        self._announced: Promotion | None = None
        self._failure: tuple[str, float] = ("", 0.0)  # the version that could not be loaded, and when
        self.candidate_state = ""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="follower", daemon=True)

    @property
    def candidate(self) -> str:
        """The id of the announced promotion; "" if none is announced."""
        return self._announced.id if self._announced is not None else ""

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread after its current step; does not wait for it."""
        self._stopping.set()

    def _run(self) -> None:
        lower_thread_priority()
        while not self._stopping.wait(min(self._options.heartbeat_s, POLL_S)):
            try:
                self.step()
            except Exception as error:  # noqa: BLE001 - a device that lives must go on following
                logger.warning("cannot look for other versions of models, trying again: %s", error)

    def step(self) -> None:
        """Read the registry and the announcement once, and do what they ask for."""
        self._models.serving.refresh()
        announced = Promotion.from_json(self._client.get(keys.promotion()))
        if announced != self._announced:
            self.candidate_state = ""  # before the id: this state is about the previous promotion
            self._announced = announced
            self._models.protect(None)
            self._hasten()
        # Checked at each step, because a call may load the model at any time.
        if announced is not None and not self.candidate_state and self._is_affected(announced.model):
            self._prepare(announced)
        self._serve_current()
        self._models.evict_superseded()

    def _is_affected(self, model: str) -> bool:
        models = self._models
        return is_affected(
            model,
            follows=followed_model(self._options),
            serves=models.default.encoder.info.model,
            models=models.names,
        )

    def _prepare(self, announced: Promotion) -> None:
        self._models.protect(announced.reference)
        self.candidate_state = LOADING
        self._hasten()
        try:
            self._models.load(announced.reference)
        except Exception as error:  # whatever an engine raises, this version does not serve
            logger.exception("%s cannot be loaded", announced.reference)
            self.candidate_state = str(error)[:REASON_CHARS] or type(error).__name__
        else:
            self.candidate_state = READY
        self._hasten()

    def _serve_current(self) -> None:
        reference = self._models.serving.of(followed_model(self._options))
        if reference is None or reference == self._models.default.reference:
            return
        failed, failed_at = self._failure
        if failed == reference and self._clock() - failed_at < RETRY_S:
            return
        try:
            loaded = self._models.load(reference)
        except Exception:
            self._failure = (reference, self._clock())
            served = self._models.default.reference
            logger.exception("%s serves on: %s cannot be loaded", served, reference)
            return
        self._swap(loaded)
        logger.info("device serves %s", reference)
        self._hasten()
