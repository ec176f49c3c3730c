"""Text embeddings as Celery tasks.

>>> from sutra_tasks import embed
>>> embed.delay("one text").get(timeout=10)  # doctest: +SKIP
<Vectors 384 float32>
"""

from sutra_tasks import vectors as _vectors
from sutra_tasks.app import app
from sutra_tasks.client.embed_many import embed_many
from sutra_tasks.client.embed_task import embed
from sutra_tasks.client.results import EmbedResult
from sutra_tasks.distillation.config import DistillationConfig, DistillationMetrics
from sutra_tasks.distillation.distill_task import distill
from sutra_tasks.errors import (
    BackpressureSignal,
    BrokerNotConfiguredError,
    CallbackQueueError,
    CorruptMessageError,
    CorruptResultError,
    DeviceNameTakenError,
    DistillationUnderWayError,
    EncodingError,
    FleetSaturated,
    IncompleteDocumentError,
    InvalidInputError,
    InvalidMessageError,
    InvalidOptionError,
    InvalidTextError,
    MissingRightsError,
    ModelError,
    NoHealthyWorkersError,
    PoisonMessageError,
    PromotionRefusedError,
    ResultRefusedError,
    ServerUnavailableError,
    SettingsError,
    SpaceUnavailableError,
    StreamFaultError,
    SutraError,
    TooLargeError,
    TooLittleTextError,
    TrainingDivergedError,
    UnconfirmedEntriesError,
    UnsupportedVersionError,
)
from sutra_tasks.settings import Settings
from sutra_tasks.streaming.client.producer import AsyncStreamProducer, StreamProducer
from sutra_tasks.streaming.client.reader import AsyncStreamReader, StreamReader
from sutra_tasks.streaming.entries import StreamEntry
from sutra_tasks.streaming.responses import EmbeddedChunk, StreamingError, StreamingResponse
from sutra_tasks.vectors import Embeddings, Vectors

__all__ = [
    "AsyncStreamProducer",
    "AsyncStreamReader",
    "BackpressureSignal",
    "BrokerNotConfiguredError",
    "CallbackQueueError",
    "CorruptMessageError",
    "CorruptResultError",
    "DeviceNameTakenError",
    "DistillationConfig",
    "DistillationMetrics",
    "DistillationUnderWayError",
    "EmbedResult",
    "EmbeddedChunk",
    "Embeddings",
    "EncodingError",
    "FleetSaturated",
    "IncompleteDocumentError",
    "InvalidInputError",
    "InvalidMessageError",
    "InvalidOptionError",
    "InvalidTextError",
    "MissingRightsError",
    "ModelError",
    "NoHealthyWorkersError",
    "PoisonMessageError",
    "PromotionRefusedError",
    "ResultRefusedError",
    "ServerUnavailableError",
    "Settings",
    "SettingsError",
    "SpaceUnavailableError",
    "StreamEntry",
    "StreamFaultError",
    "StreamProducer",
    "StreamReader",
    "StreamingError",
    "StreamingResponse",
    "SutraError",
    "TooLargeError",
    "TooLittleTextError",
    "TrainingDivergedError",
    "UnconfirmedEntriesError",
    "UnsupportedVersionError",
    "Vectors",
    "app",
    "distill",
    "embed",
    "embed_many",
]

__version__ = "0.1.0"

_vectors.register()
