"""Random faults under load: whether a task is lost or wrong, and how long recovery takes.

Four simulated devices, two routers and a server with an append-only file run with default settings,
while a client keeps 2,000 tasks in flight and compares every vector. ``recovery_s`` is the time from the
kill of devices to the client's last answer to the messages that they had in flight or in their queues.
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
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
import redis
from celery.exceptions import TimeoutError as NotYet

from scripts.benchmarks.report import percentile
from sutra_tasks import EncodingError, FleetSaturated, PoisonMessageError, embed, keys
from sutra_tasks.broker.dead_letters import dead_letters
from sutra_tasks.broker.queues import lanes
from sutra_tasks.engines.simulated_engine import vectors_of
from sutra_tasks.errors import ServerUnavailableError
from sutra_tasks.health.states import DeviceState
from sutra_tasks.host.embedded_server import embedded_server, free_port
from sutra_tasks.host.hardware import plan_devices
from sutra_tasks.host.local_fleet import await_devices, run_workers
from sutra_tasks.host.supervisor import Supervisor, worker_specs
from sutra_tasks.membership.fleet import FleetMember, fleet_members
from sutra_tasks.settings import Settings, settings

DEVICES: Final = 4
ROUTERS: Final = ("router", "router2")
IN_FLIGHT: Final = 2_000
TASKS: Final = 20_000
PER_TOKEN_S: Final = 0.0003
WORDS: Final = 40
"""42 tokens a task with the special ones: some 80 tasks a second and device."""

RAISING: Final = 200
"""One task in this many has a text that cannot be embedded."""

LOST_S: Final = 180.0
"""A task that takes longer counts as lost; a hung device is detected after 120 seconds."""

LOOPBACK: Final = "127.0.0.1"
AGREEMENT: Final = 0.99999
FAULTS: Final = {
    "kill_device": 15, "kill_device_before_a_full_queue": 2, "kill_all_devices": 2, "kill_router": 3,
    "kill_all_routers": 1, "terminate_device": 3, "stop_device_past_its_lease": 2,
    "stop_device_briefly": 2, "restart_server": 3, "pause_server": 2, "fill_memory": 2,
    "give_no_numbers": 2, "hang": 1, "end_the_process": 2, "flush_scripts": 3, "drop_connections": 3,
    "fail_over": 3,
}  # fmt: skip
QUICK: Final = {
    "kill_device": 2, "kill_router": 1, "terminate_device": 1, "restart_server": 1, "fill_memory": 1,
    "flush_scripts": 1, "drop_connections": 1, "fail_over": 1,
}  # fmt: skip


def run(*, quick: bool) -> dict[str, Any]:
    """Run the benchmark; ``CHAOS_SEED`` in the environment repeats the choices of an earlier run."""
    seed = int(os.environ.get("CHAOS_SEED") or time.time())
    print(f"seed {seed}", flush=True)
    draw = random.Random(seed)  # noqa: S311 - it draws faults
    chosen = QUICK if quick else FAULTS
    plan = [name for name, count in chosen.items() for _ in range(count)]
    draw.shuffle(plan)
    # The hang comes early: it takes longest to be detected, and other faults run meanwhile.
    plan.sort(key=lambda name: name != "hang")
    plan.insert(draw.randrange(len(plan) // 4 + 1), plan.pop(0))
    with _processes(draw) as chaos, _under_load(chaos.load, 500 if quick else TASKS):
        began = time.monotonic()
        for number, name in enumerate(plan):
            chaos.rest(draw.uniform(0.5, 2.0))
            at_s, answered = time.monotonic() - began, chaos.load.answered
            print(f"{at_s:5.0f} s {answered:6} answered; {number + 1:2}: {name}", flush=True)
            getattr(chaos, name)()
        chaos.await_due()
        load = chaos.load
        load.finish()
        remaining = chaos.remaining()
        seconds = time.monotonic() - began
    recovery_s = chaos.recovery_s
    return {
        "tasks": load.answered,
        "faults": len(plan),
        "lost": load.lost + remaining,
        "wrong": load.wrong,
        "recovery_s": {
            "p50": percentile(recovery_s, 0.5),
            "p95": percentile(recovery_s, 0.95),
            "max": max(recovery_s),
        },
        "kills": len(recovery_s),
        "recovered_tasks": chaos.recovered,
        "errors_of_their_own": load.failed,
        "refused_calls": load.refused,
        "tasks_per_s": load.answered / seconds,
        "seconds": seconds,
        "seed": seed,
        "faults_by_name": dict(sorted(Counter(plan).items())),
    }


class Load:
    """The client: it keeps tasks in flight, and compares each answer as it comes."""

    def __init__(self) -> None:
        self.answered = self.failed = self.lost = self.wrong = self.refused = 0
        self.tasks = 0
        self._numbers = 0
        self._special: deque[tuple[str, str]] = deque()
        self._pending: dict[str, tuple[str, Any, float, type[Exception] | None]] = {}
        self._arrived: deque[str] = deque()
        self._broken: BaseException | None = None
        self._last, self._ended = threading.Event(), threading.Event()

    def inject(self, text: str) -> str:
        """Send soon a text that has to become a dead letter; return its task's id."""
        task_id = f"special-{text.replace(' ', '-')}"
        self._special.append((task_id, text))
        return task_id

    def is_pending(self, task_ids: Sequence[str]) -> bool:
        """Return whether any of these tasks has no answer yet."""
        specials = {task_id for task_id, _ in self._special.copy()}
        return any(one in self._pending or one in specials for one in task_ids)

    def run(self) -> None:
        """Send until :meth:`finish`, and then receive the remaining answers."""
        try:
            while not (self._last.is_set() and self.answered >= self.tasks):
                self._send()
                if self._pending:
                    self._receive()
            while self._pending:
                self._receive()
        except BaseException as error:
            self._broken = error
            raise
        finally:
            self._ended.set()

    def finish(self) -> None:
        """Stop sending, wait until every task has its answer, and raise the thread's error."""
        self._last.set()
        self._ended.wait()
        if self._broken is not None:
            raise self._broken

    def _send(self) -> None:
        while len(self._pending) < IN_FLIGHT and not self._arrived:
            task_id: str | None = None
            expected: type[Exception] | None = None
            if self._special:
                task_id, text = self._special[0]
                expected = PoisonMessageError
            elif self._numbers % RAISING == RAISING - 1:
                text, expected = f"raise {self._numbers}", EncodingError
            else:
                text = f"text {self._numbers} " + "word " * (WORDS - 2)
            try:
                result = embed.apply_async((text,), task_id=task_id)
            except (ServerUnavailableError, FleetSaturated, redis.ResponseError):
                self.refused += 1  # the server is away, or the fleet or the server is full
                return
            self._pending[result.id] = (text, result, time.monotonic(), expected)
            result.then(lambda one: self._arrived.append(one.id))
            if task_id is None:
                self._numbers += 1
            else:
                self._special.popleft()

    def _receive(self) -> None:
        """Check the answers that arrive within 0.1 s."""
        oldest, (text, result, sent_at, _) = next(iter(self._pending.items()))
        with suppress(NotYet):
            result.get(timeout=0.1, propagate=False)
        if oldest not in self._arrived and time.monotonic() - sent_at > LOST_S:
            self.lost += 1
            print(f"  lost: {text[:20]} {oldest}", flush=True)
            del self._pending[oldest]
        while self._arrived:
            self._check(self._arrived.popleft())

    def _check(self, task_id: str) -> None:
        if task_id not in self._pending:
            return  # its answer was announced twice
        text, result, _, expected = self._pending.pop(task_id)
        self.answered += 1
        got = result.get(timeout=0, propagate=False)
        if isinstance(got, Exception):
            right = expected is not None and isinstance(got, expected)
            self.failed += right
        else:
            cosine = float(np.dot(got, vectors_of([text], len(got))[0]))
            right = expected is None and cosine >= AGREEMENT
        if not right:
            self.wrong += 1
            print(f"  wrong: {text[:20]} {task_id} {got!r}", flush=True)
        with suppress(redis.RedisError):
            result.forget()


