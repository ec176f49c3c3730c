"""Fleets where users put them: behind TLS, with an ACL, under Sentinels, in a foreign environment."""

import os
import re
import subprocess
import sys
import tempfile
import threading
import urllib.request
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from sutra_tasks import EmbedResult, MissingRightsError, ServerUnavailableError, distill, embed, keys
from sutra_tasks.engines.simulated_engine import vectors_of
from sutra_tasks.host.embedded_server import embedded_server, free_port
from sutra_tasks.host.processes import spawn, stop
from sutra_tasks.rights import ROLES
from sutra_tasks.settings import Settings
from sutra_tasks.streaming.client.producer import StreamProducer
from sutra_tasks.streaming.client.reader import StreamReader
from tests.conftest import wait_until
from tests.servers import Certificates, tls_front, watched
from tests.system.conftest import BRISK, ROOT, environment
from tests.system.local_fleet import local_fleet
from tests.system.test_distill_worker import add_texts, recipe
from tests.system.tiny_models import KINDS, build

SUTRA = str(Path(sys.executable).with_name("sutra"))
PASSWORD = "p@ss/w"
QUOTED = "p%40ss%2Fw"
LONG_TEXT = "many words in a long text " * 3_000
FOREIGN = {
    "CELERY_BROKER_URL": "amqp://nobody@127.0.0.1:1//", "CELERY_RESULT_BACKEND": "django-db",
    "CELERY_BROKER_READ_URL": "amqp://127.0.0.1:1", "CELERY_BROKER_WRITE_URL": "amqp://127.0.0.1:1",
    "CELERY_CONFIG_MODULE": "no_such_module", "CELERY_LOADER": "default", "CELERY_APP": "no_such_app",
    "CELERY_WORKER_POOL": "prefork", "CELERY_WORKER_CONCURRENCY": "3", "CELERY_WORKER_QUEUES": "host",
    "CELERY_WORKER_HOSTNAME": "host@h", "CELERY_BEAT_SCHEDULER": "no_such_module:Scheduler",
    "CELERY_WORKDIR": "/nonexistent", "FORKED_BY_MULTIPROCESSING": "1",
    "APP": "no_such_app", "BROKER_URL": "amqp://127.0.0.1:1", "RESULT_BACKEND": "rpc://",
    "SUTRA_PORT": "tcp://10.0.0.11:6379", "SUTRA_SERVICE_HOST": "10.0.0.11",
    "SUTRA_REDIS_SERVICE_PORT": "6379", "SUTRA_BROKER_URL_PORT_6379_TCP": "tcp://10.0.0.11:6379",
    "FLOWER_PORT": "tcp://10.0.0.12:5555",
}  # fmt: skip


def acl_file(folder: Path) -> str:
    """Return a file with the documented users, with a password."""
    text = (ROOT / "docs" / "acl" / "sutra.acl").read_text()
    path = folder / "users.acl"
    path.write_text(text.replace(" off resetpass ", f" on >{PASSWORD} "))
    return str(path)


def urls(options: Settings) -> dict[str, str]:
    return {"SUTRA_BROKER_URL": str(options.broker_url), "SUTRA_RESULT_URL": str(options.results)}


def port_of(address: str) -> int:
    return int(address.rsplit(":", 1)[1].partition("/")[0])


def denials(client: redis.Redis) -> list[tuple[str, str, str]]:
    found = client.execute_command("ACL", "LOG")
    rows = [
        one if isinstance(one, dict) else dict(zip(one[::2], one[1::2], strict=True)) for one in found
    ]
    return [tuple(str(_text(row, name)) for name in ("username", "reason", "object")) for row in rows]  # type: ignore[misc]


def _text(row: dict[Any, Any], name: str) -> str:
    value = row.get(name, row.get(name.encode()))
    return value.decode() if isinstance(value, bytes) else str(value)


@contextmanager
def guarded_servers(folder: Path):
    """Run a broker behind TLS that asks for certificates, and a results server on a socket.

    Yields:
        Settings by role, and a client of each server that may do everything.
    """
    socket, users = folder / "r.sock", acl_file(folder)
    certificates = Certificates.make(folder, "localhost")
    with ExitStack() as running:
        broker = running.enter_context(embedded_server(None, "--aclfile", users))
        results = running.enter_context(
            embedded_server(None, "--aclfile", users, "--unixsocket", str(socket))
        )
        port = running.enter_context(tls_front(port_of(broker), certificates, asks_client=True))
        tls = (
            f"ssl_cert_reqs=CERT_REQUIRED&ssl_ca_certs={certificates.ca}"
            f"&ssl_certfile={certificates.client}&ssl_keyfile={certificates.client_key}"
        )
        options = {
            role: Settings(
                broker_url=f"rediss://sutra-{role}:{QUOTED}@localhost:{port}/0?{tls}",
                result_url=f"unix://sutra-{role}:{QUOTED}@{socket}?db=0",
            )
            for role in ROLES
        }
        clients = [running.enter_context(redis.Redis.from_url(one)) for one in (broker, results)]
        yield options, clients


