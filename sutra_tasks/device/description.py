"""The record of a device that each heartbeat carries, from what its parts say of themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sutra_tasks.broker.load import MOST_CREDIT
from sutra_tasks.engines.attention import AttentionChoice
from sutra_tasks.membership.device_record import DeviceRecord
from sutra_tasks.models.rollout.promotion import followed_model

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sutra_tasks.engines.encoder import Encoder
    from sutra_tasks.health.monitor import HealthVerdict
    from sutra_tasks.settings import Settings

__all__ = ["Identity", "describe"]


@dataclass(frozen=True, slots=True)
class Identity:
    """What stays the same while a device's process lives.

    Attributes:
        options: of the device.
        incarnation: of the process.
        host: on which it runs.
        pid: its process id.
        started_at: when, in Unix time.
    """

    options: Settings
    incarnation: str
    host: str
    pid: int
    started_at: float


def describe(
    identity: Identity,
    verdict: HealthVerdict,
    summary: Mapping[str, Any],
    *,
    encoder: Encoder | None,
    models: tuple[str, ...],
    candidate: str,
    candidate_state: str,
    waiting_texts: int,
    uncounted: tuple[int, int],
    loading: str = "",
) -> DeviceRecord:
    """Return the record of a device.

    Args:
        identity: of its process.
        verdict: on its health.
        summary: of its work, by names of the record's fields.
        encoder: that serves by default; None before one is loaded.
        models: that it has in memory, by every name that calls may use.
        candidate: the promotion it prepares for; empty if none is announced.
        candidate_state: how far it is with that.
        waiting_texts: that are in the batcher and in no batch yet.
        uncounted: messages, and their tokens, that it has in flight and no router counted.
        loading: what it says of models that are being loaded.
    """
    options = identity.options
    info = encoder.info if encoder is not None else None
    # The simulated engine chooses no attention, and an engine that is not loaded has chosen none yet.
    attention = getattr(encoder, "attention", AttentionChoice("none" if info else "", ""))
    uncounted_messages, uncounted_tokens = uncounted
    return DeviceRecord(
        id=str(options.device_id),
        incarnation=identity.incarnation,
        host=identity.host,
        pid=identity.pid,
        engine=options.engine,
        compute=options.torch_device if options.engine == "torch" else "none",
        model=info.model if info is not None else options.model,
        models=models,
        follows=followed_model(options),
        candidate=candidate,
        candidate_state=candidate_state,
        space=info.space if info is not None else "",
        width=info.width if info is not None else 0,
        window=info.window if info is not None else 0,
        attention=attention.implementation,
        dtype=attention.dtype,
        attention_reason=attention.reason,
        started_at=identity.started_at,
        state=verdict.state,
        reason="; ".join(filter(None, [verdict.reason, loading])),
        warnings=verdict.health.warnings,
        waiting_texts=waiting_texts,
        credit_tokens=max(MOST_CREDIT, round(options.credit_s * (summary["tokens_per_s"] or 0.0))),
        uncounted_messages=uncounted_messages,
        uncounted_tokens=uncounted_tokens,
        memory_bytes=verdict.memory.used_bytes,
        memory_share=verdict.memory.share,
        **summary,
    )
