"""The record of a device, for tests of code that reads records."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from sutra_tasks.health.states import DeviceState
from sutra_tasks.membership.device_record import DeviceRecord

RECORD: Final = DeviceRecord(
    id="gpu0",
    incarnation="gpu0.12345678",
    host="Ü-host",
    pid=42,
    engine="simulated",
    compute="none",
    model="all-MiniLM-L6-v2",
    space="space",
    width=384,
    window=256,
    attention="cpu_flash",
    dtype="bfloat16",
    attention_reason="Ümlaut",
    started_at=1_700_000_000.25,
    state=DeviceState.HEALTHY,
    tasks=7,
    busy_s=0.125,
    p95_ms=12.5,
    tokens_per_s=1000.5,
    latency_s=0.25,
    latency_per_token_s=0.001,
    credit_tokens=8192,
    memory_bytes=2**33,
    memory_share=0.5,
)


def record(device_id: str, start: str = "1", **facts: Any) -> DeviceRecord:
    """Return the record of one start of a device, with ``facts`` instead of the usual ones."""
    return replace(RECORD, id=device_id, incarnation=f"{device_id}.{start}", **facts)
