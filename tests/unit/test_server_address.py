"""Addresses of servers as users write them, by the spellings of redis-py, Celery and Valkey."""

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st
from kombu.utils import json as kombu_json

from sutra_tasks.errors import SettingsError
from sutra_tasks.server_address import ServerAddress
from sutra_tasks.settings import Settings

SECRET = "hunter2"


def parse(url: str) -> ServerAddress:
    return ServerAddress.parse(url)


@pytest.mark.parametrize(
    ("url", "hosts", "db"),
    [
        ("redis://h:1/2", (("h", 1),), 2),
        ("valkey://h:1/2", (("h", 1),), 2),
        ("redis://h", (("h", 6379),), 0),
        ("redis://", (("localhost", 6379),), 0),
        ("redis:///3", (("localhost", 6379),), 3),
        ("redis://h?db=4", (("h", 6379),), 4),
        ("redis://h/4?db=4", (("h", 6379),), 4),
        ("redis://h/4?virtual_host=4", (("h", 6379),), 4),
        ("redis://[::1]:6380/0", (("::1", 6380),), 0),
        ("redis://[fe80::1%25eth0]", (("fe80::1%eth0", 6379),), 0),
        (" redis://h:1/2\n", (("h", 1),), 2),
    ],
)
def test_host_port_and_database_are_read(url: str, hosts: object, db: int) -> None:
    address = parse(url)
    assert (address.hosts, address.db, address.tls, address.path) == (hosts, db, None, "")


@pytest.mark.parametrize(
    ("url", "path", "db", "password"),
    [
        ("unix:///run/valkey.sock", "/run/valkey.sock", 0, None),
        ("unix:///run/valkey.sock?db=1", "/run/valkey.sock", 1, None),
        ("unix://:p@/run/a%20b@c.sock?db=1", "/run/a b@c.sock", 1, "p"),
        ("unix:///run/valkey.sock?password=p", "/run/valkey.sock", 0, "p"),
        ("redis+socket:///run/valkey.sock?virtual_host=2", "/run/valkey.sock", 2, None),
    ],
)
def test_a_socket_has_a_path_and_its_database_among_the_options(
    url: str, path: str, db: int, password: str | None
) -> None:
    address = parse(url)
    assert (address.path, address.hosts, address.db, address.password) == (path, (), db, password)


@pytest.mark.parametrize(
    ("url", "hosts", "primary", "db"),
    [
        ("sentinel://a:1,b:2/mymaster", (("a", 1), ("b", 2)), "mymaster", 0),
        ("sentinel://a:1;b:2/mymaster/3", (("a", 1), ("b", 2)), "mymaster", 3),
        ("sentinel://a;sentinel://b:2/0?master_name=m", (("a", 26379), ("b", 2)), "m", 0),
        ("sentinel://a/3;sentinel://b/3?master_name=m", (("a", 26379), ("b", 26379)), "m", 3),
        ("sentinel://[::1]:1/7?master_name=7", (("::1", 1),), "7", 0),
        ("redis+sentinel://a/m", (("a", 26379),), "m", 0),
    ],
)
def test_sentinels_are_read_as_celery_writes_them(
    url: str, hosts: object, primary: str, db: int
) -> None:
    address = parse(url)
    assert (address.hosts, address.primary, address.db) == (hosts, primary, db)


def test_sentinels_have_a_login_of_their_own() -> None:
    address = parse("sentinel://u:p@a;sentinel://u:p@b/m?sentinel_password=q&sentinel_username=v")
    assert (address.user, address.password) == ("u", "p")
    assert (address.sentinel_user, address.sentinel_password) == ("v", "q")


@pytest.mark.parametrize("spelling", ["required", "CERT_REQUIRED"])
@pytest.mark.parametrize("scheme", ["rediss", "valkeys"])
def test_tls_is_read_as_redis_py_and_as_celery_write_it(scheme: str, spelling: str) -> None:
    address = parse(
        f"{scheme}://h?ssl_cert_reqs={spelling}&ssl_ca_certs=%2Fca.pem&ssl_check_hostname=no"
    )
    expected = {"ssl_cert_reqs": "required", "ssl_ca_certs": "/ca.pem", "ssl_check_hostname": False}
    assert address.tls == expected
    assert parse(f"{scheme}://h").tls == {"ssl_cert_reqs": "required"}


def test_sentinels_speak_tls_if_an_option_says_so() -> None:
    assert parse("sentinel://a/m").tls is None
    assert parse("sentinel://a/m?ssl=true").tls == {"ssl_cert_reqs": "required"}
    assert parse("sentinel://a/m?ssl_cert_reqs=none").tls == {"ssl_cert_reqs": "none"}