def test_each_role_does_its_work_with_its_least_rights(tmp_path):
    with guarded_servers(tmp_path) as (options, (broker, results)):
        environs = {
            "router": urls(options["router"]),
            "t-sim0": urls(options["device"]),
            "t-sim1": urls(options["device"]),
        }
        of_fleet = replace(options["operator"], **BRISK, fanout_chunks=2, stream_claim_s=0.5)
        with (
            local_fleet(
                of_fleet, broker, tmp_path, devices=2, environs=environs, results=results
            ) as fleet,
            environment(**urls(options["client"])),
        ):
            answers = [embed.delay(f"text {n}") for n in range(50)]
            for n, answer in enumerate(answers):
                assert np.allclose(answer.get(timeout=30), vectors_of([f"text {n}"], 384)[0], atol=1e-2)
            assert embed.delay(LONG_TEXT).get(timeout=30).shape == (384,)
            dropped = embed.delay("dropped")
            dropped.revoke()
            with StreamProducer("s", options=options["client"]) as producer:
                producer.send_many(f"entry {n}" for n in range(20))
            read: set[str] = set()
            with StreamReader("s", timeout_s=20, options=options["reader"]) as reader:
                for response in reader:
                    read.update(response.chunk_ids)
                    if len(read) == 20:
                        break
            status = run_cli("status", options["operator"])
            assert status.returncode == 0, status.stderr
            assert "t-sim0" in status.stdout
            with flower(options["operator"]) as shown:
                wait_until(lambda: "sutra.embed" in shown("/broker"), within_s=60)
            beat_sends(options["operator"], broker, tmp_path)
            os.kill(fleet.pid("t-sim1"), 9)  # its supervisor reaps it
            fleet.await_replacement("t-sim1", 0)
        assert denials(broker) == []
        assert denials(results) == []
        assert PASSWORD not in fleet.log.read_text()
        assert QUOTED not in fleet.log.read_text()


def test_a_distill_worker_does_its_work_with_its_least_rights(tmp_path):
    for name in ("texts", "models", "servers"):
        (tmp_path / name).mkdir()
    add_texts(tmp_path / "texts", 0)
    of_run = {
        "model": build(replace(KINDS["bert"], hidden=64), tmp_path / "teacher"), "sample_texts": 100,
        "data_dir": str(tmp_path / "texts"), "models_dir": str(tmp_path / "models"),
        "distill_threads": 1,
    }  # fmt: skip
    with guarded_servers(tmp_path / "servers") as (options, (broker, results)):
        of_fleet = replace(options["operator"], **BRISK, **of_run)
        environs = {name: urls(options[name]) for name in ("router", "distill")}
        with (
            local_fleet(of_fleet, broker, tmp_path, devices=0, environs=environs, results=results),
            environment(**urls(options["client"])),
        ):
            made = distill.delay(recipe(of_fleet, student="projection", layers=None, sample=True))
            assert made.get(timeout=90)
        assert denials(broker) == []
        assert denials(results) == []


@contextmanager
def flower(options: Settings):
    """Run Flower as the README starts it; gives a function that returns a page."""
    port = free_port()
    command = [
        sys.executable, "-m", "celery", "-A", "sutra_tasks", "flower", "--address=127.0.0.1",
        f"--port={port}",
    ]  # fmt: skip

    def get(path: str) -> str:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
                return str(answer.read().decode())
        except OSError:
            return ""

    process = spawn(command, environ={**os.environ, **urls(options)}, output=subprocess.DEVNULL)
    try:
        yield get
    finally:
        stop(process, 10)


def beat_sends(options: Settings, broker: redis.Redis, folder: Path) -> None:
    """Run beat as the README starts it, until it has sent something."""
    (folder / "recipe.json").write_text("{}")
    every = {"SUTRA_DISTILL_EVERY_S": "0.5", "SUTRA_DISTILL_CONFIG": str(folder / "recipe.json")}
    command = [
        sys.executable, "-m", "celery", "-A", "sutra_tasks", "beat", "--pidfile=",
        f"--schedule={folder / 'schedule'}",
    ]  # fmt: skip
    environ = {**os.environ, **urls(options), **every}
    process = spawn(command, environ=environ, output=subprocess.DEVNULL)
    try:
        wait_until(lambda: broker.llen(keys.DISTILL_QUEUE))
    finally:
        stop(process, 10)
    broker.delete(keys.DISTILL_QUEUE)


