"""What a device worker is made of: its parts, built in the order in which each needs those before it."""

from __future__ import annotations

import os
import platform
import time
from functools import partial
from typing import TYPE_CHECKING, Final

import redis
from celery.utils.log import get_logger

from sutra_tasks.batching.batcher import Batcher
from sutra_tasks.batching.next_batch import Limits
from sutra_tasks.batching.service import EmbeddingService
from sutra_tasks.broker.in_flight import in_flight_of
from sutra_tasks.client.embed_task import serve
from sutra_tasks.connections import broker_client, results_client
from sutra_tasks.device.description import Identity, describe
from sutra_tasks.device.execution import Execution
from sutra_tasks.device.tasks import DeviceTasks
from sutra_tasks.engines.golden import GoldenVectors
from sutra_tasks.fanout import tasks as parts
from sutra_tasks.health.memory import device_memory
from sutra_tasks.health.monitor import Monitor
from sutra_tasks.health.states import DeviceState
from sutra_tasks.health.statistics import Statistics
from sutra_tasks.membership.heartbeat import Heartbeat
from sutra_tasks.membership.names import release
from sutra_tasks.membership.reaper import end_if_replaced, requeue_waiting
from sutra_tasks.models.loaded.freeing import freeze_loaded_objects
from sutra_tasks.models.loaded.model_cache import ModelCache
from sutra_tasks.models.registry.resolve import open_registry
from sutra_tasks.models.rollout.follower import Follower
from sutra_tasks.streaming.consumer.consumer import StreamConsumer
from sutra_tasks.streaming.consumer.machine_load import machine_load
from sutra_tasks.streaming.store import StreamStore
from sutra_tasks.streaming.upkeep_store import UpkeepStore

if TYPE_CHECKING:
    from sutra_tasks.batching.jobs import Batch
    from sutra_tasks.engines.encoder import Encoder
    from sutra_tasks.membership.device_record import DeviceRecord
    from sutra_tasks.models.loaded.loading import LoadedModel
    from sutra_tasks.settings import Settings

__all__ = ["DeviceRuntime"]

logger = get_logger(__name__)

BATCHES_AHEAD: Final = 2
"""Work taken ahead, in full batches: one computes, the next one gathers."""