def test_options_of_a_connection_are_read_with_their_types() -> None:
    text = "socket_timeout=2.5&health_check_interval=30&protocol=2&client_name=web&retry_on_timeout=true"
    assert parse(f"redis://h?{text}").options == {
        "socket_timeout": 2.5, "health_check_interval": 30, "protocol": 2, "client_name": "web",
        "retry_on_timeout": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("redis://h?decode_responses=true", "decode_responses"),
        ("redis://h?sockettimeout=3", "did you mean socket_timeout"),
        ("redis://h?socket_timeout=0", "socket_timeout"),
        ("redis://h?socket_timeout=nan", "socket_timeout"),
        ("redis://h?protocol=4", "protocol"),
        ("redis://h?health_check_interval=", "health_check_interval"),
        ("redis://h?health_check_interval=-1", "health_check_interval"),
        ("redis://h?db=1&db=2", "db"),
        ("redis://h?ssl_ca_certs=ca.pem", "ssl_ca_certs"),
        ("rediss://h?ssl_cert_reqs=maybe", "ssl_cert_reqs"),
        ("redis://h?master_name=m", "master_name"),
        ("redis://h?client_name=a%20b", "client_name"),
        ("redis://h/0?db=1", "two different databases"),
        ("redis://h/db1", "number of a database"),
        ("redis://h/0/1", "number of a database"),
        ("redis://h:0", "port 0"),
        ("redis://h:70000", "port 70000"),
        ("redis://h:http", "host and port"),
        ("redis://::1:6379/0", "brackets"),
        ("redis://a,b", "one host"),
        ("unix://run/valkey.sock", "three slashes"),
        ("sentinel://a:26379", "master_name"),
        ("sentinel://a/0", "master_name"),
        ("sentinel:///m", "Sentinels"),
        ("sentinel://u:p@a;sentinel://u:q@b/m", "same user name"),
        ("sentinel://a/m;sentinel://b/n", "same path"),
        ("redis+cluster://h", "Redis Cluster is not supported"),
        ("rediss+cluster://h", "Redis Cluster is not supported"),
        ("amqp://h", "redis://"),
        ("h:6379", "redis://"),
        ("", "redis://"),
    ],
)
def test_what_cannot_be_used_is_refused_by_its_name(url: str, named: str) -> None:
    with pytest.raises(SettingsError) as refused:
        ServerAddress.parse(url, "SUTRA_RESULT_URL")
    assert refused.value.variable == "SUTRA_RESULT_URL"
    assert named in refused.value.reason


@pytest.mark.parametrize(
    ("written", "password"),
    [("p%40s%2Fs%3A%23%3F%25", "p@s/s:#?%"), ("p@ss", "p@ss"), ("p:s", "p:s"), ("p%20ss+", "p ss+")],
)
def test_a_password_is_decoded_once(written: str, password: str) -> None:
    address = parse(f"redis://app:{written}@h:1/0")
    assert (address.user, address.password, address.hosts) == ("app", password, (("h", 1),))


@laws(max_examples=200, deadline=None)
@given(
    password=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12),
    scheme=st.sampled_from(["redis", "rediss", "unix", "sentinel", "redis+cluster", "amqp"]),
    after=st.sampled_from(["h:6379/0", "h/x", "h:x", "/run/s?db=0", "h?foo=1", "[::1]:6379/0", ""]),
)
def test_no_refusal_and_no_repr_tells_a_password_however_it_is_written(
    password: str, scheme: str, after: str
) -> None:
    secret = SECRET + password + SECRET
    try:
        address = parse(f"{scheme}://app:{secret}@{after}")
    except SettingsError as error:
        shown = str(error) + repr(error) + repr(error.__cause__)
    else:
        shown = repr(address) + str(address) + kombu_json.dumps(address)
    assert SECRET not in shown


@laws(max_examples=200, deadline=None)
@given(password=st.text(min_size=1, max_size=12).filter(lambda one: one.isprintable()))
def test_stock_tools_read_the_same_login(password: str) -> None:
    from urllib.parse import quote  # noqa: PLC0415

    from kombu.utils.url import url_to_parts  # noqa: PLC0415

    address = parse(f"redis://app:{quote(password, safe='')}@[::1]:6380/1")
    again = url_to_parts(address.celery_url(with_password=True))
    assert (again.username, again.password) == ("app", password)
    assert (again.hostname, again.port, again.path) == ("::1", 6380, "1")


@pytest.mark.parametrize(
    "url",
    [
        "redis://app@h:1/2", "rediss://h:1/0", "unix:///run/v.sock?db=1", "unix://app@/run/v.sock?db=0",
        "sentinel://a:1,[::1]:2/m/0", "redis://[::1]:6379/0",
    ],
)  # fmt: skip
def test_what_is_shown_of_an_address_reads_back_to_it(url: str) -> None:
    assert str(parse(url)) == url
    assert parse(str(parse(url))) == parse(url)
    # Celery splits its broker's URL at these.
    assert not set(";+") & set(str(parse(url)))


def test_an_address_travels_between_processes_with_its_password() -> None:
    address = parse(f"redis://:{SECRET}@h")
    assert pickle.loads(pickle.dumps(address)).password == SECRET
    assert json.loads(kombu_json.dumps({"address": address})) == {"address": "redis://h:6379/0"}


def test_each_url_decides_for_itself() -> None:
    options = Settings(broker_url="redis://a", result_url="rediss://b")
    assert (options.broker_address.tls, options.results_address.tls) == (
        None,
        {"ssl_cert_reqs": "required"},
    )
    turned = Settings(broker_url="rediss://a", result_url="redis://b")
    assert turned.broker_address.tls is not None
    assert turned.results_address.tls is None
