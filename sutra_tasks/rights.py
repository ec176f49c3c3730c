"""The least rights that each role needs on a server with an access control list (ACL).

``docs/acl/sutra.acl`` is generated from this table, and workers check theirs against it when they start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sutra_tasks import keys

__all__ = ["ROLES", "Rights", "rights_of"]

ROLES: Final = ("client", "reader", "router", "device", "distill", "operator")
"""``client`` sends calls, reads results and produces streams; ``reader`` reads streams; ``operator``
runs ``sutra``, beat and Flower."""


@dataclass(frozen=True, slots=True)
class Rights:
    """What one role may do, each as a rule of an ACL without its sign.

    Attributes:
        commands: names, ``client|unblock`` with its container.
        keys: patterns of keys.
        channels: patterns of channels. A subscription to a pattern needs this very pattern.
    """

    commands: tuple[str, ...]
    keys: tuple[str, ...]
    channels: tuple[str, ...]

    @property
    def rules(self) -> tuple[str, ...]:
        """The rules as ``ACL SETUSER`` takes them."""
        return (
            "+@connection", "-@dangerous", *(f"+{one}" for one in self.commands),
            *(f"~{one}" for one in self.keys), *(f"&{one}" for one in self.channels),
        )  # fmt: skip


_SCRIPTS: Final = {"eval", "evalsha", "script|load", "script|exists", "time"}
_ASKING: Final = {"info"}
_SENDING: Final = {"llen", "lpush", "sadd", "smembers", "zadd", "pexpire", "multi", "exec", "publish"}
_RESULTS: Final = {"get", "mget", "pttl", "del", "exists", "subscribe", "unsubscribe"}
_CANVAS: Final = {"set", "setex", "incrby", "expire", "zrange", "zcount", "lrange", "sismember"}
_PRODUCING: Final = {"expire", "get", "hincrby", "hmget", "sadd", "set", "type", "xadd", "xlen"}
_READING: Final = {
    "exists", "sismember", "xack", "xadd", "xautoclaim", "xclaim", "xdel", "xgroup|create",
    "xgroup|createconsumer", "xgroup|delconsumer", "xpending", "xrange", "xreadgroup",
}  # fmt: skip
_WORKING: Final = {
    "blmove", "client|unblock", "decrby", "hdel", "hexists", "hget", "hgetall", "hkeys", "hlen", "hmget",
    "hset", "hsetnx", "hincrby", "incr", "incrby", "llen", "lmove", "lpop", "lrange", "lrem",
    "psubscribe", "punsubscribe", "rename", "rpop", "rpush", "srem", "ttl", "type", "unlink", "zcard",
    "zrangebyscore", "zrem", "zremrangebyrank", "zremrangebyscore", "zscore",
}  # fmt: skip
_STREAMING: Final = {
    "xadd", "xinfo|consumers", "xinfo|groups", "xinfo|stream", "xlen", "xrange", "xread",
}  # fmt: skip
_WATCHING: Final = {"brpop", "scan"}

_CLIENT: Final = _SCRIPTS | _ASKING | _SENDING | _RESULTS | _CANVAS | _PRODUCING
_WORKER: Final = _CLIENT | _WORKING
_COMMANDS: Final = {
    "client": _CLIENT,
    "reader": _SCRIPTS | _ASKING | _READING,
    "router": _WORKER,
    "device": _WORKER | _READING | _STREAMING,
    "distill": _WORKER,
    "operator": _WORKER | _READING | _STREAMING | _WATCHING,
}


def rights_of(role: str, *, db: int = 0) -> Rights:
    """Return the least rights of a role.

    Args:
        role: one of :data:`ROLES`.
        db: number of the database, which is part of the names of Celery's channels.

    ``SUTRA_NAMESPACE`` is the beginning of every key, and of Celery's channels.
    """
    patterns = dict.fromkeys(_keys(role))
    return Rights(tuple(sorted(_COMMANDS[role])), tuple(patterns), _channels(role, db))


def _keys(role: str) -> list[str]:
    if role == "reader":
        return [keys.streams(), keys.stream("*", "out"), keys.stream("*", "dead")]
    samples = keys.sample(0).removesuffix("0") + "*"
    results = [keys.result("*"), keys.named("celery-taskset-meta-*")]
    streams = [keys.streams(), keys.stream("*", "*"), keys.stream_loads(), keys.stream_consumer("*")]
    queues = [
        keys.named(f"{name}*") for name in (keys.EMBED_QUEUE, keys.CONTROL_QUEUE, keys.DISTILL_QUEUE)
    ]
    sending = [*queues, keys.named("_kombu.*"), *results, keys.backlog(), keys.cancelled("*")]
    if role == "client":
        return [*sending, *streams]
    of_kombu = map(keys.named, (keys.device_queue("*"), "*.celery.pidbox*", "unacked*"))
    working = [
        *sending, *of_kombu, keys.fleet(), keys.queues(), keys.leases(), keys.dead_letters(),
        keys.documents(), keys.in_flight("*"), keys.worker("*"), keys.device("*"), keys.load("*"),
        keys.document("*"), keys.reaped("*"), keys.suspect("*"),
        keys.unstarted("*"),
    ]  # fmt: skip
    of_role = {
        "router": [keys.router("*")],
        "device": [keys.golden(), keys.promotion(), samples, *streams],
        "distill": [keys.distilling("*"), samples],
    }
    if role == "operator":
        of_roles = [one for several in of_role.values() for one in several]
        return [*working, *of_roles, keys.named("celeryev.*")]
    return [*working, *of_role[role]]


def _channels(role: str, db: int) -> tuple[str, ...]:
    if role == "reader":
        return ()
    control, events = keys.named(f"/{db}.celery.pidbox"), keys.named(f"/{db}.celeryev/")
    shared = (keys.result("*"), control)
    return shared if role == "client" else (*shared, f"{events}*", f"{events}worker.*")
