"""What the server refuses for good is told apart from what passes with time."""

from __future__ import annotations

from typing import Any

import pytest
import redis
from redis._parsers.base import BaseParser

from sutra_tasks.server_errors import is_permanent, server_words

parse: Any = BaseParser.parse_error  # untyped

PLACE = " script: 1f2e, on @user_script:45."


@pytest.mark.parametrize(
    "said",
    [
        "WRONGTYPE Operation against a key holding the wrong kind of value",
        f"WRONGTYPE Operation against a key holding the wrong kind of value{PLACE}",
        "NOPERM User app has no permissions to run the 'xadd' command",
        f"ERR ACL failure in script: User app has no permissions to run the 'xadd' command{PLACE}",
        "NOAUTH Authentication required.",
        "WRONGPASS invalid username-password pair or user is disabled.",
        "ERR string exceeds maximum allowed size (proto-max-bulk-len)",
        "ERR Elements are too large to be stored",
        "ERR max request size exceeded. Limit: 1048576 bytes",
        "ERR unknown command 'XACKDEL', with args beginning with: ",
        "ERR value is not an integer or out of range",
        "NOGROUP No such key 'a' or consumer group 'b'",
        "BUSYGROUP Consumer Group name already exists",
        "CROSSSLOT Keys in request don't hash to the same slot",
    ],
)
def test_a_refusal_is_permanent(said: str) -> None:
    assert is_permanent(parse(said))


@pytest.mark.parametrize(
    "said",
    [
        "LOADING Redis is loading the dataset in memory",
        "BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.",
        f"OOM command not allowed when used memory > 'maxmemory'.{PLACE}",
        f"READONLY You can't write against a read only replica.{PLACE}",
        "MISCONF Errors writing to the AOF file: No space left on device",
        "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
        "NOREPLICAS Not enough good replicas to write.",
        "CLUSTERDOWN The cluster is down",
        "TRYAGAIN Multiple keys request during rehashing of slot",
        "NOSCRIPT No matching script.",
        "UNBLOCKED client unblocked via CLIENT UNBLOCK",
        "ERR max number of clients reached",
        "Command # 2 (XADD s * text a) of pipeline caused error: MISCONF Errors writing to the AOF file",
    ],
)
def test_a_state_of_the_server_passes(said: str) -> None:
    assert not is_permanent(parse(said))


@pytest.mark.parametrize(
    ("error", "permanent"),
    [
        (redis.ConnectionError("lost"), False),
        (redis.TimeoutError("Timeout reading from socket"), False),
        (redis.BusyLoadingError(), False),
        (ConnectionResetError(), False),
        (TimeoutError(), False),
        (redis.DataError("Invalid input of type: 'dict'"), True),
        (ValueError("unforeseen"), True),
    ],
)
def test_a_connection_comes_back_and_a_fault_of_the_value_stays(
    error: Exception, *, permanent: bool
) -> None:
    assert is_permanent(error) is permanent


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (f"WRONGTYPE wrong kind of value{PLACE}", "WRONGTYPE wrong kind of value"),
        (f"ERR user_script:12: too many results to unpack{PLACE}", "too many results to unpack"),
        ("WRONGTYPE wrong kind script: on @user_script:1.", "WRONGTYPE wrong kind"),
        ("ERR no such key", "no such key"),
        ("Command # 2 (XADD s * text a\nb) of pipeline caused error: MISCONF Errors", "MISCONF Errors"),
    ],
)
def test_the_servers_words_come_without_the_place_to_which_they_were_said(said: str, words: str) -> None:
    assert server_words(parse(said)) == words


def test_an_error_without_words_is_named() -> None:
    assert server_words(redis.ConnectionError()) == "ConnectionError"
