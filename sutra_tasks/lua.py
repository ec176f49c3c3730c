"""Lua scripts: files beside the code that uses them, called by keyword and sent by their hash.

A script stands in ``<folder>/<verb>.lua`` and opens with a header, which the loader reads::

    --- Move messages from one list to another.
    ---
    --- @flags    allow-oom    it frees memory: a full server must not refuse it
    --- @key      source       list: messages that a worker has in flight
    --- @keys     targets      lists: where each message goes
    --- @family   record       strings: record .. id is the record of one device
    --- @arg      now_s        Unix time in seconds
    --- @args     messages     each message as it stands in ``source``
    --- @constant MOST_CREDIT  tokens of credit that one message uses at most
    --- @include  broker/load
    --- @returns  how many messages moved

Every name becomes a local of the script: a string for ``key``, ``family`` and ``arg``, a table of
strings for ``keys`` and ``args``, a literal for ``constant``. A ``family`` is the common beginning of
keys whose names the script learns only while it runs; every other key is a ``key`` or in ``keys``.
An included file has functions that several scripts share, and may have constants of its own.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final

from redis.exceptions import NoScriptError

if TYPE_CHECKING:
    import redis
    import redis.asyncio

__all__ = ["Script", "script"]

PACKAGE: Final = "sutra_tasks"
_DECLARATION: Final = re.compile(r"^--- @(\w+)\s+(\S+)")
_GROUP: Final = """
local function take_group(from, before, count)
  local group = {}
  for i = 1, tonumber(count) do group[i] = from[before + i] end
  return group
end
"""

Value = str | bytes | int | float


@dataclass(frozen=True, slots=True)
class Parameter:
    """One name that a header declares: ``key``, ``keys``, ``family``, ``arg`` or ``args``."""

    kind: str
    name: str

    @property
    def is_key(self) -> bool:
        """Whether its values are names of keys that the script is given as such."""
        return self.kind in ("key", "keys")

    @property
    def is_group(self) -> bool:
        """Whether its value is a sequence."""
        return self.kind in ("keys", "args")


class Script:
    """One script of the server; see the module's docstring."""

    def __init__(self, name: str, text: str, parameters: Sequence[Parameter]) -> None:
        """Use :func:`script` instead: it reads the file.

        Args:
            name: its path in the package, without ``.lua``.
            text: what the server gets.
            parameters: in the order in which the header declares them.
        """
        self.name, self.text, self.parameters = name, text, tuple(parameters)
        self.sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        self._names = frozenset(one.name for one in parameters)

    def __call__(self, client: redis.Redis, **values: Any) -> Any:
        """Run the script, and send it first if the server does not have it (any more).

        Args:
            client: of the server.
            **values: one for each declared name; a sequence for ``keys`` and ``args``.

        Raises:
            TypeError: a name is missing, or was not declared.
            redis.RedisError: the server did not run it.
        """
        count, *bound = self._bound(values)
        try:
            return client.evalsha(self.sha, int(count), *bound)
        except NoScriptError:
            return client.eval(self.text, int(count), *bound)  # the server keeps it from here on

    async def call_async(self, client: redis.asyncio.Redis, **values: Any) -> Any:
        """Run the script on an event loop; otherwise as calling it."""
        count, *bound = self._bound(values)
        try:
            return await client.evalsha(self.sha, int(count), *bound)
        except NoScriptError:
            return await client.eval(self.text, int(count), *bound)

    def command(self, **values: Any) -> tuple[Any, ...]:
        """Return the raw command that runs the script, for code that writes to a connection itself.

        If the server answers ``NOSCRIPT``, send :meth:`command_with_text`.
        """
        return ("EVALSHA", self.sha, *self._bound(values))

    def command_with_text(self, **values: Any) -> tuple[Any, ...]:
        """Return the raw command that sends the whole script, which the server keeps, and runs it."""
        return ("EVAL", self.text, *self._bound(values))

    def _bound(self, values: Mapping[str, Any]) -> list[Value]:
        if values.keys() != self._names:
            odd = ", ".join(sorted(values.keys() ^ self._names))
            raise TypeError(f"script {self.name} takes other names than it was given: {odd}")
        names: list[Value] = []
        counts: list[Value] = []
        arguments: list[Value] = []
        for one in self.parameters:
            value = values[one.name]
            target = names if one.is_key else arguments
            if one.is_group:
                counts.append(len(value))
                target.extend(value)
            else:
                target.append(value)
        return [len(names), *names, *counts, *arguments]

    def __repr__(self) -> str:
        return f"<Script {self.name}>"


def script(name: str, **constants: int | str) -> Script:
    """Read a script.

    Args:
        name: its path in the package, without ``.lua``, such as ``broker/take``.
        **constants: the value of each constant that the script, or what it includes, declares.

    Raises:
        TypeError: a constant is missing, or was not declared.
    """
    source = _source(name)
    declared = _declarations(source)
    included = [_source(one) for kind, one in declared if kind == "include"]
    parts = [*declared, *(pair for text in included for pair in _declarations(text))]
    wanted = {one for kind, one in parts if kind == "constant"}
    if wanted != constants.keys():
        odd = ", ".join(sorted(wanted ^ constants.keys()))
        raise TypeError(f"script {name} takes other constants than it was given: {odd}")
    parameters = [
        Parameter(kind, one)
        for kind, one in declared
        if kind in ("key", "keys", "family", "arg", "args")
    ]
    flags = [one for kind, one in declared if kind == "flags"]
    lines = [f"#!lua flags={','.join(flags)}"] if flags else []
    lines += [f"local {one} = {_literal(value)}" for one, value in constants.items()]
    lines += _locals(parameters)
    return Script(name, "\n".join([*lines, *included, source]), parameters)


def _locals(parameters: Sequence[Parameter]) -> list[str]:
    """Return the lines that give each parameter its local."""
    groups = sum(one.is_group for one in parameters)
    lines = [_GROUP.strip()] if groups else []
    place = {"KEYS": "0", "ARGV": str(groups)}
    group = 0
    for one in parameters:
        source = "KEYS" if one.is_key else "ARGV"
        before = place[source]
        if one.is_group:
            group += 1
            lines.append(f"local {one.name} = take_group({source}, {before}, ARGV[{group}])")
            place[source] = f"{before} + #{one.name}"
        else:
            lines.append(f"local {one.name} = {source}[{before} + 1]")
            place[source] = f"{before} + 1"
    return lines


def _declarations(text: str) -> list[tuple[str, str]]:
    """Return what a header declares, in order: kind and name."""
    found = (_DECLARATION.match(line) for line in text.splitlines())
    return [(match[1], match[2]) for match in found if match is not None]


def _source(name: str) -> str:
    return files(PACKAGE).joinpath(f"{name}.lua").read_text("utf-8")


def _literal(value: int | str) -> str:
    return (
        str(value)
        if isinstance(value, int)
        else "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    )
