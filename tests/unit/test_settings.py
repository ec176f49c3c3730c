"""Settings: one reader of the environment, and every refusal names its variable."""

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st

from sutra_tasks.errors import SettingsError
from sutra_tasks.settings import ENGINES, PREFIX, Settings, without_foreign

URLS = st.sampled_from(["redis://h:6379/0", "rediss://:p%20w@h/1", "redis://u:p@h"])

some_settings = st.builds(
    Settings,
    broker_url=st.none() | URLS,
    result_url=st.none() | URLS,
    result_ttl_s=st.integers(1, 10**12),
    max_texts=st.integers(1, 10**6),
    heartbeat_s=st.floats(0.05, 1.0),
    device_ttl_s=st.floats(2.0, 1e9),
    lease_s=st.floats(1e9, 1e10),
    batch_wait_s=st.floats(0, 1e-3),
    engine=st.sampled_from(ENGINES),
    model=st.text("a/ =\n'é🙂", min_size=1, max_size=20),
    device_id=st.none() | st.sampled_from(["gpu0", "0", "A-_" + 61 * "z"]),
)


def test_every_field_says_what_it_means() -> None:
    assert [option.name for option in fields(Settings) if not option.metadata["about"]] == []


@laws(max_examples=60, deadline=None)
@given(options=some_settings)
def test_the_environment_of_settings_reads_back_to_them(options: Settings) -> None:
    assert Settings.from_env(options.as_env()) == options


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("SUTRA_BATCH_TEXTS", "many"),
        ("SUTRA_BATCH_TEXTS", "1.5"),
        ("SUTRA_BATCH_TEXTS", "0"),
        ("SUTRA_BATCH_TEXTS", "-1"),
        ("SUTRA_BATCH_TEXTS", "inf"),
        ("SUTRA_RESULT_TTL_S", "9" * 5000),
        ("SUTRA_BATCH_WAIT_S", "soon"),
        ("SUTRA_BATCH_WAIT_S", "nan"),
        ("SUTRA_BATCH_WAIT_S", "inf"),
        ("SUTRA_BATCH_WAIT_S", "1e400"),
        ("SUTRA_BATCH_WAIT_S", "-0.001"),
        ("SUTRA_HEARTBEAT_S", "0"),
        ("SUTRA_BATCH_TEXT", "128"),
        ("SUTRA_", "1"),
        ("SUTRA___POST_INIT__", "1"),
        ("SUTRA_ENGINE", "onnx"),
        ("SUTRA_DTYPE", "fp16"),
        ("SUTRA_ATTENTION", "flash"),
        ("SUTRA_DEVICE_ID", "gpu 0"),
        ("SUTRA_DEVICE_ID", "-gpu0"),
        ("SUTRA_DEVICE_ID", "gpu0\n"),
        ("SUTRA_DEVICE_ID", "sutra:held:x"),
        ("SUTRA_DEVICE_ID", "g" * 65),
        ("SUTRA_DEVICE_ID", "grün"),
        ("SUTRA_BROKER_URL", "amqp://127.0.0.1"),
        ("SUTRA_BROKER_URL", "127.0.0.1:6379"),
        ("SUTRA_RESULT_URL", "db+sqlite:///results"),
        ("SUTRA_RESULT_URL", "redis+cluster://h"),
        ("SUTRA_BROKER_URL", "redis://h?decode_responses=true"),
        ("SUTRA_DEVICE_TTL_S", "1.9"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_by_its_variable(variable: str, text: str) -> None:
    with pytest.raises(SettingsError) as refused:
        Settings.from_env({variable: text})
    assert refused.value.variable == variable
    assert str(refused.value).startswith(f"{variable}=")


def test_a_device_outlives_one_lost_heartbeat() -> None:
    assert Settings(heartbeat_s=3, device_ttl_s=6).device_ttl_s == 6
    with pytest.raises(SettingsError, match="SUTRA_HEARTBEAT_S"):
        Settings(heartbeat_s=3, device_ttl_s=5.9)


def test_a_lease_outlives_a_devices_silence() -> None:
    assert Settings(device_ttl_s=9, lease_s=9).lease_s == 9
    with pytest.raises(SettingsError, match="SUTRA_LEASE_S"):
        Settings(device_ttl_s=9, lease_s=8.9)


@pytest.mark.parametrize("name", ["max_acceptable_error_rate", "gpu_memory_threshold"])
def test_a_share_is_one_at_most(name: str) -> None:
    with pytest.raises(SettingsError, match="must be 1 or less"):
        replace(Settings(), **{name: 1.01})  # type: ignore[arg-type]  # both are floats


def test_constructing_refuses_what_the_environment_refuses() -> None:
    with pytest.raises(SettingsError, match="SUTRA_MAX_TEXTS"):
        Settings(max_texts=0)


@pytest.mark.parametrize("variable", ["SUTRA_BROKER_URL", "SUTRA_RESULT_URL"])
@pytest.mark.parametrize(
    "url",
    [
        "amqp://user:hunter2@host//",
        "redis:/:hunter2@host",
        "REDIS://:hunter2@host",
        "unix:///run/redis?password=hunter2&db=x",
        "user:hunter2@host",
        "hunter2",
    ],
)
def test_a_refused_address_does_not_tell_its_password(variable: str, url: str) -> None:
    with pytest.raises(SettingsError) as refused:
        Settings.from_env({variable: url})
    assert "hunter2" not in str(refused.value)
    assert "hunter2" not in repr(refused.value)


def test_an_unknown_variable_does_not_tell_its_value() -> None:
    with pytest.raises(SettingsError) as refused:
        Settings.from_env({"SUTRA_BROKER_PASSWORD": "hunter2"})
    assert "hunter2" not in repr(refused.value)


def test_a_misspelt_variable_is_told_with_the_nearest_name() -> None:
    with pytest.raises(SettingsError, match="did you mean SUTRA_BATCH_TEXTS"):
        Settings.from_env({"SUTRA_BATCH_TEXT": "128"})


SERVICES = ("SUTRA", "SUTRA_REDIS", "SUTRA_BROKER_URL", "SUTRA_MODEL", "SUTRA_SERVICE", "SUTRA_1")
PORTS = {
    "": "tcp://10.0.0.11:6379",
    "_6379_TCP": "tcp://10.0.0.11:6379",
    "_6379_TCP_PROTO": "tcp",
    "_6379_TCP_PORT": "6379",
    "_6379_TCP_ADDR": "10.0.0.11",
    "_53_UDP": "udp://[fd00::a]:53",
}


@pytest.mark.parametrize("service", SERVICES)
def test_what_kubernetes_tells_of_services_is_not_read(service: str) -> None:
    told = {f"{service}_PORT{name}": text for name, text in PORTS.items()}
    told |= {
        f"{service}_SERVICE_HOST": "10.0.0.11",
        f"{service}_SERVICE_PORT": "6379",
        f"{service}_SERVICE_PORT_HTTP_METRICS": "9121",
    }
    assert Settings.from_env({**told, "SUTRA_MODEL": "m"}) == Settings(model="m")
    assert without_foreign(told) == told


def test_no_setting_has_a_name_that_kubernetes_gives() -> None:
    named = [option.name for option in fields(Settings)]
    assert not [one for one in named if one.endswith(("_port", "_service_host", "_tcp", "_udp"))]


def test_a_misspelt_setting_that_looks_like_one_of_a_service_is_told() -> None:
    with pytest.raises(SettingsError, match="SUTRA_PORT"):
        Settings.from_env({"SUTRA_PORT": "6379"})


def test_variables_of_other_celery_apps_are_left_out() -> None:
    foreign = {
        "CELERY_BROKER_URL": "amqp://h", "CELERY_WORKER_POOL": "prefork",
        "FORKED_BY_MULTIPROCESSING": "1",
        "APP": "host", "BROKER_URL": "amqp://h", "FLOWER_PORT": "tcp://10.0.0.1:5555",
    }  # fmt: skip
    kept = {"PATH": "/bin", "SUTRA_MODEL": "m", "FLOWER_BASIC_AUTH": "a:b", "REDIS_PORT": "tcp://h:1"}
    assert without_foreign({**foreign, **kept}) == kept


def test_an_empty_variable_is_an_unset_one() -> None:
    empty = {PREFIX + option.name.upper(): "" for option in fields(Settings)}
    assert Settings.from_env(empty) == Settings()


def test_variables_of_others_are_not_read() -> None:
    others = {"PATH": "/bin", "sutra_engine": "onnx", "CELERY_X": "1"}
    assert Settings.from_env(others) == Settings()


@pytest.mark.parametrize(
    ("broker", "result", "expected"),
    [
        (None, None, None),
        ("redis://a", None, "redis://a"),
        (None, "redis://b", "redis://b"),
        ("redis://a", "redis://b", "redis://b"),
    ],
)
def test_results_live_with_the_broker_unless_told(
    broker: str | None, result: str | None, expected: str | None
) -> None:
    assert Settings(broker_url=broker, result_url=result).results == expected
