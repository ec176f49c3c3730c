"""Both ends of a result, as processes with an app of their own.

``python -m tests.redis.results worker`` stores all that is below, each under its name, as a worker
does; ``... stock`` the same through Celery's own backend; ``... fail <id>...`` stores an error as a
worker does; ``... get <id>...`` is a caller that prints what it gets, as JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any, Final

import numpy as np
from celery.app.task import Context

from sutra_tasks import errors
from sutra_tasks.app import app
from sutra_tasks.client.embed_task import embed
from sutra_tasks.roles.apps import router_app
from sutra_tasks.vectors import Embeddings, Vectors

TEXT: Final = "a text that must not be stored"

_ROWS: Final = np.random.default_rng(7).standard_normal((3, 384)).astype(np.float32)
VALUES: Final[dict[str, Vectors | Embeddings]] = {
    "one": Vectors.of(_ROWS[0]),
    "many": Vectors.of(_ROWS),
    "none": Vectors.of(_ROWS[:0]),
    "unusual": Vectors.of(np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45], np.float32)),
    "details": Embeddings(
        vectors=Vectors.of(_ROWS),
        space="space",
        model="model",
        tokens=(1, 2, 3),
        chunks=(1, 1, 2),
        truncated=(False, False, True),
        spans=(((0, 1),), ((0, 2),), ((0, 3), (2, 5))),
        weights=((1.0,), (1.0,), (0.5, 0.5)),
        chunk_vectors=None,
        device="gpu0",
        queue_s=0.25,
        compute_s=0.125,
    ),
}
ERRORS: Final[dict[str, errors.SutraError]] = {
    type(error).__name__: error
    for error in (
        errors.BackpressureSignal(10_000, 10_000, 0.8, 0.25, 3),
        errors.BrokerNotConfiguredError(),
        errors.CallbackQueueError("shop.index", "link"),
        errors.CorruptMessageError("the rows of a part"),
        errors.CorruptResultError("data is not base64"),
        errors.DeviceNameTakenError("gpu0"),
        errors.EncodingError("gpu0", 3, "out of memory"),
        errors.FleetSaturated(1_200_000, 61.5),
        errors.IncompleteDocumentError(3, 40, 421.5),
        errors.InvalidInputError("embed() got texts twice"),
        errors.InvalidMessageError("headers.expires", "it must be a time"),
        errors.ResultRefusedError("WRONGTYPE"),
        errors.InvalidOptionError("dimensions", "0", "1 or more"),
        errors.InvalidTextError(2, "a str is needed, not int"),
        errors.MissingRightsError("app", "+publish", "SUTRA_BROKER_URL", ""),
        errors.ModelError("all-MiniLM-L6-v2", "no such folder"),
        errors.NoHealthyWorkersError(4, 31.5, 30.0),
        errors.PoisonMessageError(3, "its workers died"),
        errors.DistillationUnderWayError("search", "5f1b"),
        errors.PromotionRefusedError("search", 3, "quality 0.81 is under 0.90"),
        errors.ServerUnavailableError("ConnectionError"),
        errors.SettingsError("SUTRA_HEARTBEAT_S", "-1", "must be positive"),
        errors.SpaceUnavailableError("search@3", "a:384", "b:192"),
        errors.StreamFaultError("docs", "WRONGTYPE"),
        errors.SutraError("words"),
        errors.TooLargeError("texts in one call", 10_001, 10_000, "SUTRA_MAX_TEXTS"),
        errors.TrainingDivergedError(12, 400, "loss inf", 0.5, 8),
        errors.TooLittleTextError(120, 3_000, 7, 40),
        errors.UnconfirmedEntriesError(["a", "b"], "ConnectionError"),
        errors.UnsupportedVersionError("message", "2", 1),
    )
}


def described(value: Any) -> dict[str, Any]:
    """Return everything a caller could tell apart, as JSON."""
    facts: dict[str, Any]
    if isinstance(value, Vectors):
        facts = {
            "dtype": str(value.dtype),
            "shape": list(value.shape),
            "hex": value.tobytes().hex(),
        }
    elif isinstance(value, Embeddings):
        facts = {name: getattr(value, name) for name in Embeddings.__slots__ if name != "vectors"}
        facts["vectors"] = described(value.vectors)
    elif isinstance(value, BaseException):
        facts = {**vars(value), "args": value.args, "said": str(value)}
    else:
        facts = {"value": repr(value)}
    kind = type(value)
    listed: dict[str, Any] = json.loads(json.dumps(facts, default=repr))
    return {"type": f"{kind.__module__}.{kind.__qualname__}", **listed}


def store() -> None:
    """Store every value and error as the task of this name would."""
    for name, value in VALUES.items():
        app.backend.mark_as_done(name, value, request=_request(name))
    for name, error in ERRORS.items():
        app.backend.mark_as_failure(name, error, request=_request(name))


def fail(names: list[str]) -> None:
    """Store an error for each task."""
    for name in names:
        app.backend.mark_as_failure(name, ERRORS["EncodingError"], request=_request(name))


def get(names: list[str]) -> None:
    """Print what ``AsyncResult.get`` returns or raises for each task."""
    got = {}
    for name in names:
        try:
            got[name] = described(embed.AsyncResult(name).get(timeout=5))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told
            got[name] = described(error)
    print(json.dumps(got))  # noqa: T201 - its output is its answer


def _request(name: str) -> Context:
    texts = [TEXT, TEXT]
    return Context(id=name, task="sutra.embed", args=(texts,), kwargs={}, delivery_info={})


def main(role: str, names: list[str]) -> None:
    if role == "get":
        get(names)
        return
    if role != "stock":
        router_app()  # its settings are a worker's
    if role == "fail":
        fail(names)
    else:
        store()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