class DeviceRuntime:
    """One device, without Celery.

    Attributes:
        monitor: of its health.
        batcher: that computes everything.
        execution: through which tasks compute.
    """

    def __init__(self, options: Settings, incarnation: str) -> None:
        """Build the parts; none of them runs, and no model is loaded.

        Args:
            options: of this device, with its name.
            incarnation: of this process.
        """
        assert options.device_id is not None
        self._options, self._device_id, self._incarnation = options, options.device_id, incarnation
        self._identity = Identity(options, incarnation, platform.node(), os.getpid(), time.time())
        self._client = broker_client(options)
        self._in_flight = in_flight_of(incarnation)
        self._statistics = Statistics()
        self.monitor = Monitor(
            options,
            self._client,
            self._statistics,
            memory=partial(device_memory, options.torch_device),
        )
        self._heartbeat = Heartbeat(
            self._client, self._describe, options.heartbeat_s, on_lost=self._end_if_replaced
        )
        self.batcher = Batcher(
            Limits(options.batch_tokens, options.batch_texts, options.batch_wait_s),
            on_batch=self._count_batch,
            self_check=self._self_check,
            batch_timeout_s=options.batch_timeout_s,
        )
        self.execution = Execution(options, self._client, incarnation)
        store = open_registry(options)
        self._models = ModelCache(options, store)
        self._default: LoadedModel | None = None
        self._follower: Follower | None = None
        if store is not None:
            self._follower = Follower(
                self._client, self._models, options, swap=self._swap, hasten=self._heartbeat.hasten
            )
        self._tasks = DeviceTasks(options, self._client, self._models, self.batcher, self.execution)
        self._streams: StreamConsumer | None = None

    def start(self) -> None:
        """Load and warm the model, and be ready for tasks.

        Raises:
            ModelError: it cannot be loaded.
        """
        self._heartbeat.start()  # shows in `sutra status` that it starts, and what it does
        encoder = self._models.load_default()
        self._serve_by_default(self._models.start(encoder, self._service_of))
        client = broker_client(self._options)  # of its own: it waits for entries
        self._streams = StreamConsumer(
            StreamStore(client, self._incarnation),
            UpkeepStore(client, self._incarnation),
            lambda: self._models.default.encoder,
            self.batcher,
            options=self._options,
            device_id=self._device_id,
            lock=self.execution.lock,
            serves=self._serves_streams,
            load=self._machine_load,
        )
        self.batcher.start()
        self._in_flight.may_take = self._may_take
        serve(self._tasks.embed)
        parts.serve(self._tasks.long_texts)
        freeze_loaded_objects()

    def abandon(self) -> None:
        """Leave the fleet; the start failed."""
        self._heartbeat.leave()

    def join_fleet(self) -> None:
        """Take work, now that the worker consumes."""
        self._heartbeat.hasten()
        assert self._streams is not None
        self._streams.start()
        if self._follower is not None:
            self._follower.start()
        logger.info("device %s serves %s", self._device_id, self._models.default.reference)

    def drain(self) -> None:
        """Leave the fleet, and requeue what has not begun."""
        self._heartbeat.leave()
        if self._follower is not None:
            self._follower.stop()
        if self._streams is not None:
            self._streams.drain(self._options.drain_s)
        self.batcher.drain()
        try:
            requeue_waiting(self._client, self._device_id)
        except redis.RedisError as error:
            logger.warning("what waits for this device stays until its lease ends: %s", error)

    def stop(self) -> None:
        """Finish what has begun; no task waits for it any more."""
        if self._streams is not None:
            self._streams.stop(self._options.drain_s)
        self.batcher.close(self._options.drain_s)
        try:
            release(self._client, self._device_id, self._incarnation)
        except redis.RedisError as error:
            logger.warning("the name of this device is free once its lease has ended: %s", error)

    # The model that serves by default.

    def _service_of(self, encoder: Encoder) -> EmbeddingService:
        return EmbeddingService(
            encoder, self.batcher, self._device_id, self._options, on_answer=self._statistics.answer
        )

    def _swap(self, loaded: LoadedModel) -> None:
        """Serve another model by default from the next batch on; returns when that is so."""
        self.batcher.call(partial(self._serve_by_default, loaded)).result()

    def _serve_by_default(self, loaded: LoadedModel) -> None:
        self._models.set_default(loaded)
        self._default = loaded
        self._statistics.warmed_up(*loaded.warm_up)
        self.monitor.loaded(loaded.golden, lambda: self.batcher.call(self._embed_golden_texts))

    def _embed_golden_texts(self) -> GoldenVectors:
        """Return the golden vectors as the model computes them now; on the batcher's thread."""
        return GoldenVectors.of(self._models.default.encoder)

    # What the parts ask and tell of each other.

    def _self_check(self) -> bool:
        """Return whether the device works, after a failure; on the batcher's thread."""
        try:
            works = self.monitor.agrees(self._embed_golden_texts())
        except Exception:  # noqa: BLE001 - whatever an engine raises, it should not have
            works = False
        if not works:
            self.monitor.suspect()
            self._heartbeat.hasten()
        return works

    def _count_batch(self, batch: Batch) -> None:
        by_default = self._default is not None and batch.space == self._default.encoder.info.space
        self._statistics.batch(batch, by_default_model=by_default)
        if self._streams is not None:
            self._streams.measured(batch)

    def _may_take(self, _: str) -> bool:
        """Return whether the worker may take another message."""
        ahead = BATCHES_AHEAD * self._options.batch_tokens
        return self.monitor.takes_work and self._in_flight.credit_used < ahead

    def _serves_streams(self) -> bool:
        # Routers send an unhealthy device no tasks; a consumer pulls its work and must hold back itself.
        return self.monitor.takes_work and self.monitor.verdict.state is not DeviceState.UNHEALTHY

    def _machine_load(self) -> float:
        """Return how loaded this machine is, 0 to 1, for producers of streams."""
        torch_device = self._options.torch_device
        return machine_load(torch_device, device_memory(torch_device).share)

    def _end_if_replaced(self) -> None:
        with results_client(self._options) as results:
            end_if_replaced(results, self._incarnation)

    def _describe(self) -> DeviceRecord:
        default, follower = self._default, self._follower
        return describe(
            self._identity,
            self.monitor.step(),
            self._statistics.summary(),
            encoder=default.encoder if default is not None else None,
            models=self._models.names if default is not None else (),
            loading=self._models.loading,
            candidate=follower.candidate if follower is not None else "",
            candidate_state=follower.candidate_state if follower is not None else "",
            waiting_texts=self.batcher.waiting_texts,
            uncounted=self._in_flight.uncounted,
        )