@dataclass
class Chaos:
    """The processes under test; each method that ``FAULTS`` names is one fault."""

    options: Settings
    client: redis.Redis
    folder: Path
    server: Server
    supervisor: Supervisor
    devices: Sequence[str]
    draw: random.Random
    load: Load = field(default_factory=Load)
    recovery_s: list[float] = field(default_factory=list)
    recovered: int = 0
    _due: list[tuple[float, Callable[[], None]]] = field(default_factory=list)
    _away: set[str] = field(default_factory=set)
    _deadly: int = 0

    def kill_device(self) -> None:
        """Kill one device, whatever it is doing."""
        self._kill([self._victim()])

    def kill_device_before_a_full_queue(self) -> None:
        """Stop a device while its queue fills, then kill it."""
        self._kill([self._victim()], still_s=2.0)

    def kill_all_devices(self) -> None:
        """Kill all devices at once."""
        self._kill(self.devices)
        self._away.clear()

    def kill_router(self) -> None:
        """Kill a router, and with it a reaper."""
        self._end_router(self.draw.choice(ROUTERS))

    def kill_all_routers(self) -> None:
        """Kill all routers, and with them all reapers."""
        for name in ROUTERS:
            self._end_router(name)

    def terminate_device(self) -> None:
        """Send a device SIGTERM, so that it drains."""
        os.kill(self._pid(self._victim()), signal.SIGTERM)

    def stop_device_past_its_lease(self) -> None:
        """Stop a device until its lease has ended; continue it some time later."""
        self._stop(self.options.lease_s + 4)

    def stop_device_briefly(self) -> None:
        """Stop a device for less than its lease."""
        self._stop(self.draw.uniform(1, 5))

    def restart_server(self) -> None:
        """Stop the server for up to two seconds."""
        self.server.stop()
        time.sleep(self.draw.uniform(0, 2))
        self.server.start()

    def pause_server(self) -> None:
        """Pause the server: it answers no client for ten seconds."""
        self.client.client_pause(10_000)
        self.client.ping()

    def fill_memory(self) -> None:
        """Fill the server's memory for three seconds."""
        self.client.config_set("maxmemory", 1)
        time.sleep(3)
        self.client.config_set("maxmemory", 0)

    def flush_scripts(self) -> None:
        """Let the server forget its scripts."""
        self.client.script_flush()

    def drop_connections(self) -> None:
        """Close every connection to the server."""
        for kind in ("normal", "pubsub"):
            self.client.client_kill_filter(_type=kind, skipme=True)

    def fail_over(self) -> None:
        """Replace the server by its replica, which is read-only at first, under the same address."""
        self.server.fail_over()

    def give_no_numbers(self) -> None:
        """Make a device return NaN, until it is replaced after its state is unhealthy."""
        name = self._victim()
        (self.folder / f"{name}.nan").touch()
        self._await(lambda: self._state(name) is DeviceState.UNHEALTHY, 20, "NaN was not noticed")

        def replace_it() -> None:
            (self.folder / f"{name}.nan").unlink()
            _send_signal(self._pid(name), signal.SIGTERM)

        self._at(3, replace_it)

    def hang(self) -> None:
        """Hang one call of an engine."""
        name = self._victim()
        (self.folder / f"{name}.hang").touch()
        self._away.add(name)
        self._at(self.options.batch_timeout_s + 10, lambda: self._away.discard(name))

    def end_the_process(self) -> None:
        """Send a text that kills each worker that computes it, until it is a dead letter."""
        self._deadly += 1
        task_id = self.load.inject(f"die {self._deadly}")
        self._await(lambda: not self.load.is_pending([task_id]), LOST_S, "it is no dead letter")

    def rest(self, seconds: float) -> None:
        """Wait, and run the actions that become due."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for one in [one for one in self._due if one[0] <= time.monotonic()]:
                self._due.remove(one)
                one[1]()
            time.sleep(0.01)

    def await_due(self) -> None:
        """Wait until all actions have become due and run."""
        while self._due:
            self.rest(0.1)

    def remaining(self) -> int:
        """Count the messages on the server when every task has its answer."""
        patterns = (keys.EMBED_QUEUE, keys.DEVICE_QUEUE_PREFIX, keys.in_flight(""))
        letters = {one.task_id for one in dead_letters(self.client)}
        assert len(letters) == self._deadly, letters

        def lists() -> list[bytes]:
            return [name for one in patterns for name in self.client.scan_iter(f"{one}*", count=1000)]

        deadline = time.monotonic() + 20  # messages that were computed twice may still be acknowledged
        while (found := lists()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return sum(int(self.client.llen(name)) for name in found)

    def _kill(self, names: Sequence[str], *, still_s: float = 0.0) -> None:
        pids = [self._pid(name) for name in names]
        for pid in pids:
            _send_signal(pid, signal.SIGSTOP)  # so that the messages read next are those it dies with
        for pid in pids:
            with suppress(psutil.NoSuchProcess):
                while psutil.Process(pid).status() not in (
                    psutil.STATUS_STOPPED,
                    psutil.STATUS_ZOMBIE,
                ):
                    time.sleep(0.001)
        time.sleep(still_s)
        tasks = [task for name in names for task in self._tasks_of(name)]
        for pid in pids:
            _send_signal(pid, signal.SIGKILL)
        began = time.monotonic()
        self._await(lambda: not self.load.is_pending(tasks), LOST_S, "tasks of a killed device are lost")
        if tasks:
            self.recovery_s.append(time.monotonic() - began)
            self.recovered += len(tasks)
            print(f"       {len(tasks)} tasks answered after {self.recovery_s[-1]:.1f} s", flush=True)

    def _tasks_of(self, name: str) -> list[str]:
        """Return the ids of the tasks that a device has in flight or in its queue."""
        record: Any = self.client.get(keys.device(name))
        if record is None:
            return []
        lists = [keys.in_flight(json.loads(record)["incarnation"]), *lanes(keys.device_queue(name))]
        messages = [message for one in lists for message in self.client.lrange(one, 0, -1)]
        return [json.loads(message)["headers"]["id"] for message in messages]

    def _end_router(self, name: str) -> None:
        os.kill(self._pid(name), signal.SIGKILL)

    def _stop(self, seconds: float) -> None:
        name = self._victim()
        pid = self._pid(name)
        os.kill(pid, signal.SIGSTOP)
        self._away.add(name)

        def go_on() -> None:
            self._away.discard(name)
            _send_signal(pid, signal.SIGCONT)

        self._at(seconds, go_on)

    def _victim(self) -> str:
        """Return a working device, as soon as most devices work, so that faults do not pile up."""
        self._await(
            lambda: len(self._working()) >= DEVICES - 1 - len(self._away), 60, "devices stay away"
        )
        return self.draw.choice(self._working())

    def _working(self) -> list[str]:
        return [
            one.id
            for one in self._seen()
            if one.heartbeat_age_s <= self.options.device_ttl_s
            and one.record is not None
            and one.record.state is DeviceState.HEALTHY
            and one.record.pid == self.supervisor.pids.get(one.id)
            and one.id not in self._away
        ]

    def _state(self, name: str) -> DeviceState | None:
        found = [one.record for one in self._seen() if one.id == name]
        return found[0].state if found and found[0] else None

    def _seen(self) -> list[FleetMember]:
        return fleet_members(self.client)

    def _pid(self, name: str) -> int:
        self._await(lambda: name in self.supervisor.pids, 60, f"{name} does not start")
        return self.supervisor.pids[name]

    def _at(self, seconds: float, action: Callable[[], None]) -> None:
        self._due.append((time.monotonic() + seconds, action))

    def _await(self, condition: Callable[[], bool], within_s: float, otherwise: str) -> None:
        deadline = time.monotonic() + within_s
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(otherwise)
            self.rest(0.01)


class Server:
    """A server that keeps its port and its data over restarts."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._folder, self._running = folder, ExitStack()

    def start(self, *more: str) -> str:
        """Start with further options, and return the address."""
        options = ("--appendonly", "yes", "--appendfsync", "no", "--dir", str(self._folder), *more)
        return self._running.enter_context(embedded_server(self.port, *options))

    def stop(self) -> None:
        """Stop, in order."""
        self._running.close()

    def fail_over(self) -> None:
        """Hand all data to a replica, end, and let a replica of that replica take over the address."""
        port = free_port()
        with (
            embedded_server(port, "--replicaof", LOOPBACK, str(self.port)),
            redis.Redis(port=self.port) as primary,
            redis.Redis(port=port) as replica,
        ):
            _await_replica(primary, replica)
            primary.client_pause(20_000, all=False)  # no write is confirmed that the replica lacks
            _await_replica(primary, replica)
            self.stop()
            replica.replicaof("NO", "ONE")
            self.start("--replicaof", LOOPBACK, str(port))
            _await_replica(replica, primary)
            primary.replicaof("NO", "ONE")


