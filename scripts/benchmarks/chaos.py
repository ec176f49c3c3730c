"""Faults at random under load: nothing is lost, nothing is wrong, and how long the rescue takes.

Four simulated devices, a router and a server with an append-only file run with default settings, while a
client keeps hundreds of tasks in flight and compares every vector. ``recovery_s`` is the time from the
kill of devices to the last stored result of what they held.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import redis
from celery.exceptions import TimeoutError as WaitedTooLong
from kombu.exceptions import OperationalError

from scripts.benchmarks.report import percentile
from sutra_tasks import EncodingError, PoisonMessageError, ServerUnavailableError, embed, keys
from sutra_tasks.encoding.simulated import vectors_of
from sutra_tasks.fleet.hardware import plan_devices
from sutra_tasks.fleet.local import await_devices, fleet
from sutra_tasks.fleet.server import embedded_server, free_port
from sutra_tasks.fleet.supervisor import Supervisor, worker_specs
from sutra_tasks.settings import Settings, settings

DEVICES: Final = 4
IN_FLIGHT: Final = 600
TASKS: Final = 21_000
SEED: Final = 3
PAUSE_S: Final = 2.0
"""Between the end of a fault and the next."""

LONGEST_S: Final = 150.0
"""A task that takes longer is lost; a hung device is found out after 120."""

FAULTS: Final = {
    "kill_device": 12, "kill_router": 4, "kill_all_devices": 3, "stop_device": 2, "restart_server": 2,
    "pause_server": 1, "nan_device": 2, "hang_device": 1, "raise": 3, "die": 1, "full_memory": 2,
}  # fmt: skip


@dataclass
class Chaos:
    """One run: the processes, what was sent, and what was found."""

    options: Settings
    client: redis.Redis
    folder: Path
    server: Server
    supervisor: Supervisor
    devices: Sequence[str]
    draw: random.Random
    faults: Counter[str] = field(default_factory=Counter)
    recovery_s: list[float] = field(default_factory=list)
    special: deque[str] = field(default_factory=deque)
    """Texts that fail, for the client to send next."""

    def pid(self, name: str) -> int:
        """Return a process's id, once it runs."""
        while (pid := self.supervisor.pids.get(name)) is None:
            time.sleep(0.05)
        return pid

    def kill_device(self) -> None:
        """Kill one device, whatever it does."""
        self._kill([self.draw.choice(self.devices)])

    def kill_all_devices(self) -> None:
        """Kill all devices at once."""
        self._kill(self.devices)

    def _kill(self, names: Sequence[str]) -> None:
        pids = [self.pid(name) for name in names]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)  # so that what is read next is what dies with it
        held = [task for name in names for task in self._held(name)]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        results = [f"celery-task-meta-{task}" for task in held]
        while results and self.client.exists(*results) < len(results):
            time.sleep(0.02)
            assert time.monotonic() - began < LONGEST_S, "what a device held did not come back"
        if results:
            self.recovery_s.append(time.monotonic() - began)

    def _held(self, name: str) -> list[str]:
        record: Any = self.client.get(keys.device(name))
        if record is None:
            return []
        messages: Any = self.client.lrange(keys.held(json.loads(record)["incarnation"]), 0, -1)
        return [json.loads(message)["headers"]["id"] for message in messages]

    def kill_router(self) -> None:
        """Kill the router, and with it the reaper."""
        os.kill(self.pid("router"), signal.SIGKILL)

    def stop_device(self) -> None:
        """Stop a device past its lease, then let it go on."""
        pid = self.pid(self.draw.choice(self.devices))
        os.kill(pid, signal.SIGSTOP)
        time.sleep(self.options.lease_s + 3)
        os.kill(pid, signal.SIGCONT)

    def restart_server(self) -> None:
        """Stop the server for a second."""
        self.server.restart()

    def pause_server(self) -> None:
        """Have the server answer nobody for ten seconds."""
        self.client.client_pause(10_000)
        time.sleep(10)

    def nan_device(self) -> None:
        """Have a device give no numbers for three seconds."""
        file = self.folder / f"{self.draw.choice(self.devices)}.nan"
        file.touch()
        time.sleep(3)
        file.unlink()

    def hang_device(self) -> None:
        """Hang one call of an engine."""
        (self.folder / f"{self.draw.choice(self.devices)}.hang").touch()

    def full_memory(self) -> None:
        """Leave the server no memory for three seconds."""
        info: Any = self.client.info("memory")
        self.client.config_set("maxmemory", info["used_memory"])
        time.sleep(3)
        self.client.config_set("maxmemory", 0)


