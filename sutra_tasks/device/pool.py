"""The device worker: a thread pool whose tasks meet in one batcher, on one device.

The pool owns the engine, because its life is the right one: Celery starts it before the consumer, so
the model is warm when work arrives; keeps it over reconnects; and stops it after the consumer. Threads
rather than processes: CUDA does not survive a fork, and every child would hold a copy of the model.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, TypeVar

import redis
from celery.concurrency.thread import ApplyResult
from celery.concurrency.thread import TaskPool as ThreadPool
from celery.exceptions import Ignore, Reject, TaskRevokedError
from celery.utils.log import get_logger
from celery.worker.state import revoked

from sutra_tasks import keys
from sutra_tasks.batching.batcher import Batch, Batcher, DeviceBroken, Drained, Unwanted
from sutra_tasks.batching.next_batch import Limits
from sutra_tasks.batching.service import EmbeddingService
from sutra_tasks.batching.shared_lock import Floor
from sutra_tasks.broker.attempts import SUSPECT_AFTER, attempts_of
from sutra_tasks.broker.in_flight import in_flight_of
from sutra_tasks.broker.late_ack import run_task
from sutra_tasks.broker.load import MOST_CREDIT
from sutra_tasks.client.embed_task import serve
from sutra_tasks.connections import broker_client, results_client
from sutra_tasks.distillation.data.traffic_sample import open_sample
from sutra_tasks.engines.attention import AttentionChoice
from sutra_tasks.engines.golden import GoldenVectors
from sutra_tasks.errors import EncodingError
from sutra_tasks.fanout import tasks as parts
from sutra_tasks.fanout.documents import Documents
from sutra_tasks.fanout.long_texts import LongTexts
from sutra_tasks.health.memory import device_memory
from sutra_tasks.health.monitor import Monitor
from sutra_tasks.health.states import DeviceState
from sutra_tasks.health.statistics import Statistics
from sutra_tasks.membership.device_record import DeviceRecord
from sutra_tasks.membership.fleet import fleet_members
from sutra_tasks.membership.heartbeat import Heartbeat
from sutra_tasks.membership.reaper import end_if_replaced, requeue_waiting
from sutra_tasks.models.loaded.freeing import freeze_loaded_objects
from sutra_tasks.models.loaded.model_cache import ModelCache
from sutra_tasks.models.registry.resolve import open_registry
from sutra_tasks.models.rollout.follower import Follower
from sutra_tasks.models.rollout.promotion import followed_model
from sutra_tasks.routing.snapshot import fleet_of
from sutra_tasks.settings import settings
from sutra_tasks.streaming.consumer import StreamConsumer
from sutra_tasks.streaming.machine_load import machine_load
from sutra_tasks.streaming.store import StreamStore
from sutra_tasks.streaming.upkeep_store import UpkeepStore

if TYPE_CHECKING:
    from sutra_tasks.client.call import Call
    from sutra_tasks.engines.encoder import Encoder
    from sutra_tasks.models.loaded.loading import LoadedModel
    from sutra_tasks.vectors import Embeddings, Vectors

__all__ = ["DevicePool"]

Answer = TypeVar("Answer")

logger = get_logger(__name__)

ROOM_BATCHES: Final = 2
"""Work taken ahead, in full batches: one computes, the next one gathers."""

HEARD_S: Final = 0.2
"""By then every router knows that a device is broken, and sends what comes back from it elsewhere."""


class DevicePool(ThreadPool):  # type: ignore[misc]  # Celery is untyped
    """Celery's thread pool with an engine in it; ``worker_pool`` of a device worker."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        options = self._options = settings()
        assert options.device_id is not None
        self._device_id: str = options.device_id
        self._incarnation: str = self.app.conf.broker_transport_options["incarnation"]
        self._client, self._stream_client = broker_client(options), broker_client(options)
        self._streams: StreamConsumer | None = None
        self._statistics = Statistics()
        self._current = threading.local()
        self._floor = Floor()
        self._started_at = time.time()
        self._store = open_registry(options)
        self._models = ModelCache(options, self._store)
        self._sampler = open_sample(self._client, options)
        self._follower: Follower | None = None
        self._serves: LoadedModel | None = None
        self._batcher: Batcher | None = None
        self.monitor = Monitor(
            options,
            self._client,
            self._statistics,
            memory=lambda: device_memory(options.torch_device),
        )
        self._heartbeat = Heartbeat(
            self._client, self._describe, options.heartbeat_s, on_lost=self._on_lost
        )

    def on_start(self) -> None:
        """Load and warm the model; the worker accepts no work before this returns."""
        options = self._options
        self._heartbeat.start()
        encoder = self._models.load_default()
        limits = Limits(options.batch_tokens, options.batch_texts, options.batch_wait_s)
        batcher = Batcher(
            limits,
            on_batch=self._on_batch,
            self_check=self._self_check,
            batch_timeout_s=options.batch_timeout_s,
        )
        self._batcher = batcher
        self._now_serves(self._models.start(encoder, self._service_of))
        batcher.start()
        if self._store is not None:
            self._follower = Follower(
                self._client,
                self._models,
                options,
                swap=lambda loaded: batcher.call(lambda: self._now_serves(loaded)).result(),
                hasten=self._heartbeat.hasten,
            )
        held = in_flight_of(self._incarnation)
        room = ROOM_BATCHES * options.batch_tokens
        held.may_take = lambda _: self.monitor.takes_work and held.credit_used < room
        serve(self._answer)
        self._long_texts = LongTexts(
            self._service_of_part,
            Documents.of(options),
            self._device_id,
            options,
            self._computed,
        )
        parts.serve(self._long_texts)
        self._streams = StreamConsumer(
            StreamStore(self._stream_client, self._incarnation),
            UpkeepStore(self._stream_client, self._incarnation),
            lambda: self._models.default.encoder,
            batcher,
            options=options,
            device_id=self._device_id,
            seat=self._floor,
            # A router prefers others to one that is unhealthy; who pulls must hold back by itself.
            serves=lambda: (
                self.monitor.takes_work and self.monitor.verdict.state is not DeviceState.UNHEALTHY
            ),
            load=self._load,
        )
        freeze_loaded_objects()

    def _service_of(self, encoder: Encoder) -> EmbeddingService:
        assert self._batcher is not None
        return EmbeddingService(
            encoder, self._batcher, self._device_id, self._options, on_answer=self._statistics.answer
        )

    def _now_serves(self, loaded: LoadedModel) -> None:
        """Serve this model by default; between two batches, for it is on the batcher's thread."""
        batcher = self._batcher
        assert batcher is not None
        self._models.set_default(loaded)
        self._serves = loaded
        self._statistics.warmed_up(*loaded.warm_up)
        self.monitor.loaded(
            loaded.golden, lambda: batcher.call(lambda: GoldenVectors.of(self._models.default.encoder))
        )

    def on_ready(self) -> None:
        """Join the fleet, now that the worker consumes."""
        self._heartbeat.hasten()
        assert self._streams is not None
        self._streams.start()
        if self._follower is not None:
            self._follower.start()
        logger.info("device %s serves %s", self._device_id, self._models.default.reference)

    def on_close(self) -> None:
        """Leave the fleet and hand back what has not begun."""
        self._heartbeat.leave()
        if self._follower is not None:
            self._follower.stop()
        if self._streams is not None:
            self._streams.drain(self._options.drain_s)
        if self._batcher is not None:
            self._batcher.drain()
        try:
            requeue_waiting(self._client, self._device_id)
        except redis.RedisError as error:
            logger.warning("what waits for this device stays until its lease ends: %s", error)

    def on_stop(self) -> None:
        """Finish what runs. The batcher outlives the threads that wait for it."""
        self.executor.shutdown(cancel_futures=True)
        if self._streams is not None:
            self._streams.stop(self._options.drain_s)
        if self._batcher is not None:
            self._batcher.close(self._options.drain_s)
        self._state = self.TERMINATE

    def on_apply(
        self,
        target: Callable[..., Any],
        args: Any = None,
        kwargs: Any = None,
        callback: Any = None,
        accept_callback: Any = None,
        **_: Any,
    ) -> ApplyResult:
        """Run one task on a thread, and tell the batcher that its texts are on their way."""
        assert self._batcher is not None
        batcher = self._batcher
        batcher.announce()
        future = self.executor.submit(
            self._run, target, args or (), kwargs or {}, callback, accept_callback
        )
        future.add_done_callback(lambda f: batcher.arrived() if f.cancelled() else None)
        return ApplyResult(future)

    def _run(self, target: Any, args: Any, kwargs: Any, callback: Any, accept_callback: Any) -> None:
        # The callback is a method of Celery's request, which has the message.
        self._current.request = callback.__self__
        self._current.arriving = True
        try:
            run_task(target, args, kwargs, callback, accept_callback)
        finally:
            self._arrived()

    def _arrived(self) -> None:
        if self._current.arriving:
            assert self._batcher is not None
            self._current.arriving = False
            self._batcher.arrived()

    def _answer(self, call: Call) -> Vectors | Embeddings:
        if self._sampler is not None:
            with suppress(redis.RedisError):
                self._sampler.offer(call.texts)
        loaded = self._model(call.model, call.space, call.dimensions)
        service = loaded.service
        prepared = service.prepare(call)
        if prepared.can_spread and prepared.chunked.layout.chunk_count >= self._options.fanout_chunks:
            fleet = fleet_of(fleet_members(self._client), self._options.device_ttl_s)
            self._long_texts.fan_out(
                service, prepared, self._current.request.message, fleet, model=loaded.reference
            )
            raise Ignore
        return self._computed(lambda **how: service.answer(prepared, **how))

    def _model(self, model: str | None, space: str | None, dimensions: int | None = None) -> LoadedModel:
        if model is not None and not self._models.has(model):
            self._arrived()  # it may have to be loaded: nobody waits for that
        return self._models.get(model, space, dimensions)

    def _service_of_part(self, model: str | None, space: str | None) -> EmbeddingService:
        # The host that begun the text may name the same weights otherwise.
        held = self._models.find_by_space(space) if space is not None else None
        return (held or self._model(model, space)).service

    def _computed(self, compute: Callable[..., Answer], *, task_id: str | None = None) -> Answer:
        """Compute for the task of this thread, and see to what is neither an answer nor its failure.

        Args:
            compute: how; it gets what it passes on to the batcher.
            task_id: the task whose caller may give it up, if that is another one.
        """
        request = self._current.request
        wanted_id = task_id or request.id
        attempts = attempts_of(request.message.headers)
        suspected = attempts > 0 and attempts >= min(SUSPECT_AFTER, self._options.max_attempts - 1)
        try:
            with self._marked(request.id) if suspected else self._floor.shared():
                return compute(
                    submitted=self._arrived,
                    alone=suspected,
                    wanted=lambda: wanted_id not in revoked and not request.maybe_expire(),
                )
        except Unwanted:
            if request.revoked():  # says so to its caller, or its chord
                raise Ignore from None
            raise TaskRevokedError("revoked") from None
        except Drained:
            raise Reject(f"device {self._device_id} is stopping", requeue=True) from None
        except DeviceBroken as error:
            if attempts + 1 >= self._options.max_attempts:
                raise EncodingError(self._device_id, error.position, "the device is broken") from None
            request.message.sutra_failed = True
            time.sleep(HEARD_S)
            raise Reject(f"device {self._device_id} is broken", requeue=True) from None

    @contextmanager
    def _marked(self, task_id: str) -> Iterator[None]:
        """Name the suspect while it runs, and nothing else does, so that there is no doubt."""
        mark = keys.suspect(self._incarnation)
        with self._floor.alone():
            self._client.set(mark, task_id, ex=keys.FORGET_AFTER_S)
            try:
                yield
            finally:
                self._client.delete(mark)

    def _self_check(self) -> bool:
        """Say whether the model is to blame for a failure; on the thread that may call it."""
        try:
            works = self.monitor.agrees(GoldenVectors.of(self._models.default.encoder))
        except Exception:  # noqa: BLE001 - whatever an engine raises, it should not have
            works = False
        if not works:
            self.monitor.suspect()
            self._heartbeat.hasten()
        return works

    def _on_batch(self, batch: Batch) -> None:
        usual = self._serves is not None and batch.space == self._serves.encoder.info.space
        self._statistics.batch(batch, by_default_model=usual)
        if self._streams is not None:
            self._streams.measured(batch)

    def _load(self) -> float:
        """Return how loaded this machine is, for producers of streams."""
        torch_device = self._options.torch_device
        return machine_load(torch_device, device_memory(torch_device).share)

    def _on_lost(self) -> None:
        with results_client(self._options) as results:
            end_if_replaced(results, self._incarnation)

    def _describe(self) -> DeviceRecord:
        options, verdict = self._options, self.monitor.step()
        encoder = self._serves.encoder if self._serves is not None else None
        info = encoder.info if encoder is not None else None
        # An engine that makes its vectors up has none, and one that loads has none yet.
        attention = getattr(encoder, "attention", AttentionChoice("none" if info else "", ""))
        follower = self._follower
        summary = self._statistics.summary()
        speed = summary["tokens_per_s"] or 0.0
        uncounted_messages, uncounted_tokens = in_flight_of(self._incarnation).uncounted
        return DeviceRecord(
            id=self._device_id,
            incarnation=self._incarnation,
            host=platform.node(),
            pid=os.getpid(),
            engine=options.engine,
            compute=options.torch_device if options.engine == "torch" else "none",
            model=info.model if info is not None else options.model,
            models=self._models.names if self._serves is not None else (),
            follows=followed_model(options),
            candidate=follower.candidate if follower is not None else "",
            candidate_state=follower.candidate_state if follower is not None else "",
            space=info.space if info is not None else "",
            width=info.width if info is not None else 0,
            window=info.window if info is not None else 0,
            attention=attention.path,
            dtype=attention.dtype,
            attention_reason=attention.reason,
            started_at=self._started_at,
            state=verdict.state,
            reason=verdict.reason,
            warnings=verdict.health.warnings,
            waiting_texts=self._batcher.waiting_texts if self._batcher is not None else 0,
            credit_tokens=max(MOST_CREDIT, round(options.credit_s * speed)),
            uncounted_messages=uncounted_messages,
            uncounted_tokens=uncounted_tokens,
            memory_bytes=verdict.memory.used_bytes,
            memory_share=verdict.memory.share,
            **summary,
        )
