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
    """What one device worker says of itself; stored as JSON with a version.

    Speeds, latencies and loads are in estimated tokens (:attr:`sutra_tasks.client.call.Demand.tokens`).
    ``models`` are those it has in memory, by every name that calls may use. ``candidate`` is the
    promotion it prepares for, and ``candidate_state`` is ``loading``, ``ready``, or why it cannot.
    ``follows`` is the model whose serving version it serves, whichever that is; empty if it stays.
    ``attention`` and ``dtype`` are how it computes, ``attention_reason`` why it does not do so better.
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