class Server:
    """A server that finds again, on the same port, what it stored."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._folder, self._running = folder, ExitStack()

    def start(self) -> str:
        """Start, and return the address."""
        options = ("--appendonly", "yes", "--appendfsync", "no", "--dir", str(self._folder))
        return self._running.enter_context(embedded_server(self.port, *options))

    def restart(self) -> None:
        """Stop, and start again a second later."""
        self._running.close()
        time.sleep(1)
        self.start()

    def stop(self) -> None:
        """Stop for good."""
        self._running.close()


@contextmanager
def _running() -> Iterator[Chaos]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sutra-chaos-")))
        server = Server(folder)
        stack.callback(server.stop)
        # 14 tokens a task: some 60 tasks a second and device.
        options = Settings(engine="simulated", simulated_per_token_s=0.0012, broker_url=server.start())
        os.environ["SUTRA_BROKER_URL"] = options.broker_url or ""
        settings.cache_clear()
        devices = plan_devices(host="chaos", engine="simulated", gpus=(), cores=2, wanted=DEVICES)
        faulty = [sys.executable, "-m", "scripts.benchmarks.chaos_device"]
        specs = [
            replace(spec, command=faulty, environ={**spec.environ, "CHAOS_FOLDER": str(folder)})
            if spec.device_id
            else spec
            for spec in worker_specs(options, devices)
        ]
        log = stack.enter_context((folder / "workers.log").open("ab"))
        output = {spec.name: log for spec in specs}
        supervisor = stack.enter_context(fleet(options, specs, report=lambda _: None, output=output))
        await_devices(supervisor, options, devices)
        ended = threading.Event()

        def look() -> None:
            while not ended.is_set():
                ended.wait(supervisor.step(time.monotonic()))

        looking = threading.Thread(target=look)
        looking.start()
        stack.callback(looking.join)
        stack.callback(ended.set)
        client = redis.Redis(port=server.port, socket_timeout=30, retry_on_timeout=True)
        names = [device.id for device in devices]
        yield Chaos(options, client, folder, server, supervisor, names, random.Random(SEED))  # noqa: S311


def run(*, quick: bool) -> dict[str, Any]:
    """Run the benchmark."""
    chosen = {"kill_device": 2, "kill_router": 1, "raise": 1} if quick else FAULTS
    tasks = 500 if quick else TASKS
    with _running() as chaos:
        plan = [name for name, count in chosen.items() for _ in range(count)]
        chaos.draw.shuffle(plan)
        plan.sort(key=lambda name: name != "hang_device")  # it takes longest to be noticed
        over, finished = threading.Event(), threading.Event()
        failed: list[BaseException] = []

        def disturb() -> None:
            try:
                for name in plan:
                    _disturb(chaos, name)
            except BaseException as error:  # noqa: BLE001 - raised below, in the main thread
                failed.append(error)
            finally:
                over.set()
            finished.wait()  # a server ends with the thread that started it

        began = time.monotonic()
        disturbing = threading.Thread(target=disturb)
        disturbing.start()
        try:
            found = _work(chaos, tasks, over)
        finally:
            finished.set()
            disturbing.join()
        if failed:
            raise failed[0]
        recovery = chaos.recovery_s
        return {
            **found,
            "faults": sum(chaos.faults.values()),
            "faults_by_name": dict(chaos.faults),
            "recovery_s": {
                "p50": percentile(recovery, 0.5),
                "p95": percentile(recovery, 0.95),
                "max": max(recovery),
            },
            "seconds": time.monotonic() - began,
            "seed": SEED,
        }


def _disturb(chaos: Chaos, name: str) -> None:
    print(f"  fault {sum(chaos.faults.values()) + 1}: {name}", flush=True)
    if name in ("raise", "die"):
        chaos.special.append(f"{name} {sum(chaos.faults.values())}")
    else:
        action: Callable[[], None] = getattr(chaos, name)
        action()
    chaos.faults[name] += 1
    time.sleep(PAUSE_S)


def _work(chaos: Chaos, tasks: int, over: threading.Event) -> dict[str, int]:
    """Keep tasks in flight until there were enough faults and tasks; compare every answer."""
    sent: deque[tuple[str, Any]] = deque()
    found = {"tasks": 0, "lost": 0, "wrong": 0}
    number = 0
    while not over.is_set() or number < tasks:
        if len(sent) >= IN_FLIGHT:
            _receive(*sent.popleft(), found)
        number += 1
        text = chaos.special.popleft() if chaos.special else f"text {number} " + "w " * 10
        sent.append((text, _send(text)))
    while sent:
        _receive(*sent.popleft(), found)
    return found


def _send(text: str) -> Any:
    while True:
        try:
            return embed.delay(text)
        except (ServerUnavailableError, OperationalError, redis.RedisError):
            time.sleep(0.2)  # away, or full: the caller was told, and tries again


def _receive(text: str, result: Any, found: dict[str, int]) -> None:
    found["tasks"] += 1
    expected: type[Exception] | None = {"raise": EncodingError, "die": PoisonMessageError}.get(
        text.split(maxsplit=1)[0]
    )
    try:
        vector = result.get(timeout=LONGEST_S)
    except WaitedTooLong:
        found["lost"] += 1
        print(f"  lost: {text[:20]}", flush=True)
    except Exception as error:  # noqa: BLE001 - any error but the text's own is wrong
        if expected is None or not isinstance(error, expected):
            found["wrong"] += 1
            print(f"  wrong: {text[:20]} {error!r}", flush=True)
    else:
        cosine = float(np.dot(vector, vectors_of([text], len(vector))[0]))
        if expected is not None or not cosine >= 0.99999:
            found["wrong"] += 1
            print(f"  wrong: {text[:20]} cosine {cosine}", flush=True)