def _await_replica(primary: redis.Redis, replica: redis.Redis) -> None:
    """Wait until a replica has all that its primary has."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with suppress(redis.RedisError):
            ahead: Any = primary.info("replication")
            behind: Any = replica.info("replication")
            up = behind.get("master_link_status") == "up"
            if up and ahead["master_repl_offset"] == behind["slave_repl_offset"]:
                return
        time.sleep(0.02)
    raise TimeoutError("the replica does not catch up")


def _send_signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):  # something else ended it
        os.kill(pid, number)


@contextmanager
def _under_load(load: Load, tasks: int) -> Iterator[None]:
    """Run the client in a thread of its own."""
    load.tasks = tasks
    running = threading.Thread(target=load.run, daemon=True)
    running.start()
    yield
    running.join()


@contextmanager
def _processes(draw: random.Random) -> Iterator[Chaos]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sutra-chaos-")))
        server = Server(folder)
        stack.callback(server.stop)
        options = Settings(
            engine="simulated", simulated_per_token_s=PER_TOKEN_S, broker_url=server.start()
        )
        os.environ["SUTRA_BROKER_URL"] = options.broker_url or ""
        settings.cache_clear()
        devices = plan_devices(host="chaos", engine="simulated", gpus=(), cores=2, count=DEVICES)
        router, *others = worker_specs(options, devices)
        faulty = [sys.executable, "-m", "scripts.benchmarks.chaos_device"]
        specs = [
            # Each router has its own node name, as if it ran on its own host.
            *(replace(router, name=name, command=[*router.command, "--hostname", f"{name}@chaos"])
              for name in ROUTERS),
            *(replace(one, command=faulty, environ={**one.environ, "CHAOS_FOLDER": str(folder)})
              for one in others),
        ]  # fmt: skip
        log = stack.enter_context((folder / "workers.log").open("ab"))
        output = {spec.name: log for spec in specs}
        supervisor = stack.enter_context(
            run_workers(options, specs, report=lambda _: None, output=output)
        )
        await_devices(supervisor, options, devices)
        ended = threading.Event()

        def supervise() -> None:
            while not ended.is_set():
                ended.wait(supervisor.step(time.monotonic()))

        supervising = threading.Thread(target=supervise)
        supervising.start()
        stack.callback(supervising.join)
        stack.callback(ended.set)
        client = redis.Redis(port=server.port, socket_timeout=30)
        names = [device.id for device in devices]
        yield Chaos(options, client, folder, server, supervisor, names, draw)
