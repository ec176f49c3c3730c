"""What is wrong with a server that answers: missing rights, a refused login, a cluster, eviction.

Workers and commands check their servers when they connect. A client checks its rights once a call has
failed for want of them, because the server's own error names neither the key nor the channel.
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import redis

from sutra_tasks import lua
from sutra_tasks.connections import DemotedError, client_of
from sutra_tasks.errors import MissingRightsError, ServerUnavailableError, SettingsError
from sutra_tasks.rights import rights_of
from sutra_tasks.server_address import NO_CLUSTER
from sutra_tasks.server_errors import is_denial, server_words

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from sutra_tasks.errors import SutraError
    from sutra_tasks.rights import Rights
    from sutra_tasks.server_address import ServerAddress
    from sutra_tasks.settings import Settings

__all__ = ["ASK_S", "as_own_error", "check_server", "explain"]

MAY: Final = lua.script("may")

_KEYLESS: Final = {
    "eval": ["return 0", "0"],
    "evalsha": ["0", "0"],
    "script|load": ["return 0"],
    "script|exists": ["0"],
    "client|unblock": ["0"],
    "multi": [],
    "exec": [],
    "time": [],
    "info": [],
    "scan": ["0"],
}
_OF_MANY_KEYS: Final = ("del", "exists", "mget", "unlink")
PROBES: Final = 2
_OF_CHANNELS: Final = ("publish", "subscribe", "unsubscribe", "psubscribe", "punsubscribe")
ASK_S: Final = 2.0
"""Seconds for which a server is asked about rights after it denied one."""


def check_server(client: redis.Redis, address: ServerAddress, role: str | None) -> list[str]:
    """Check that a server can be used, and return warnings about it.

    Args:
        client: of the server.
        address: of the server.
        role: whose rights are checked; None: of no role of this package.

    Raises:
        SettingsError: the server refuses the login, or is a node of a cluster.
        MissingRightsError: the user may not do what the role does.
        redis.RedisError: the server does not answer now.
    """
    try:
        client.ping()
        if role is not None and (missing := _missing(client, role, address.db)):
            raise MissingRightsError(address.user or "default", _shell(missing), address.variable)
        return _warnings(client, address)
    except redis.AuthenticationError as error:
        raise _refused_login(address, error) from None


def explain(error: Exception, options: Settings, role: str) -> MissingRightsError:
    """Return the error that names the rights for want of which a server denied something.

    Args:
        error: as the server gave it.
        options: with the addresses of the servers, which are asked.
        role: whose rights are checked.
    """
    for address in dict.fromkeys((options.broker_address, options.results_address)):
        missing: list[str] = []
        with suppress(redis.RedisError, OSError), client_of(address, ASK_S) as client:
            missing = _missing(client, role, address.db)
        if missing:
            return MissingRightsError(address.user or "default", _shell(missing), address.variable)
    address = options.broker_address
    said = server_words(error)
    return MissingRightsError(address.user or "default", "", address.variable, said)


def as_own_error(error: Exception, options: Settings, role: str) -> SutraError:
    """Return this package's error for one that a server, or the way to it, gave on sending.

    Args:
        error: of redis-py, or of kombu with redis-py's as its cause.
        options: with the addresses of the servers.
        role: whose rights are checked if the server denied some.
    """
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    if is_denial(cause):
        return explain(cause, options, role)
    address = options.broker_address
    if isinstance(cause, redis.AuthenticationError):
        return _refused_login(address, cause)
    if isinstance(cause, redis.exceptions.MovedError | redis.exceptions.ClusterCrossSlotError):
        return SettingsError(address.variable, str(address), NO_CLUSTER)
    refused = isinstance(cause, redis.ResponseError | redis.BusyLoadingError | DemotedError)
    return ServerUnavailableError(server_words(cause) if refused else type(cause).__name__, refused)


def _refused_login(address: ServerAddress, error: Exception) -> SettingsError:
    return SettingsError(
        address.variable, str(address), f"the server refuses the login: {server_words(error)}"
    )


def _warnings(client: redis.Redis, address: ServerAddress) -> list[str]:
    """Return what the server says of itself that should be otherwise, if it may be asked.

    Raises:
        SettingsError: it is a node of a cluster.
    """
    try:
        told: Any = client.info()
    except redis.ResponseError:
        return []
    if told.get("cluster_enabled") == 1:
        raise SettingsError(address.variable, str(address), NO_CLUSTER)
    found = []
    policy = told.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        found.append(
            f"the server of {address.variable} has maxmemory-policy {policy}: once its memory is full "
            "it drops messages and results. Set maxmemory-policy noeviction."
        )
    if told.get("role") == "slave":
        found.append(
            f"the server of {address.variable} is a replica, which takes no messages. Workers wait "
            "until it becomes a primary; sentinel://host:26379/NAME finds the primary."
        )
    return found


def _missing(client: redis.Redis, role: str, db: int) -> list[str]:
    """Return the rules of an ACL that the user of ``client`` lacks for a role."""
    rights = rights_of(role, db=db)
    try:
        refused = [rule for rule, _ in _denied(client, _places(rights))]
        places = [rule for rule in dict.fromkeys(refused) if refused.count(rule) == PROBES]
        commands = _denied(client, _commands(rights, places))
        return [*(rule for rule, _ in commands), *places]
    except redis.exceptions.NoPermissionError:
        return ["+eval", "+evalsha"]
    except redis.ResponseError:
        return []  # a server without acl_check_cmd


def _shell(rules: Iterable[str]) -> str:
    return " ".join(one if one[0] == "+" else f"'{one}'" for one in rules)


def _denied(client: redis.Redis, given: Iterable[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
    """Return those of some commands, each with the rule that allows it, that are not allowed."""
    probes = list(given)
    numbers: Any = MAY(client, commands=[json.dumps(words) for _, words in probes])
    return [probes[number - 1] for number in numbers]


def _places(rights: Rights) -> Iterator[tuple[str, list[str]]]:
    """Yield :data:`PROBES` commands for each key and channel: who may run none lacks the place."""
    reads = "xack" in rights.commands and "lpush" not in rights.commands
    for one in rights.keys:
        key = one.replace("*", "x")
        yield f"~{one}", ["xack", key, "g", "0"] if reads else ["get", key]
        yield f"~{one}", ["xdel", key, "0"] if reads else ["lpush", key, "x"]
    by_pattern = "psubscribe" in rights.commands
    for one in rights.channels:
        # A subscription to a pattern needs a rule with the very same text.
        is_pattern = by_pattern and ("pidbox" in one or one.endswith(".*"))
        words = ["psubscribe", one] if is_pattern else ["subscribe", one.replace("*", "x")]
        yield f"&{one}", words
        yield f"&{one}", words if is_pattern else ["publish", one.replace("*", "x"), ""]


def _commands(rights: Rights, denied: Collection[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield the commands of a role, on a key and a channel that are not denied, if there are such."""
    key = next((one.replace("*", "x") for one in rights.keys if f"~{one}" not in denied), None)
    channel = next((one for one in rights.channels if f"&{one}" not in denied), None)
    for name in rights.commands:
        words = name.split("|")
        if name in _KEYLESS:
            yield f"+{name}", [*words, *_KEYLESS[name]]
        elif name in _OF_CHANNELS:
            if channel is not None:
                yield f"+{name}", [*words, channel]
        elif name == "xreadgroup" and key is not None:
            yield f"+{name}", [*words, "group", "g", "c", "streams", key, ">"]
        elif name == "xread" and key is not None:
            yield f"+{name}", [*words, "streams", key, "0"]
        elif name in _OF_MANY_KEYS and key is not None:
            yield f"+{name}", [*words, key]
        elif key is not None:
            second = key if name in ("blmove", "lmove", "rename") else "1"
            yield f"+{name}", [*words, key, second, "1", "1", "1"]
