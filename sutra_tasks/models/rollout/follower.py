"""One device's part in a promotion: it prepares what is announced, and serves what the registry says."""

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
from sutra_tasks.models.rollout.promotion import LOADING, READY, Promotion, followed_model, is_affected

if TYPE_CHECKING:
    import redis

    from sutra_tasks.models.loaded.model_cache import LoadedModel, ModelCache
    from sutra_tasks.settings import Settings

__all__ = ["Follower", "lower_thread_priority"]

logger = get_logger(__name__)

LOOK_S: Final = 0.5
NICE: Final = 10
MOST_REASON: Final = 300


def lower_thread_priority() -> None:
    """Leave the cores to other threads where they are short: what is loaded aside can wait.

    A swap on two busy cores, four times: the slowest hundredth of calls took 0.5 to 0.8 s, without this
    1.1 to 1.2.
    """
    if sys.platform == "linux":  # elsewhere it would be the whole process
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)


class Follower:
    """See the module's docstring."""

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
        """Prepare the thread.

        Args:
            client: the server with the fleet.
            models: of this device.
            options: of this deployment.
            swap: has the device serve another version; returns when it does.
            hasten: called when the device's record has changed.
            clock: seconds that never go back.
        """
        self._client, self._models, self._options = client, models, options
        self._swap, self._hasten, self._clock = swap, hasten, clock
        self._candidate: Promotion | None = None
        self._failed: tuple[str, float] = ("", 0.0)
        self.candidate_state = ""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="follower", daemon=True)

    @property
    def candidate(self) -> str:
        """The id of the promotion that was announced last, if any is."""
        return self._candidate.id if self._candidate is not None else ""

    def start(self) -> None:
        """Begin to follow."""
        self._thread.start()

    def stop(self) -> None:
        """End; what is being loaded is dropped with the process."""
        self._stopping.set()

    def _run(self) -> None:
        lower_thread_priority()
        while not self._stopping.wait(min(self._options.heartbeat_s, LOOK_S)):
            try:
                self.step()
            except Exception as error:  # noqa: BLE001 - a device that lives must go on following
                logger.warning("cannot look for other versions of models, trying again: %s", error)

    def step(self) -> None:
        """Look once."""
        self._models.serving.refresh()
        announced = Promotion.from_json(self._client.get(keys.PROMOTION))
        if announced != self._candidate:
            self.candidate_state = ""  # first: what was said of the other is not of this one
            self._candidate = announced
            self._models.keep(None)
            self._hasten()
        # A call may have the model loaded at any time.
        if announced is not None and not self.candidate_state and self._is_concerned(announced.model):
            self._prepare(announced)
        self._follow()
        self._models.drop_superseded()

    def _is_concerned(self, model: str) -> bool:
        models = self._models
        return is_affected(
            model,
            follows=followed_model(self._options),
            serves=models.default.encoder.info.model,
            models=models.names,
        )

    def _prepare(self, announced: Promotion) -> None:
        self._models.keep(announced.reference)
        self.candidate_state = LOADING
        self._hasten()
        try:
            self._models.load(announced.reference)
        except Exception as error:  # whatever an engine raises, this version does not serve
            logger.exception("%s cannot be loaded", announced.reference)
            self.candidate_state = str(error)[:MOST_REASON] or type(error).__name__
        else:
            self.candidate_state = READY
        self._hasten()

    def _follow(self) -> None:
        reference = self._models.serving.of(followed_model(self._options))
        if reference is None or reference == self._models.default.reference:
            return  # no model of the registry, none of it serves, or it serves here
        failed, at = self._failed
        if failed == reference and self._clock() - at < RETRY_S:
            return
        try:
            loaded = self._models.load(reference)
        except Exception:
            self._failed = (reference, self._clock())
            served = self._models.default.reference
            logger.exception("%s serves on: %s cannot be loaded", served, reference)
            return
        self._swap(loaded)
        logger.info("device serves %s", reference)
        self._hasten()
