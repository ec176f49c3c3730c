"""What one device says of itself: a value, stored in Redis as JSON with a version."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from sutra_tasks.errors import UnsupportedVersionError
from sutra_tasks.health.states import DeviceState

__all__ = ["DeviceRecord"]

VERSION: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRecord:
    """What one device worker says of itself; its heartbeats write it to the server.

    Speeds, latencies and credit are in estimated tokens, as in ``Demand.tokens``. The fields
    from ``tasks`` to ``latency_per_token_s`` are those of ``Statistics.summary``.

    Attributes:
        compute: where it computes: ``cpu``, ``cuda``, ``mps``, or ``none`` for the simulated engine.
        model: its default model.
        space: embedding space of the default model.
        width: dimensions of the vectors.
        window: tokens that the default model reads at most.
        started_at: Unix time in seconds.
        models: models in its memory, by every name that calls may use.
        candidate: the promotion that it prepares for.
        candidate_state: ``loading``, ``ready``, or why the candidate cannot be loaded.
        follows: the model of which it serves the promoted version; empty: its version is fixed.
        attention: how it computes attention.
        dtype: precision in which it computes.
        attention_reason: why it does not compute attention faster.
        state: its health.
        reason: why it is in this state.
        waiting_texts: texts in its batcher.
        credit_tokens: with so much credit used it gets no more messages.
        uncounted_messages: messages that it took past the router, which no load counts.
        uncounted_tokens: their estimated tokens.
        memory_share: share of its memory in use, 0 to 1; None: not known.
    """

    id: str
    incarnation: str
    host: str
    pid: int
    engine: str
    compute: str
    model: str
    space: str
    width: int
    window: int
    started_at: float
    models: tuple[str, ...] = ()
    candidate: str = ""
    candidate_state: str = ""
    follows: str = ""
    attention: str = ""
    dtype: str = ""
    attention_reason: str = ""
    state: DeviceState = DeviceState.STARTING
    reason: str = ""
    warnings: tuple[str, ...] = ()
    tasks: int = 0
    texts: int = 0
    tokens: int = 0
    batches: int = 0
    errors: int = 0
    waiting_texts: int = 0
    busy_s: float = 0.0
    p50_ms: float = 0.0
    p95_ms: float = 0.0
    tokens_per_s: float | None = None
    latency_s: float | None = None
    latency_per_token_s: float | None = None
    credit_tokens: int = 0
    uncounted_messages: int = 0
    uncounted_tokens: int = 0
    memory_bytes: int | None = None
    memory_share: float | None = None

    def to_json(self) -> str:
        """Return the stored form."""
        return json.dumps({"v": VERSION, **asdict(self)})

    @classmethod
    def from_json(cls, text: str | bytes) -> DeviceRecord:
        """Read the stored form.

        Raises:
            UnsupportedVersionError: another version wrote it.
        """
        value: dict[str, Any] = json.loads(text)
        if value.get("v") != VERSION:
            raise UnsupportedVersionError("device record", str(value.get("v"))[:20], VERSION)
        known = {field.name: value[field.name] for field in fields(cls)}
        tuples = {name: tuple(value[name]) for name in ("models", "warnings")}
        return cls(**known | tuples | {"state": DeviceState(value["state"])})
