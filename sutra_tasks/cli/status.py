"""``sutra status``: the fleet as a table, or as JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sutra_tasks import keys
from sutra_tasks.broker.queues import queue_lengths
from sutra_tasks.cli.screen import plain
from sutra_tasks.cli.server import connected
from sutra_tasks.health.states import DeviceState
from sutra_tasks.membership.fleet import FleetMember, fleet_members

if TYPE_CHECKING:
    import redis

    from sutra_tasks.membership.device_record import DeviceRecord
    from sutra_tasks.settings import Settings

__all__ = ["DeviceStatus", "FleetStatus", "precisions", "read", "run", "table"]

MOST_NAMED: Final = 4
COLOURS: Final = {DeviceState.HEALTHY: "green"} | dict.fromkeys(
    (DeviceState.DEAD, DeviceState.REFUSED, DeviceState.UNHEALTHY), "red"
)


@dataclass(frozen=True, slots=True)
class DeviceStatus:
    """One device: its record, and what the server knows of it.

    Attributes:
        id: of the device.
        live: whether its last heartbeat is recent.
        state: the one it reports; dead if it is not live.
        heartbeat_age_s: seconds since its last heartbeat.
        queued: messages that wait in its queue.
        held: messages in flight in its worker.
        backlog_tokens: estimated tokens that it was sent and has not finished.
        record: what it says of itself; None if another version of this package wrote it.
    """

    id: str
    live: bool
    state: DeviceState
    heartbeat_age_s: float
    queued: int
    held: int
    backlog_tokens: int
    record: DeviceRecord | None


@dataclass(frozen=True, slots=True)
class FleetStatus:
    """The whole fleet at one moment: its devices, the records of its routers, and what waits."""

    devices: tuple[DeviceStatus, ...]
    routers: tuple[dict[str, Any], ...]
    queued: int
    dead_letters: int


def read(client: redis.Redis, ttl_s: float) -> FleetStatus:
    """Read the fleet's state in few round trips, however many devices there are."""
    members = fleet_members(client)
    queues = queue_lengths(client, [keys.EMBED_QUEUE, *(keys.device_queue(s.id) for s in members)])
    with client.pipeline(transaction=False) as pipe:
        for one in members:
            pipe.llen(keys.in_flight(one.record.incarnation if one.record else ""))
        held = pipe.execute()
    routers = [client.get(name) for name in client.scan_iter(keys.router("*"))]
    return FleetStatus(
        devices=tuple(
            DeviceStatus(
                id=one.id,
                live=one.is_live(ttl_s),
                state=_state(one, ttl_s),
                heartbeat_age_s=round(one.heartbeat_age_s, 1),
                queued=queues[keys.device_queue(one.id)],
                held=count,
                backlog_tokens=one.backlog_tokens,
                record=one.record,
            )
            for one, count in zip(members, held, strict=True)
        ),
        routers=tuple(json.loads(text) for text in routers if text is not None),
        queued=queues[keys.EMBED_QUEUE],
        dead_letters=client.hlen(keys.dead_letters()),
    )


def _state(member: FleetMember, ttl_s: float) -> DeviceState:
    if not member.is_live(ttl_s):
        return DeviceState.DEAD
    return member.record.state if member.record is not None else DeviceState.HEALTHY


def table(fleet: FleetStatus) -> Table:
    """Return the devices as a table."""
    drawn = Table(title=None, box=None, pad_edge=False, header_style="bold")
    drawn.add_column("device")
    drawn.add_column("state")
    drawn.add_column("model")
    for name in ("texts", "tokens/s", "queue", "in flight", "p50 ms", "p95 ms"):
        drawn.add_column(name, justify="right")
    total = 0
    for device in fleet.devices:
        record = device.record
        state = plain(device.state, COLOURS.get(device.state, "yellow"))
        if not device.live:
            state.append(f", silent {device.heartbeat_age_s:.0f} s", style="default")
        if record is None:
            drawn.add_row(plain(device.id), Text("another version", style="red"))
            continue
        total += record.texts
        drawn.add_row(
            plain(device.id), state, plain(record.model),
            f"{record.texts:,}", f"{record.tokens_per_s or 0:,.0f}",
            f"{device.backlog_tokens:,}/{record.credit_tokens:,}", str(device.held),
            f"{record.p50_ms:.1f}", f"{record.p95_ms:.1f}",
        )  # fmt: skip
    drawn.add_section()
    drawn.add_row("total", "", "", f"{total:,}")
    return drawn


def precisions(fleet: FleetStatus) -> list[str]:
    """Return how devices compute and why not better, one line for all devices that compute alike."""
    devices: dict[tuple[str, str, str], list[str]] = {}
    for device in fleet.devices:
        record = device.record
        if record is not None and record.dtype:
            how = (record.attention, record.dtype, record.attention_reason)
            devices.setdefault(how, []).append(device.id)
    return [
        f"{', '.join(ids) if len(ids) <= MOST_NAMED else f'{len(ids)} devices'}: "
        f"{path} attention in {dtype}{f' ({reason})' if reason else ''}"
        for (path, dtype, reason), ids in devices.items()
    ]


def run(options: Settings, *, as_json: bool) -> None:
    """Print the fleet; exit status 1 when no device lives."""
    fleet = read(connected(options), options.device_ttl_s)
    if as_json:
        print(json.dumps(asdict(fleet), indent=2))  # noqa: T201 - this is the output
    else:
        console = Console()
        if fleet.devices:
            console.print(table(fleet))
        for device in fleet.devices:
            if device.record is not None and device.record.reason:
                console.print(plain(device.id, "yellow"), end="")
                console.print(plain(f": {device.record.reason}"))
        for line in precisions(fleet):
            console.print(plain(line, "dim"))
        waiting = sum(router["waiting"] for router in fleet.routers)
        console.print("queue: estimated tokens sent and not finished / taken ahead at most", style="dim")
        console.print(
            f"{len(fleet.routers)} routers, {fleet.queued} messages queued for them"
            + (f", [yellow]{waiting} wait for a device[/]" if waiting else "")
            + (f", [yellow]{fleet.dead_letters} dead letters[/]" if fleet.dead_letters else "")
        )
    if not any(device.live for device in fleet.devices):
        sys.exit("sutra: no live device. Start some with: sutra up")
