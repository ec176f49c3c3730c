"""What the tasks of a device worker do: answer calls of ``embed``, and their share in long texts."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import redis
from celery.exceptions import Ignore, Reject

from sutra_tasks.distillation.data.traffic_sample import open_sample
from sutra_tasks.fanout.documents import Documents
from sutra_tasks.fanout.long_texts import LongTexts
from sutra_tasks.membership.fleet import fleet_members
from sutra_tasks.models.loaded.waiting_places import Crowded
from sutra_tasks.routing.snapshot import fleet_of

if TYPE_CHECKING:
    from sutra_tasks.batching.batcher import Batcher
    from sutra_tasks.batching.service import EmbeddingService
    from sutra_tasks.client.call import Call
    from sutra_tasks.device.execution import Execution
    from sutra_tasks.models.loaded.loading import LoadedModel
    from sutra_tasks.models.loaded.model_cache import ModelCache
    from sutra_tasks.settings import Settings
    from sutra_tasks.vectors import Embeddings, Vectors

__all__ = ["DeviceTasks"]

CROWDED_S: Final = 0.2
"""Pause before a call is requeued because too many wait for a model."""


class DeviceTasks:
    """The device's side of its tasks; safe to use from many threads.

    Attributes:
        long_texts: this device's share in long texts.
    """

    def __init__(
        self,
        options: Settings,
        client: redis.Redis,
        models: ModelCache,
        batcher: Batcher,
        execution: Execution,
    ) -> None:
        """Use the parts of the device.

        Args:
            options: of this device.
            client: of the server with the fleet and the sample of texts.
            models: in the device's memory.
            batcher: that computes.
            execution: that admits computations.
        """
        self._options, self._client = options, client
        self._models, self._batcher, self._execution = models, batcher, execution
        self._sampler = open_sample(client, options)
        device_id = str(options.device_id)
        self.long_texts = LongTexts(
            self.service_of_part, Documents.of(options), device_id, options, execution.admitted
        )

    def embed(self, call: Call) -> Vectors | Embeddings:
        """Answer a call, or spread its texts over the fleet if they are long.

        Raises:
            Ignore: it was spread; the last part's device answers it.
            SutraError: why it has no answer.
        """
        if self._sampler is not None:
            with suppress(redis.RedisError):
                self._sampler.offer(call.texts)
        loaded = self._model(call.model, call.space, call.dimensions)
        service = loaded.service
        with self._execution.admitted() as context:
            prepared = service.prepare(call)
            if (
                not prepared.can_spread
                or prepared.chunked.layout.chunk_count < self._options.fanout_chunks
            ):
                return service.answer(prepared, context)
        fleet = fleet_of(fleet_members(self._client), self._options.device_ttl_s)
        message = self._execution.message
        self.long_texts.fan_out(service, prepared, message, fleet, model=loaded.reference)
        raise Ignore

    def service_of_part(self, model: str | None, space: str | None) -> EmbeddingService:
        """Return what computes a part of a long text.

        Args:
            model: as the device that began the text names it.
            space: the embedding space of its other parts.

        Raises:
            InvalidOptionError: no such model may be named.
            ModelError: it cannot be loaded.
            SpaceUnavailableError: it does not give vectors of that space.
        """
        # By space first: the other device may name the same weights differently.
        found = self._models.find_by_space(space) if space is not None else None
        return (found or self._model(model, space)).service

    def _model(self, model: str | None, space: str | None, dimensions: int | None = None) -> LoadedModel:
        if model is not None and not self._models.has(model):
            # It may have to be loaded, which takes too long for a batch to wait for this task's texts.
            self._batcher.withdraw(self._execution.context.announcement)
        try:
            return self._models.get(model, space, dimensions)
        except Crowded:
            time.sleep(CROWDED_S)
            raise Reject("other calls wait for models to be loaded", requeue=True) from None
