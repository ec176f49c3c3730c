"""``sutra up``: runs a server if there is none, a router, device workers, beat, and Flower if asked.

It goes on when nobody reads what it says: its pipe may close, and its terminal.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Final

import redis
from rich.console import Console

from sutra_tasks.cli.screen import Unread, plain
from sutra_tasks.cli.server import warnings_of
from sutra_tasks.cli.status import read, table
from sutra_tasks.connections import broker_client
from sutra_tasks.errors import SettingsError, SutraError
from sutra_tasks.host.embedded_server import embedded_server, why_not_free
from sutra_tasks.host.local_fleet import (
    await_devices,
    free_fleet_number,
    local_devices,
    run_workers,
    stop_on_signals,
)
from sutra_tasks.host.supervisor import PYTHON, WorkerSpec, worker_specs

if TYPE_CHECKING:
    from sutra_tasks.settings import Settings

__all__ = ["run"]

DEFAULT_PORT: Final = 6379
FLOWER_PORT: Final = 5555


def run(
    options: Settings,
    *,
    devices: int | None,
    replicas: int,
    port: int | None,
    flower: bool,
    log_level: str,
) -> None:
    """Start all processes, print how to use them, and keep them alive until a signal.

    Raises:
        SutraError: the fleet cannot start, or its own server has ended; all processes are stopped.
    """
    console = Console(file=Unread(sys.stderr), force_terminal=sys.stderr.isatty())
    chosen = local_devices(options, devices, replicas)
    if flower:
        _check_flower()
    with stop_on_signals(), ExitStack() as stack:
        starts_server = options.broker_url is None
        if starts_server:
            if port is None and why_not_free(DEFAULT_PORT) is None:
                port = DEFAULT_PORT
            options = replace(options, broker_url=stack.enter_context(embedded_server(port)))
        for warning in warnings_of(options, "operator"):
            console.print(plain(warning, "yellow"))
        number = 1 if starts_server else free_fleet_number(options, devices, replicas)
        if number > 1:
            chosen = local_devices(options, devices, replicas, number)
            console.print(f"fleet {number} of this machine: live workers have the names of the first")
        began = time.monotonic()
        events = ["-E"] if flower else []
        worker_options = ["--loglevel", log_level, *events]
        specs = worker_specs(options, chosen, number=number, worker_options=worker_options)
        schedule = Path(stack.enter_context(TemporaryDirectory(prefix="sutra-beat-"))) / "schedule"
        specs.append(_beat(options, schedule, log_level))
        if flower:
            specs.append(_flower(options))
        supervisor = stack.enter_context(
            run_workers(options, specs, report=lambda line: console.print(plain(line, "yellow")))
        )
        with _progress(console) as say:
            await_devices(supervisor, options, chosen, say=say)
        client = broker_client(options)
        console.print(table(read(client, options.device_ttl_s)))
        console.print(f"ready in {time.monotonic() - began:.1f} s.")
        _say_how_to_use(console, options.broker_url if starts_server else None, flower=flower)
        while True:
            time.sleep(supervisor.step(time.monotonic()))
            if starts_server:
                _check_server(client)
    console.print("stopped.")


def _say_how_to_use(console: Console, own_server: str | None, *, flower: bool) -> None:
    if own_server is not None:  # the address of another may have a password in it
        console.print("In your application:\n", highlight=False)
        console.print(f"  export SUTRA_BROKER_URL={own_server}\n", highlight=False)
    if flower:
        console.print(f"Flower: http://127.0.0.1:{FLOWER_PORT}", highlight=False)
    console.print("Ctrl-C stops the fleet.")


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[str], None]]:
    """Yield a function that shows what the devices do: in one line, or without a terminal in several."""
    if not console.is_terminal:
        said = ""

        def say(line: str) -> None:
            nonlocal said
            kind = re.sub(r"\d+", "", line)  # not one line a second for those that it takes
            if kind != said:
                console.print(plain(line))
                said = kind

        yield say
        return
    began = time.monotonic()
    with console.status("starting ...") as status:
        yield lambda line: status.update(plain(f"{line} ({time.monotonic() - began:.0f} s)"))


def _check_flower() -> None:
    if find_spec("flower") is None:
        raise SettingsError("--flower", "", "needs pip install 'sutra-tasks[flower]'")
    if (reason := why_not_free(FLOWER_PORT)) is not None:
        raise SettingsError("--flower", "", f"it cannot listen on port {FLOWER_PORT}: {reason}")


def _check_server(client: redis.Redis) -> None:
    """Check that the server that this command started still answers.

    Raises:
        SutraError: it does not. Its messages are lost, because it keeps nothing on disk.
    """
    try:
        client.ping()
    except redis.TimeoutError:
        return  # it lives, but is busy or paused
    except redis.ConnectionError:
        raise SutraError(
            "the server that `sutra up` started has ended, and with it what waited there. For work "
            "that must outlive a server, run one with an append-only file and set SUTRA_BROKER_URL."
        ) from None


def _beat(options: Settings, schedule: Path, log_level: str) -> WorkerSpec:
    command = [
        *PYTHON, "-m", "celery", "-A", "sutra_tasks", "--quiet", "beat",
        f"--schedule={schedule}", "--pidfile=", "--loglevel", log_level,
    ]  # fmt: skip
    return WorkerSpec("beat", command, options.as_env())


def _flower(options: Settings) -> WorkerSpec:
    command = [
        *PYTHON, "-m", "celery", "-A", "sutra_tasks", "flower",
        "--address=127.0.0.1", f"--port={FLOWER_PORT}", "--logging=warning",
    ]  # fmt: skip
    return WorkerSpec("flower", command, options.as_env())
