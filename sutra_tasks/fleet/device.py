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
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import redis
from celery.concurrency.thread import ApplyResult
from celery.concurrency.thread import TaskPool as ThreadPool
from celery.exceptions import Reject
from celery.utils.log import get_logger
from celery.worker.strategy import default as default_strategy

from sutra_tasks.encoding.batcher import Batch, Batcher, Drained
from sutra_tasks.encoding.batching import Limits
from sutra_tasks.encoding.engines import load_engine
from sutra_tasks.encoding.service import EmbeddingService
from sutra_tasks.fleet.registry import DeviceRecord, Heartbeat
from sutra_tasks.settings import settings
from sutra_tasks.tasks import serve

if TYPE_CHECKING:
    from sutra_tasks.calls import Call
    from sutra_tasks.encoding.encoder import Encoder
    from sutra_tasks.vectors import Embeddings, Vectors

__all__ = ["DevicePool", "Statistics", "strategy"]

logger = get_logger(__name__)

LATENCIES_KEPT = 512


def strategy(task: Any, app: Any, consumer: Any) -> Callable[..., Any]:
    """Handle a message as Celery does, but acknowledge from the thread that finished it.

    Celery hands acknowledgements to its event loop, which has ended when a stopping pool finishes its
    last tasks; those would run again elsewhere.
    """
    handle = default_strategy(task, app, consumer)

    def handler(message: Any, body: Any, ack: Any, reject: Any, callbacks: Any) -> Any:  # noqa: ARG001
        return handle(message, body, message.ack_log_error, message.reject_log_error, callbacks)

    return handler


class Statistics:
    """What this worker has done so far; written by its threads, read by the heartbeat."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = {"tasks": 0, "texts": 0, "tokens": 0, "batches": 0, "errors": 0}
        self._busy_s = 0.0
        self._latencies_s: deque[float] = deque(maxlen=LATENCIES_KEPT)

    def batch(self, batch: Batch) -> None:
        """Count one batch."""
        with self._lock:
            self._counts["batches"] += 1
            self._counts["texts"] += batch.texts
            self._counts["tokens"] += batch.tokens
            self._counts["errors"] += batch.errors
            self._busy_s += batch.compute_s

    def answer(self, seconds: float) -> None:
        """Count one answered task."""
        with self._lock:
            self._counts["tasks"] += 1
            self._latencies_s.append(seconds)

    def summary(self) -> dict[str, Any]:
        """Return the counts, and the median and 95th percentile of recent tasks in milliseconds."""
        with self._lock:
            counts, busy_s, recent = dict(self._counts), self._busy_s, sorted(self._latencies_s)
        return {
            **counts,
            "busy_s": round(busy_s, 4),
            "p50_ms": round(1000 * recent[len(recent) // 2], 2) if recent else 0.0,
            "p95_ms": round(1000 * recent[int(len(recent) * 0.95)], 2) if recent else 0.0,
        }


class DevicePool(ThreadPool):  # type: ignore[misc]  # Celery is untyped
    """Celery's thread pool with an engine in it; ``worker_pool`` of a device worker."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._options = settings()
        self._incarnation: str = self.app.conf.broker_transport_options["incarnation"]
        self._statistics = Statistics()
        self._current = threading.local()
        self._started_at = time.time()

    def on_start(self) -> None:
        """Load and warm the model; the worker accepts no work before this returns."""
        options = self._options
        self._encoder = load_engine(options)
        warm_up(self._encoder)
        limits = Limits(options.batch_tokens, options.batch_texts, options.batch_wait_s)
        self._batcher = Batcher(self._encoder, limits, on_batch=self._statistics.batch)
        self._batcher.start()
        assert options.device_id is not None
        self._service = EmbeddingService(
            self._encoder, self._batcher, options.device_id, on_answer=self._statistics.answer
        )
        serve(self._answer)
        client = redis.Redis.from_url(options.broker_url or "", socket_timeout=options.socket_timeout_s)
        self._heartbeat = Heartbeat(client, self._describe, options.heartbeat_s)

    def on_ready(self) -> None:
        """Join the fleet, once the worker consumes."""
        self._heartbeat.start()
        logger.info("device %s serves %s", self._options.device_id, self._encoder.card.model)

    def on_close(self) -> None:
        """Leave the fleet and hand back what has not begun."""
        self._heartbeat.stop()
        self._batcher.drain()

    def on_stop(self) -> None:
        """Finish what runs. The batcher outlives the threads that wait for it."""
        self.executor.shutdown(cancel_futures=True)
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
        self._batcher.announce()
        future = self.executor.submit(
            self._run, target, args or (), kwargs or {}, callback, accept_callback
        )
        future.add_done_callback(lambda f: self._batcher.arrived() if f.cancelled() else None)
        return ApplyResult(future)

    def _run(self, target: Any, args: Any, kwargs: Any, callback: Any, accept_callback: Any) -> None:
        self._current.arriving = True
        try:
            accept_callback(os.getpid(), time.monotonic())
            callback(target(*args, **kwargs))
        except BaseException as error:
            # What escapes Celery's tracing (results cannot be stored, say) would end in a future
            # nobody reads: no acknowledgement, and after enough of them a worker that is deaf.
            request = callback.__self__
            logger.error("task %s goes back to its queue: %r", request.id, error)  # noqa: TRY400
            request.reject(requeue=True)
            if not isinstance(error, Exception):
                raise
        finally:
            self._arrived()

    def _arrived(self) -> None:
        if self._current.arriving:
            self._current.arriving = False
            self._batcher.arrived()

    def _answer(self, call: Call) -> Vectors | Embeddings:
        try:
            return self._service.answer(call, submitted=self._arrived)
        except Drained:
            reason = f"device {self._options.device_id} is stopping"
            raise Reject(reason, requeue=True) from None

    def _describe(self) -> DeviceRecord:
        options, card = self._options, self._encoder.card
        return DeviceRecord(
            id=options.device_id or "",
            incarnation=self._incarnation,
            host=platform.node(),
            pid=os.getpid(),
            engine=options.engine,
            compute=options.torch_device if options.engine == "torch" else "none",
            model=card.model,
            space=card.space,
            width=card.width,
            window=card.window,
            started_at=self._started_at,
            waiting_texts=self._batcher.waiting_texts,
            **self._statistics.summary(),
        )


def warm_up(encoder: Encoder) -> None:
    """Run the model on a few shapes: the first passes allocate, and on GPUs compile."""
    for size in (1, 8):
        encoder.encode(encoder.tokenize(["a few words to warm up with"] * size, None))