def run_cli(command: str, options: Settings, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SUTRA, command, *more],
        env={**os.environ, **urls(options), "SUTRA_ENGINE": "simulated"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def run_role(role: str, options: Settings) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sutra_tasks.roles", role],
        env={**os.environ, **urls(options), "SUTRA_ENGINE": "simulated"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def app_user():
    """Run a server for tests that change what its user ``app`` may do."""
    with embedded_server() as address, redis.Redis.from_url(address) as client:
        yield client, f"redis://app:{QUOTED}@127.0.0.1:{port_of(address)}/0"


LACKS = [
    (["~*", "+@all"], "channels? celery-task-meta-\\*, /0\\.celery\\.pidbox"),
    (["~*", "&*", "+@all", "-publish"], "command publish"),
    (["~*", "&*", "+@all", "-evalsha", "-eval"], "command"),
    (["~sutra*", "&*", "+@all"], "keys? .*celery-task-meta-\\*"),
]


@pytest.mark.parametrize(("rules", "named"), LACKS, ids=["channels", "command", "scripts", "keys"])
def test_a_worker_without_a_right_ends_with_the_sentence_that_names_it(app_user, rules, named):
    admin, url = app_user
    admin.execute_command("ACL", "SETUSER", "app", "reset", "on", f">{PASSWORD}", *rules)
    ended = run_role("router", Settings(broker_url=url))
    assert ended.returncode != 0
    said = ended.stderr.strip().splitlines()[-1]
    assert said.startswith(
        "router cannot start: the user 'app' of the server of SUTRA_BROKER_URL may not"
    )
    assert "ACL SETUSER app" in said
    assert re.search(named, said), said
    assert "Traceback" not in ended.stderr


def test_sutra_up_and_clients_say_what_is_missing(app_user):
    admin, url = app_user
    admin.execute_command("ACL", "SETUSER", "app", "reset", "on", f">{PASSWORD}", "~*", "+@all")
    ended = run_cli("up", Settings(broker_url=url, engine="simulated"))
    assert ended.returncode == 1
    assert "&celery-task-meta-*" in ended.stderr
    assert PASSWORD not in ended.stderr
    with environment(SUTRA_BROKER_URL=url), pytest.raises(MissingRightsError) as refused:
        embed.delay("a").get(timeout=20)
    assert "&celery-task-meta-*" in refused.value.missing


def test_a_refused_login_is_told_without_the_password(app_user):
    admin, url = app_user
    admin.execute_command("ACL", "SETUSER", "app", "reset", "on", ">other", "~*", "&*", "+@all")
    for ended in (
        run_role("router", Settings(broker_url=url)),
        run_cli("status", Settings(broker_url=url)),
    ):
        assert ended.returncode != 0
        assert "the server refuses the login" in ended.stderr
        assert PASSWORD not in ended.stderr
        assert QUOTED not in ended.stderr


def test_a_fleet_goes_on_after_a_failover(tmp_path):
    with watched(tmp_path) as servers:
        options = replace(Settings(broker_url=servers.url), **BRISK)
        with (
            redis.Redis(port=servers.primary_port()) as client,
            local_fleet(options, client, tmp_path) as fleet,
            environment(SUTRA_BROKER_URL=servers.url),
        ):
            assert embed.delay("before").get(timeout=30).shape == (384,)
            servers.fail_over()
            with redis.Redis(port=servers.primary_port()) as promoted:
                fleet.client = promoted
                wait_until(lambda: promoted.info("replication")["role"] == "master")
                answers = [_sent(f"after {n}") for n in range(20)]
                assert all(answer.get(timeout=60).shape == (384,) for answer in answers)
                assert fleet.reports == []


def _sent(text: str):
    """Send a text as an application does that repeats a call when the server is away."""
    sent: list[EmbedResult] = []

    def send() -> bool:
        try:
            sent.append(embed.delay(text))
        except ServerUnavailableError:
            return False
        return True

    wait_until(send, within_s=60)
    return sent[0]


def _demote(client: redis.Redis) -> None:
    client.replicaof("127.0.0.1", free_port())


def _promote(client: redis.Redis) -> None:
    client.replicaof("NO", "ONE")


def _fail_to_save(client: redis.Redis) -> None:
    with tempfile.TemporaryDirectory() as folder:
        client.config_set("dir", folder)
    client.config_set("save", "3600 1")
    client.bgsave()
    wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")


STATES = {
    "unable to save": (_fail_to_save, lambda client: client.config_set("save", ""), "MISCONF"),
    "demoted": (_demote, _promote, "read only replica"),
    "without replicas": (
        lambda client: client.config_set("min-replicas-to-write", 1),
        lambda client: client.config_set("min-replicas-to-write", 0),
        "NOREPLICAS|Not enough good replicas",
    ),
    "full": (
        lambda client: client.config_set("maxmemory", 1),
        lambda client: client.config_set("maxmemory", 0),
        "command not allowed when used memory",
    ),
}


def test_a_server_that_refuses_writes_is_told_in_its_own_words_and_survived(tmp_path):
    allowed = ("--enable-protected-configs", "yes", "--enable-debug-command", "yes")
    with embedded_server(None, *allowed) as address, redis.Redis.from_url(address) as client:
        options = replace(Settings(broker_url=address), **BRISK)
        with (
            local_fleet(options, client, tmp_path) as fleet,
            environment(SUTRA_BROKER_URL=address, SUTRA_MAX_QUEUE_S="0"),
        ):
            with _loading(client):
                assert _sent("while it loads").get(timeout=60).shape == (384,)
            for name, (begin, end, words) in STATES.items():
                assert embed.delay(f"before {name}").get(timeout=30).shape == (384,)
                begin(client)
                try:
                    with pytest.raises(ServerUnavailableError, match=words):
                        embed.delay("refused")
                finally:
                    end(client)
                assert embed.delay(f"after {name}").get(timeout=60).shape == (384,)
            assert fleet.reports == []


@contextmanager
def _loading(client: redis.Redis):
    """Let the server load its data again, which takes some seconds, for the length of a block."""
    client.config_set("key-load-delay", 100_000)  # microseconds
    client.config_set("loading-process-events-interval-bytes", 1024)
    client.mset({f"filler-{n}": os.urandom(2000) for n in range(20)})  # which does not compress
    with redis.Redis(port=port_of_client(client), socket_timeout=60) as reloading:
        thread = threading.Thread(target=reloading.execute_command, args=("DEBUG", "RELOAD"))
        thread.start()

        def loads() -> bool:
            with redis.Redis(port=port_of_client(client), retry=Retry(NoBackoff(), 0)) as asking:
                try:
                    asking.ping()
                except redis.BusyLoadingError:
                    return True
            return False

        try:
            wait_until(loads)
            yield
        finally:
            thread.join()
            client.delete(*(f"filler-{n}" for n in range(20)))


def port_of_client(client: redis.Redis) -> int:
    return int(client.connection_pool.connection_kwargs["port"])


def test_a_server_that_evicts_is_warned_of_at_start(tmp_path):
    with embedded_server(None, "--maxmemory-policy", "allkeys-lru") as address:
        options = replace(Settings(broker_url=address), **BRISK)
        with (
            redis.Redis.from_url(address) as client,
            local_fleet(options, client, tmp_path) as fleet,
        ):
            assert "maxmemory-policy allkeys-lru" in fleet.log.read_text()


def test_a_node_of_a_cluster_is_refused_by_name(tmp_path):
    with embedded_server(None, "--cluster-enabled", "yes") as address:
        options = Settings(broker_url=address)
        for ended in (run_role("router", options), run_cli("status", options)):
            assert ended.returncode != 0
            assert "Redis Cluster is not supported" in ended.stderr


CALL = """
import os
from sutra_tasks import app, embed
assert embed.app is app, embed.app
assert not app.conf.broker_url.startswith("amqp"), app.conf.broker_url
print(embed.delay("text").get(timeout=30).shape[0])
"""


def test_a_foreign_environment_changes_nothing(start_fleet, client, monkeypatch, tmp_path):
    for name, text in FOREIGN.items():
        monkeypatch.setenv(name, text)
    with start_fleet() as fleet:
        clean = {**os.environ, "SUTRA_BROKER_URL": fleet.options.broker_url}
        called = subprocess.run(
            [sys.executable, "-c", CALL], env=clean, cwd=ROOT, capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip
        assert called.stdout.strip() == "384", called.stderr
        beat = [
            sys.executable, "-m", "celery", "-A", "sutra_tasks", "inspect", "--timeout=5", "ping",
        ]  # fmt: skip
        # The `celery` command changes to this folder before it knows the app.
        clean.pop("CELERY_WORKDIR")
        monkeypatch.delenv("CELERY_WORKDIR")
        pinged = subprocess.run(
            beat, env=clean, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
        assert "pong" in pinged.stdout, pinged.stderr
        worker = [
            sys.executable,
            "-m",
            "celery",
            "-A",
            "workers.router",
            "worker",
            "--hostname=second@t",
        ]
        process = spawn(worker, environ=clean, output=subprocess.DEVNULL)
        try:
            wait_until(lambda: len(fleet.status().routers) == 2, within_s=60)
        finally:
            stop(process, 20)
        beat_sends(Settings(broker_url=fleet.options.broker_url), client, tmp_path)
        assert fleet.reports == []
