"""What a device does for long texts: fan a call out, embed a part, combine the results of all parts."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from celery.exceptions import Ignore
from celery.utils.log import get_logger

from sutra_tasks.broker.result_backend import requeue_if_server_fails
from sutra_tasks.chunking.answer import AggregationError, answer
from sutra_tasks.client.call import HEADER, demand_of
from sutra_tasks.errors import EncodingError
from sutra_tasks.fanout.dividing import parts_for
from sutra_tasks.fanout.messages import part_demand
from sutra_tasks.fanout.store import NewDocument
from sutra_tasks.routing.balancing import assign
from sutra_tasks.vectors import Vectors

if TYPE_CHECKING:
    from sutra_tasks.batching.jobs import JobContext
    from sutra_tasks.batching.service import EmbeddingService, Prepared
    from sutra_tasks.fanout.documents import Documents
    from sutra_tasks.routing.snapshot import Fleet
    from sutra_tasks.settings import Settings
    from sutra_tasks.vectors import Embeddings

__all__ = ["LongTexts"]

logger = get_logger(__name__)


class LongTexts:
    """The work of one device on long texts; safe to use from many threads."""

    def __init__(
        self,
        services: Callable[[str | None, str | None], EmbeddingService],
        documents: Documents,
        device_id: str,
        options: Settings,
        admitted: Callable[[], AbstractContextManager[JobContext]],
    ) -> None:
        """Use what the device has.

        Args:
            services: returns the device's service for a model and an embedding space.
            documents: the long texts of the fleet.
            device_id: its name.
            options: the settings.
            admitted: returns the block in which this thread's task may compute; it gives the context
                of the task's job.
        """
        self._services, self._documents, self._device_id = services, documents, device_id
        self._options, self._admitted = options, admitted

    def fan_out(
        self,
        service: EmbeddingService,
        prepared: Prepared,
        message: Any,
        fleet: Fleet,
        *,
        model: str | None = None,
    ) -> None:
        """Replace a call by a chord of its parts.

        Args:
            service: the service that prepared the call.
            prepared: the call.
            message: its message, as this device took it.
            fleet: the devices among which the parts are divided.
            model: the model that computes them, as devices name it; devices that have it get the parts.

        Raises:
            RequeueMessage: a server failed before it had the document and all messages.
        """
        encoder, rows = service.encoder, prepared.chunked.rows
        options, sent = self._options, demand_of(message.headers.get(HEADER), 0)
        # The router counted the whole call in this device's load, but all devices share it.
        fleet = fleet.after_finishing(self._device_id, message.sutra_weight)
        fleet = _having(fleet, model, encoder.info.space, self._device_id)
        tokens = [row.tokens for row in rows]
        parts = parts_for(fleet, tokens, batch_tokens=options.batch_tokens)
        chosen = assign(
            fleet,
            [
                part_demand(len(part), sum(tokens[part.start : part.stop]), sent.strategy)
                for part in parts
            ],
            ticket=secrets.randbelow(2**32),
            default=options.strategy,
            queue_penalty_s=options.queue_penalty_factor,
        )
        document = NewDocument(
            call=prepared.call,
            layout=prepared.chunked.layout,
            model=encoder.info.model,
            space=encoder.info.space,
            parts=[encoder.pack(rows[part.start : part.stop]) for part in parts],
            tokens=[tokens[part.start : part.stop] for part in parts],
            devices=[device.id if device is not None else None for device in chosen],
        )
        with requeue_if_server_fails():
            self._documents.begin(message.sutra_raw, message.payload, document)
        chunks = prepared.chunked.layout.chunk_count
        logger.info("%d chunks are spread over the fleet in %d parts", chunks, len(parts))

    def part(self, request: Any) -> dict[str, Any] | None:
        """Embed a part.

        Args:
            request: Celery's context of the part's task.

        Returns:
            The result to join, with vectors of shape (rows, width); None if the part is done, or its
            document is given up or gone.

        Raises:
            RequeueMessage: the results server failed.
            ModelError: this device cannot load the model, or has no model of the part's space.
            CorruptMessageError: the rows do not decode.
        """
        began_at = time.monotonic()
        with requeue_if_server_fails():
            part = self._documents.store.part(request.group, request.group_index)
        if part is None:
            return None
        # All parts of a text are of one model: one that was swapped since is loaded once more.
        service = self._services(part.model, part.space)
        with self._admitted() as context:
            encoded = service.encode(
                service.encoder.unpack(part.rows),
                part.positions.__getitem__,
                context,
                estimated_tokens=demand_of(request.get(HEADER), 0).tokens,
                began_at=began_at,
            )
        return {
            "rows": Vectors.of(encoded.rows),
            "device": self._device_id,
            "queue_s": encoded.queue_s,
            "compute_s": encoded.compute_s,
        }

    def combine(self, task_id: str) -> Vectors | Embeddings:
        """Return the answer to a call from the results of its parts.

        Raises:
            RequeueMessage: the results server failed.
            Ignore: the document is gone, because the caller has the outcome already.
            IncompleteDocumentError: it is gone, and the caller has no outcome.
            Exception: the error of the document, if it was given up.
        """
        with requeue_if_server_fails():
            found = self._documents.store.ended(task_id)
            loss = self._documents.loss(task_id) if found is None else None
            if found is None and loss is None:
                self._documents.store.fail_unknown_caller(task_id)
        if loss is not None:
            raise loss
        if found is None:
            raise Ignore
        if found.error is not None:
            raise found.error
        results = found.results
        try:
            return answer(
                found.call,
                found.layout,
                np.concatenate([result["rows"] for result in results]),
                model=found.model,
                space=found.space,
                device=",".join(sorted({result["device"] for result in results})),
                queue_s=max(result["queue_s"] for result in results),
                compute_s=sum(result["compute_s"] for result in results),
            )
        except AggregationError as error:
            raise EncodingError(self._device_id, error.position, error.reason) from None


def _having(fleet: Fleet, model: str | None, space: str, here: str) -> Fleet:
    """Return the devices that need not load the model first; all devices if there is none.

    Hosts may name the same weights differently, so a device with a default of the same space has it.
    """
    having = tuple(
        one for one in fleet.devices if one.id == here or model in one.models or one.space in ("", space)
    )
    return replace(fleet, devices=having or fleet.devices)
