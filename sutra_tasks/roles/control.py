"""Health checks of devices: periodic tasks that Celery beat sends, and remote-control commands.

Beat sends two tasks to the control queue; a router runs them and broadcasts a command to all devices,
which evaluate themselves. The tasks neither wait behind embeddings nor pile up: each expires before the
next is sent.
"""

from __future__ import annotations

from typing import Any, Final

from celery.worker.control import control_command, inspect_command

from sutra_tasks import keys
from sutra_tasks.app import app

__all__ = ["check_health", "check_memory"]

EXERCISE_S: Final = 5.0
"""Seconds that ``sutra health`` waits for a self-check."""


@app.task(name=keys.HEALTH_TASK, shared=False, ignore_result=True)  # type: ignore[untyped-decorator]
def check_health() -> None:
    """Have every device evaluate its health."""
    app.control.broadcast("sutra_check", arguments={"memory": False})


@app.task(name=keys.MEMORY_TASK, shared=False, ignore_result=True)  # type: ignore[untyped-decorator]
def check_memory() -> None:
    """Have every device evaluate its health, and read its memory before."""
    app.control.broadcast("sutra_check", arguments={"memory": True})


@control_command(args=[("memory", bool)], signature="[memory]")  # type: ignore[untyped-decorator]
def sutra_check(state: Any, memory: bool = False) -> dict[str, str]:
    """Evaluate this device's health at its next heartbeat."""
    if (monitor := _monitor(state)) is not None:
        monitor.ask(memory=memory)
    return {"ok": "asked"}


@inspect_command()  # type: ignore[untyped-decorator]
def sutra_health(state: Any) -> dict[str, Any] | None:
    """Run a self-check now and report this device's health; None: this worker is no device."""
    monitor = _monitor(state)
    if monitor is None:
        return None
    exercise = monitor.exercise()
    passed = None
    if exercise is not None:
        try:
            passed = monitor.agrees(exercise.result(EXERCISE_S))
        except TimeoutError:
            passed = None  # the device is busy, which is no failure
        except Exception:  # noqa: BLE001 - an engine may raise anything
            passed = False
    monitor.ask(memory=True)
    return {**monitor.report(), "check_passed": passed}


def _monitor(state: Any) -> Any:
    runtime = getattr(state.consumer.controller.pool, "runtime", None)
    return runtime.monitor if runtime is not None else None
