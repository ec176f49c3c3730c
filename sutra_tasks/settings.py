"""All settings, read once from the ``SUTRA_*`` environment variables; no other module reads them.

The variable ``SUTRA_BATCH_WAIT_S`` sets the field ``batch_wait_s``, and so on. The metadata of a field
has its meaning; ``docs/settings.md`` is generated from it.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import cache
from typing import TYPE_CHECKING, Any, Final, get_type_hints

from sutra_tasks.errors import BrokerNotConfiguredError, SettingsError
from sutra_tasks.server_address import ServerAddress

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["PREFIX", "Settings", "forget_foreign_variables", "settings", "without_foreign"]

PREFIX: Final = "SUTRA_"
ENGINES: Final = ("torch", "simulated")
STRATEGIES: Final = ("shortest_finish", "least_loaded", "performance_based", "random", "round_robin")
METHODS: Final = ("overlap_aware", "mean", "positional", "max")
CHUNKINGS: Final = ("plain", "late")
DTYPES: Final = ("auto", "float32", "bfloat16", "float16")
ATTENTIONS: Final = ("auto", "eager", "sdpa", "flash_attention_2")
_SERVICE_VARIABLE: Final = re.compile(
    r"\w+_(SERVICE_HOST=.+|SERVICE_PORT(_\w+)?=[0-9]+|PORT=(tcp|udp|sctp)://.+"
    r"|PORT_[0-9]+_(TCP|UDP|SCTP)(=(tcp|udp|sctp)://.+|_PROTO=(tcp|udp|sctp)|_PORT=[0-9]+|_ADDR=.+))"
)
"""What Kubernetes tells each container of a service, whatever the service is called."""
_CELERY_VARIABLES: Final = {
    "APP", "BROKER_URL", "RESULT_BACKEND", "LOADER", "CONFIG_MODULE", "FORKED_BY_MULTIPROCESSING",
}  # fmt: skip
_DEVICE_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_NAMESPACE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def _option(
    default: Any,
    about: str,
    *,
    least: float | None = None,
    most: float | None = None,
    one_of: tuple[str, ...] | None = None,
) -> Any:
    metadata = {"about": about, "least": least, "most": most, "one_of": one_of}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Settings:
    """The settings of one process, which are valid: a bad value raises ``SettingsError``."""

    broker_url: str | None = _option(
        None, "address of the Redis or Valkey server with the queues: redis://, rediss://, unix:// ..."
    )
    result_url: str | None = _option(
        None, "address of the server with the results, if it is another one than the broker"
    )
    result_ttl_s: int = _option(
        600, "seconds a result is kept for its caller; of a distillation 7 days at the least", least=1
    )
    namespace: str | None = _option(
        None, "beginning of every key on both servers, for fleets that share them; none if not set"
    )
    socket_timeout_s: float = _option(30.0, "seconds without an answer from the server", least=1)

    max_text_chars: int = _option(8_000_000, "characters in one text", least=1)
    max_texts: int = _option(10_000, "texts in one message", least=1)
    max_message_bytes: int = _option(16_777_216, "UTF-8 bytes of text in one message", least=1)

    sequence_threshold: int | None = _option(
        None,
        "tokens up to which a text is embedded whole; min(512, the model's window) if not set",
        least=1,
    )
    block_size: int | None = _option(
        None,
        "tokens in a chunk of a longer text, special tokens and prompt included; "
        "min(512, the model's window) if not set",
        least=1,
    )
    overlap_tokens: int = _option(50, "tokens two neighbouring chunks share", least=0)
    aggregation_method: str = _option(
        "overlap_aware",
        "how the vectors of chunks become one: overlap_aware, mean, positional or max",
        one_of=METHODS,
    )
    seed_exact: bool = _option(
        False, "weigh chunks by the specification's formulas to the letter, for audits"
    )
    chunking: str = _option(
        "plain",
        "plain: each chunk is embedded by itself; late: chunks are pooled from one pass over the text",
        one_of=CHUNKINGS,
    )
    fanout_chunks: int = _option(
        32, "chunks from which on the long texts of a call are computed by several devices", least=1
    )
    overdue_s: float = _option(
        60.0, "seconds without progress after which missing parts of a long text are sent again", least=1
    )

    strategy: str = _option(
        "shortest_finish", f"how the router chooses a device: {', '.join(STRATEGIES)}", one_of=STRATEGIES
    )
    queue_penalty_factor: float = _option(
        0.01, "performance_based: seconds one waiting message adds to a device's latency", least=0
    )
    credit_s: float = _option(1.0, "seconds of work a device is given ahead of time", least=0.05)
    max_queue_s: float = _option(
        300.0, "seconds of work that may wait before a call is refused; 0 never refuses", least=0
    )
    max_attempts: int = _option(
        3, "workers a message may have killed before it becomes a dead letter", least=1
    )
    no_device_wait_s: float = _option(
        30.0, "seconds a message waits while no device is live before it fails", least=0
    )
    heartbeat_s: float = _option(1.0, "seconds between two heartbeats of a device", least=0.05)
    device_ttl_s: float = _option(
        6.0, "seconds without a heartbeat after which a device gets no work", least=0.2
    )

    lease_s: float = _option(
        12.0, "seconds without a heartbeat after which a worker's messages are requeued", least=1
    )
    worker_timeout_s: float = _option(
        30.0, "seconds without work after which a device checks its model", least=1
    )
    latency_threshold_multiplier: float = _option(
        2.0, "times its usual batch time at which a device counts as slow", least=1
    )
    max_acceptable_error_rate: float = _option(
        0.1, "share of recent texts that may fail before a device counts as failing", least=0, most=1
    )
    gpu_memory_threshold: float = _option(
        0.92, "share of a device's memory in use that counts as pressure", least=0, most=1
    )

    engine: str = _option("torch", "what computes the vectors: torch or simulated", one_of=ENGINES)
    model: str = _option("all-MiniLM-L6-v2", "a sentence-transformers name or folder")
    models: str | None = _option(
        None, "further models that callers may name, separated by commas; those of the registry always"
    )
    models_dir: str | None = _option(
        None, "folder with the registry of models, the same for all workers; none if not set"
    )
    model_memory_mb: int = _option(
        4096, "MB of weights one device keeps loaded; the least recently used model is evicted", least=1
    )
    device_id: str | None = _option(None, "name of this worker's device, unique in the fleet")
    incarnation: str | None = _option(
        None, "name of this start of a worker; a supervisor sets it, to requeue what it had in flight"
    )
    torch_device: str = _option("cpu", "where torch computes: cpu, cuda, mps")
    gpu_memory_share: float = _option(
        1.0, "share of a GPU's memory this worker may allocate", least=0.01, most=1
    )
    dtype: str = _option(
        "auto",
        "precision: auto, float32, bfloat16 or float16; auto is the fastest that stays faithful",
        one_of=DTYPES,
    )
    attention: str = _option(
        "auto",
        "auto, eager, sdpa or flash_attention_2; one that cannot run is replaced by the next best",
        one_of=ATTENTIONS,
    )
    torch_threads: int = _option(1, "torch threads of one CPU worker", least=1)
    task_threads: int = _option(64, "tasks one device worker runs at once", least=1)
    batch_tokens: int = _option(8192, "padded tokens in one batch", least=1)
    batch_texts: int = _option(128, "texts in one batch", least=1)
    batch_wait_s: float = _option(
        0.005, "seconds a batch that is not full waits while more work is arriving", least=0
    )
    batch_timeout_s: float = _option(
        120.0, "seconds one batch may compute before its worker ends itself as hung", least=0.1
    )
    drain_s: float = _option(20.0, "seconds a worker may take to stop", least=0.1)

    stream_buffer_size: int = _option(
        10_000, "entries of a stream that may wait before its producers must wait", least=1
    )
    stream_output_size: int = _option(
        1_000, "unread responses of a stream from which on devices read no more entries of it", least=1
    )
    stream_batch_size: int = _option(8, "texts of streams in a batch, as long as few wait", least=1)
    stream_max_latency_ms: float = _option(
        2.0, "milliseconds a batch of a stream waits for more texts", least=0, most=100
    )
    stream_timeout_s: float = _option(
        30.0, "seconds a producer waits for a full stream before it refuses the text", least=0
    )
    stream_claim_s: float = _option(
        5.0, "seconds of silence after which other consumers claim a consumer's entries", least=0.5
    )
    stream_idle_flush_s: float = _option(
        0.0, "seconds after which the rest of a text that stopped growing is embedded; 0 never", least=0
    )

    data_dir: str | None = _option(
        None, "folder with the texts that distillations may read; none if not set"
    )
    distill_threads: int | None = _option(
        None, "torch threads of a distillation on CPUs; all cores if not set", least=1
    )
    distill_pause_s: float = _option(
        1.0, "seconds of work waiting in the fleet from which on a distillation pauses; 0 never", least=0
    )
    distill_every_s: float = _option(
        0.0, "seconds between two scheduled distillations; 0 never", least=0
    )
    distill_config: str | None = _option(
        None, "JSON file with the recipe of scheduled distillations, a DistillationConfig"
    )
    sample_texts: int = _option(
        0, "texts of real traffic kept as a sample to distil from, at most; 0 keeps none", least=0
    )
    sample_retention_s: int = _option(
        7 * 24 * 3600, "seconds after which sampled texts are gone", least=60
    )

    simulated_fixed_s: float = _option(0.0, "simulated engine: seconds per batch", least=0)
    simulated_per_token_s: float = _option(0.0, "simulated engine: seconds per token", least=0)
    simulated_width: int = _option(384, "simulated engine: width of its vectors", least=1)

    def __post_init__(self) -> None:
        self._check_each()
        for name in ("broker_url", "result_url"):
            url = getattr(self, name)
            if url is not None:
                ServerAddress.parse(url, PREFIX + name.upper())
        if self.device_id is not None and not _DEVICE_ID.fullmatch(self.device_id):
            raise _refused("device_id", self.device_id, "letters, digits, '-' and '_', 64 at most")
        if self.namespace is not None and not _NAMESPACE.fullmatch(self.namespace):
            reason = "letters, digits, '.', '-' and '_', 64 at most"
            raise _refused("namespace", self.namespace, reason)
        if self.device_ttl_s < 2 * self.heartbeat_s:
            raise _refused("device_ttl_s", self.device_ttl_s, "must be at least twice SUTRA_HEARTBEAT_S")
        if self.distill_every_s and not self.distill_config:
            raise _refused("distill_every_s", self.distill_every_s, "needs SUTRA_DISTILL_CONFIG")
        if self.lease_s < self.device_ttl_s:
            raise _refused("lease_s", self.lease_s, "must be SUTRA_DEVICE_TTL_S or more")

    def _check_each(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            if value is None:
                continue
            least, most, one_of = (option.metadata[name] for name in ("least", "most", "one_of"))
            if one_of is not None and value not in one_of:
                raise _refused(option.name, value, f"must be one of {', '.join(one_of)}")
            if least is not None and not least <= value < float("inf"):
                raise _refused(option.name, value, f"must be a finite number, {least} or more")
            if most is not None and value > most:
                raise _refused(option.name, value, f"must be {most} or less")

    def __repr__(self) -> str:
        # Logs and Celery's reports print settings, and addresses may have passwords in them.
        return f"<Settings {self.engine} {self.model}>"

    @property
    def further_models(self) -> tuple[str, ...]:
        """The names in ``models``."""
        return tuple(name.strip() for name in (self.models or "").split(",") if name.strip())

    @property
    def results(self) -> str | None:
        """The address of the results server: ``result_url``, else the broker's."""
        return self.result_url or self.broker_url

    @property
    def broker_address(self) -> ServerAddress:
        """Where the broker is.

        Raises:
            BrokerNotConfiguredError: ``SUTRA_BROKER_URL`` is not set.
        """
        if self.broker_url is None:
            raise BrokerNotConfiguredError
        return ServerAddress.parse(self.broker_url, PREFIX + "BROKER_URL")

    @property
    def results_address(self) -> ServerAddress:
        """Where the results server is: that of ``result_url``, else the broker.

        Raises:
            BrokerNotConfiguredError: neither is set.
        """
        if self.results is None:
            raise BrokerNotConfiguredError
        variable = "BROKER_URL" if self.result_url is None else "RESULT_URL"
        return ServerAddress.parse(self.results, PREFIX + variable)

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Settings:
        """Return the settings of the ``SUTRA_*`` variables in ``environ``.

        Raises:
            SettingsError: there is no such setting, or its value does not parse or is out of range.
        """
        types = get_type_hints(cls)
        values: dict[str, Any] = {}
        for variable, text in sorted(environ.items()):
            if not variable.startswith(PREFIX) or text == "" or _is_service_variable(variable, text):
                continue
            name = variable.removeprefix(PREFIX).lower()
            if name not in types:
                close = get_close_matches(name, types, 1)
                hint = f"; did you mean {PREFIX}{close[0].upper()}?" if close else ""
                raise SettingsError(variable, "...", f"there is no such setting{hint}")
            parse, what = _PARSERS[types[name]]
            try:
                values[name] = parse(text)
            except (ValueError, KeyError):
                raise SettingsError(variable, text, f"must be {what}") from None
        return cls(**values)

    def as_env(self) -> dict[str, str]:
        """Return the variables from which :meth:`from_env` makes these settings."""
        return {
            PREFIX + option.name.upper(): str(getattr(self, option.name))
            for option in fields(self)
            if getattr(self, option.name) is not None
        }


