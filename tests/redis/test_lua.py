"""Scripts on a real server: what is passed arrives, and a server that forgot them gets them again."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
import redis
import redis.asyncio

from sutra_tasks import lua
from tests.unit.test_lua import FILES, INCLUDED

if TYPE_CHECKING:
    from redis.asyncio import Redis as AsyncRedis

ECHO = """\
--- Return what it is passed.
---
--- @arg      first    one argument
--- @keys     sources  names of keys
--- @args     values   a group of arguments
--- @key      target   a key
--- @keys     others   more names of keys
--- @family   record   record .. id is a key
--- @constant LIMIT    a number
--- @args     rest     another group
--- @returns  all of it

return {first, sources, values, target, others, record, LIMIT, rest}
"""
BINARY = b"\x00\r\n\xff'\"\\"
VALUES: dict[str, Any] = {
    "first": 7,
    "sources": ["s1", "s2"],
    "values": [BINARY, "é", 3],
    "target": b"t\xff",
    "others": ("o1",),
    "record": "r:",
    "rest": [1.5],
}
ANSWER = [b"7", [b"s1", b"s2"], [BINARY, "é".encode(), b"3"], b"t\xff", [b"o1"], b"r:", 9, [b"1.5"]]


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch, client: redis.Redis) -> lua.Script:
    client.script_flush()
    monkeypatch.setattr(lua, "_source", lambda _: ECHO)
    return lua.script("echo", LIMIT=9)


def test_all_that_is_passed_arrives_byte_for_byte_and_in_order(
    echo: lua.Script, client: redis.Redis
) -> None:
    assert echo(client, **VALUES) == ANSWER


def test_groups_may_be_empty(echo: lua.Script, client: redis.Redis) -> None:
    empty: dict[str, Any] = {"sources": [], "values": [], "others": [], "rest": []}
    expected = [b"7", [], [], b"t\xff", [], b"r:", 9, []]
    assert echo(client, **VALUES | empty) == expected


def test_a_large_group_arrives(echo: lua.Script, client: redis.Redis) -> None:
    many = [str(number) for number in range(20_000)]
    assert echo(client, **VALUES | {"values": many})[2] == [one.encode() for one in many]


def test_a_script_is_sent_once_and_again_when_the_server_forgot_it(
    echo: lua.Script, client: redis.Redis
) -> None:
    for _ in range(2):
        assert client.script_exists(echo.sha) == [False]
        for _ in range(2):
            assert echo(client, **VALUES) == ANSWER
        assert client.script_exists(echo.sha) == [True]
        client.script_flush()


def test_a_raw_command_with_the_text_has_the_server_keep_it(
    echo: lua.Script, client: redis.Redis
) -> None:
    run: Any = client.execute_command
    with pytest.raises(redis.exceptions.NoScriptError):
        run(*echo.command(**VALUES))
    assert run(*echo.command_with_text(**VALUES)) == ANSWER
    assert run(*echo.command(**VALUES)) == ANSWER


def test_an_error_of_a_script_is_raised(monkeypatch: pytest.MonkeyPatch, client: redis.Redis) -> None:
    text = "--- Fail.\nreturn redis.call('LPUSH')\n"
    monkeypatch.setattr(lua, "_source", lambda _: text)
    failing = lua.script("failing")
    for _ in range(2):
        with pytest.raises(redis.ResponseError):
            failing(client)


def test_a_script_runs_on_an_event_loop(echo: lua.Script, url: str) -> None:
    async def run() -> None:
        client: AsyncRedis
        async with redis.asyncio.Redis.from_url(url) as client:
            for _ in range(2):
                assert await echo.call_async(client, **VALUES) == ANSWER
                assert await echo.call_async(client, **VALUES) == ANSWER
                await client.script_flush()

    asyncio.run(run())


@pytest.mark.parametrize("name", sorted(FILES.keys() - INCLUDED))
def test_every_script_of_the_package_compiles(name: str, client: redis.Redis) -> None:
    texts = [FILES[name]]
    texts += [FILES[one] for kind, one in lua._declarations(FILES[name]) if kind == "include"]
    constants = {one: 1 for text in texts for kind, one in lua._declarations(text) if kind == "constant"}
    found = lua.script(name, **constants)
    assert client.script_load(found.text) == found.sha
