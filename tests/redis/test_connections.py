"""Every client connects to every form of address: redis-py's, kombu's in both transports, Celery's."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import pytest
import redis
from celery import states
from kombu.utils import json as kombu_json

from sutra_tasks.app import Sutra
from sutra_tasks.broker.queues import new_incarnation
from sutra_tasks.celery_settings import celery_settings
from sutra_tasks.connections import async_broker_client, broker_client, results_client
from sutra_tasks.errors import SettingsError
from sutra_tasks.host.embedded_server import embedded_server
from sutra_tasks.settings import Settings
from tests.conftest import disconnect
from tests.redis.peers import Receiver
from tests.servers import Certificates, tls_front, watched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

WORKER_BACKEND = "sutra_tasks.broker.result_backend:ResultBackend"
PASSWORD = "p@s/s:#?% w"
QUOTED = "p%40s%2Fs%3A%23%3F%25%20w"


class Servers:
    """One server, reached in every form; addresses by the name of the form."""

    def __init__(self, running: ExitStack, folder: Path) -> None:
        socket = folder / "v.sock"
        listening = ("--unixsocket", str(socket), "--bind", "127.0.0.1 -::1")
        plain = running.enter_context(embedded_server(None, *listening))
        with redis.Redis.from_url(plain) as client:
            client.acl_setuser(
                "app", enabled=True, passwords=[f"+{PASSWORD}"], keys=["*"], channels=["*"],
                categories=["+@all"],
            )  # fmt: skip
        port = int(plain.rsplit(":", 1)[1].partition("/")[0])
        certificates = Certificates.make(folder, "localhost")
        self.certificates = certificates
        self.tls_port = running.enter_context(tls_front(port, certificates))
        strict_port = running.enter_context(tls_front(port, certificates, asks_client=True))
        ca = f"ssl_ca_certs={certificates.ca}"
        own = f"ssl_certfile={certificates.client}&ssl_keyfile={certificates.client_key}"
        self.port, self.strict_port = port, strict_port
        self.urls = {
            "redis": plain,
            "valkey": f"valkey://localhost:{port}/1",
            "ipv6": f"redis://[::1]:{port}/0",
            "acl": f"redis://app:{QUOTED}@127.0.0.1:{port}/0",
            "socket": f"unix://{socket}?db=1",
            "celery-socket": f"redis+socket://app:{QUOTED}@{socket}?virtual_host=2",
            "tls": f"rediss://localhost:{self.tls_port}/0?{ca}",
            "celery-tls": f"rediss://localhost:{self.tls_port}/0?ssl_cert_reqs=CERT_REQUIRED&{ca}",
            "client-certificate": f"valkeys://localhost:{strict_port}/0?ssl_cert_reqs=required&{ca}&{own}",
            "other-name": f"rediss://127.0.0.1:{self.tls_port}/0?{ca}&ssl_check_hostname=false",
            "unchecked": f"rediss://127.0.0.1:{self.tls_port}/0?ssl_cert_reqs=none",
            "options": f"{plain}?health_check_interval=30&socket_timeout=5&client_name=web&protocol=2",
            "resp3": f"{plain}?protocol=3&retry_on_timeout=true&max_connections=20&socket_keepalive=no",
        }
        self.urls["sentinel"] = running.enter_context(watched(folder)).url


FORMS = (
    "redis", "valkey", "ipv6", "acl", "socket", "celery-socket", "tls", "celery-tls",
    "client-certificate", "other-name", "unchecked", "options", "resp3", "sentinel",
)  # fmt: skip


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with ExitStack() as running:
        yield Servers(running, tmp_path_factory.mktemp("s"))


@pytest.fixture(params=FORMS)
def options(request: pytest.FixtureRequest, servers: Servers) -> Settings:
    return Settings(broker_url=servers.urls[request.param])


@pytest.fixture
def open_app() -> Iterator[Callable[..., Sutra]]:
    """Make an app of this package for some settings, closed when the test ends."""
    opened: list[Sutra] = []

    def open_one(options: Settings, **more: Any) -> Sutra:
        one = Sutra("t", loader="celery.loaders.app:AppLoader", set_as_current=False, fixups=[])
        one.conf.update(celery_settings(options), **more)
        opened.append(one)
        return one

    yield open_one
    for one in opened:
        if one._backend is not None:
            disconnect(one.backend)
        one.close()


def test_a_blocking_and_an_asyncio_client_reach_the_server(options: Settings) -> None:
    name = uuid.uuid4().hex

    async def read() -> Any:
        async with async_broker_client(options) as client:
            found: Any = await client.get(name)
            return found

    with broker_client(options, timeout_s=3.0, retries=False) as client:
        client.set(name, "x", px=60_000)
        assert client.connection_pool.connection_kwargs["socket_timeout"] == 3.0
    assert asyncio.run(read()) == b"x"
    with results_client(options) as client:
        assert client.get(name) == b"x"


def test_messages_and_results_go_both_ways(options: Settings, open_app: Callable[..., Sutra]) -> None:
    client_app, queue = open_app(options), f"q-{uuid.uuid4().hex}"
    given = client_app.conf.broker_transport_options
    worker_app = open_app(
        options,
        broker_transport="sutra_tasks.broker.transport:Transport",
        broker_transport_options={**given, "incarnation": new_incarnation("t")},
        result_backend=WORKER_BACKEND,
    )
    sent = client_app.send_task("t.echo", ("text",), queue=queue)
    receiver = Receiver(worker_app.connection_for_read(), queue)
    try:
        (message,) = receiver.take(1)
        assert message.headers["id"] == sent.id
        message.ack()
        assert receiver.take_all() == []
    finally:
        receiver.close()
    worker_app.backend.store_result(sent.id, "answer", states.SUCCESS)
    assert sent.get(timeout=20) == "answer"
    sent.forget()


def test_workers_hear_remote_control_over_the_same_server(
    options: Settings, open_app: Callable[..., Sutra]
) -> None:
    """It goes through publish and subscribe, on channels with the number of the database."""
    app = open_app(options)
    heard: list[Any] = []
    with app.connection() as sending, app.connection() as receiving:
        mailbox = app.control.mailbox
        node = mailbox.Node(f"n-{uuid.uuid4().hex}@t", channel=receiving.channel(), handlers={})
        node.handlers["t_heard"] = lambda state, **_: heard.append(state)
        with node.listen():
            with suppress(TimeoutError):
                receiving.drain_events(timeout=0.5)  # the answer to the subscription
            mailbox(sending)._broadcast("t_heard", {}, destination=[node.hostname])
            while not heard:
                receiving.drain_events(timeout=10)
    assert len(heard) == 1


def test_a_certificate_of_another_name_or_authority_is_refused(servers: Servers, tmp_path: Path) -> None:
    ca = f"ssl_ca_certs={servers.certificates.ca}"
    other = f"ssl_ca_certs={Certificates.make(tmp_path, 'localhost').ca}"
    port, strict_port = servers.tls_port, servers.strict_port
    for url, reason in (
        (f"rediss://127.0.0.1:{port}?{ca}", "IP address mismatch"),
        (f"rediss://localhost:{port}?{other}", "self-signed|unable to get local issuer|verify failed"),
        (f"rediss://localhost:{port}", "verify failed"),
        (f"rediss://localhost:{strict_port}?{ca}", "certificate required|closed|reset|eof"),
    ):
        with (
            broker_client(Settings(broker_url=url), timeout_s=5.0, retries=False) as client,
            pytest.raises(redis.ConnectionError, match=f"(?i){reason}"),
        ):
            client.ping()


def test_a_file_that_is_missing_is_named(servers: Servers) -> None:
    options = Settings(broker_url=f"rediss://localhost:{servers.tls_port}?ssl_ca_certs=/absent/ca.pem")
    with pytest.raises(SettingsError, match=r"option ssl_ca_certs: /absent/ca\.pem cannot be read"):
        broker_client(options)


@pytest.mark.parametrize(("broker", "results"), [("redis", "client-certificate"), ("tls", "socket")])
def test_broker_and_results_may_differ_in_tls(
    servers: Servers, open_app: Callable[..., Sutra], broker: str, results: str
) -> None:
    options = Settings(broker_url=servers.urls[broker], result_url=servers.urls[results])
    app, queue = open_app(options), f"q-{uuid.uuid4().hex}"
    sent = app.send_task("t.echo", ("text",), queue=queue)
    backend = open_app(options, result_backend=WORKER_BACKEND).backend
    backend.store_result(sent.id, "answer", states.SUCCESS)
    assert sent.get(timeout=20) == "answer"
    with results_client(options) as client:
        assert client.delete(app.backend.get_key_for_task(sent.id)) == 1
    with broker_client(options) as client:
        assert client.delete(queue) == 1


def test_no_report_of_celery_tells_the_password(
    servers: Servers, open_app: Callable[..., Sutra]
) -> None:
    app = open_app(Settings(broker_url=servers.urls["celery-socket"]))
    with app.connection() as connection:
        info = {name: one for name, one in connection.info().items() if name != "password"}
        shown = kombu_json.dumps(info) + connection.as_uri()
    shown += app.bugreport() + repr(app.conf) + app.backend.as_uri()
    assert PASSWORD not in shown
    assert QUOTED not in shown