_PARSERS: Final[dict[Any, tuple[Callable[[str], Any], str]]] = {
    str: (str, "text"),
    str | None: (str, "text"),
    int: (int, "a whole number"),
    int | None: (int, "a whole number"),
    float: (float, "a number"),
    bool: (lambda text: {"true": True, "false": False}[text.lower()], "true or false"),
}


def _refused(name: str, value: object, reason: str) -> SettingsError:
    return SettingsError(PREFIX + name.upper(), str(value), reason)


def _is_service_variable(variable: str, text: str) -> bool:
    """Say whether Kubernetes set an environment variable because a service has a name like this."""
    return _SERVICE_VARIABLE.fullmatch(f"{variable}={text}") is not None


def without_foreign(environ: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without variables that configure another Celery app, or Flower by mistake.

    The ``celery`` command takes any of its options from ``CELERY_...``, and some from names without this
    prefix. Flower takes ``FLOWER_PORT``, which Kubernetes sets for a service of this name.
    """
    return {name: text for name, text in environ.items() if not _is_foreign(name, text)}


def forget_foreign_variables() -> None:
    """Remove from this process what :func:`without_foreign` leaves out; not for a host's process."""
    for name in os.environ.keys() - without_foreign(os.environ).keys():
        del os.environ[name]


def _is_foreign(name: str, text: str) -> bool:
    of_celery = name.startswith("CELERY_") or name in _CELERY_VARIABLES
    return of_celery or (name.startswith("FLOWER_") and _is_service_variable(name, text))


@cache
def settings() -> Settings:
    """Return the settings of this process; the first call reads the environment."""
    return Settings.from_env(os.environ)
