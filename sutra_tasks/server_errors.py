"""What an error of the server means: whether it passes with time, and the server's own words. Pure."""

from __future__ import annotations

import re
from typing import Final

import redis

__all__ = ["is_denial", "is_permanent", "server_words"]

PASSING_CODES: Final = frozenset(
    {
        "ASK", "BUSY", "CLUSTERDOWN", "EXECABORT", "LOADING", "MASTERDOWN", "MISCONF", "MOVED",
        "NOREPLICAS", "NOSCRIPT", "OOM", "READONLY", "REDIRECT", "TRYAGAIN", "UNBLOCKED",
    }
)  # fmt: skip
"""First words of answers that describe a state of the server which its operator or time ends."""
PASSING: Final = (
    redis.exceptions.AskError,  # MOVED as well
    redis.exceptions.ClusterDownError,  # MASTERDOWN as well
    redis.exceptions.ExecAbortError,
    redis.exceptions.NoScriptError,
    redis.exceptions.OutOfMemoryError,
    redis.exceptions.ReadOnlyError,
    redis.exceptions.TryAgainError,
)
"""The same for which redis-py has a class; its message is without the first word."""
REFUSED: Final = (redis.AuthenticationError, redis.exceptions.AuthorizationError)
"""redis-py counts these among errors of the connection, but the same password is refused again."""

_CODE: Final = re.compile(r"([A-Z]+)\b")
_PLACE: Final = re.compile(
    r"^Command # \d+ .* of pipeline caused error: |^user_script:\d+: ?"
    r"| script: (\w+, )?on @user_script:\d+\.?$",
    re.DOTALL,
)
"""Where it was said: redis-py quotes the command of a pipeline, the server the line of a script."""


def is_permanent(error: Exception) -> bool:
    """Say whether the same request would fail again, however often it is repeated.

    True of a refusal: the wrong type of a key, a missing right, a value that is too large, a password or
    a command that the server does not accept; and of every error that is none of the server or the
    connection. False of what passes with time: a lost connection, a timeout, a server that is loading,
    full, read-only or busy.

    Args:
        error: as redis-py raised it, or any other.
    """
    if isinstance(error, REFUSED):
        return True
    if isinstance(error, redis.ResponseError):
        code = _CODE.match(server_words(error))
        return not isinstance(error, PASSING) and (code is None or code[1] not in PASSING_CODES)
    if isinstance(error, redis.DataError):  # redis-py cannot send the value
        return True
    return not isinstance(error, redis.RedisError | OSError)


def is_denial(error: Exception) -> bool:
    """Say whether the server refused a command, a key or a channel to its user, also inside a script."""
    return isinstance(error, redis.exceptions.NoPermissionError) or (
        isinstance(error, redis.ResponseError) and "ACL failure" in str(error)
    )


def server_words(error: Exception) -> str:
    """Return what the server said, without the command or the place in a script to which it said so."""
    return _PLACE.sub("", str(error)) or type(error).__name__
