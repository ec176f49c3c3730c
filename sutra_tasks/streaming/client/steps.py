"""Runs the decisions of a producer or a reader, on a thread or on an event loop.

A decision is a generator without I/O. It yields the next step (a command, a script, a pause, the
caller's next text), is sent the step's answer or gets its exception thrown in, and returns the result of
the call. :func:`run` takes the steps on a thread and :func:`run_async` on an event loop, so both
kinds of classes share one logic. psycopg 3 is built in the same way.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

import redis
import redis.asyncio

from sutra_tasks.errors import StreamFaultError
from sutra_tasks.server_check import explain
from sutra_tasks.server_errors import is_denial, is_permanent, server_words

if TYPE_CHECKING:
    from sutra_tasks.lua import Script
    from sutra_tasks.settings import Settings

__all__ = [
    "END",
    "REPEAT_S",
    "SERVER_ERRORS",
    "Command",
    "NextItem",
    "RunScript",
    "Sleep",
    "Step",
    "Steps",
    "perform",
    "perform_async",
    "raise_if_refused",
    "run",
    "run_async",
]

SERVER_ERRORS: Final = (redis.RedisError, OSError)
"""Errors of the server and its connection: a step is repeated unless :func:`raise_if_refused` raises."""
REPEAT_S: Final = 0.25
"""Seconds until a step without an answer is repeated. Devices free a server that is out of memory."""
END: Final = object()
"""The answer to :class:`NextItem` when the source has no more items."""


@dataclass(frozen=True, slots=True)
class Command:
    """Call ``method`` of the redis-py client with ``arguments``."""

    method: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RunScript:
    """Run a script on the server with a value for each declared name."""

    script: Script
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Sleep:
    """Wait."""

    seconds: float


@dataclass(frozen=True, slots=True)
class NextItem:
    """Take the next item of ``source``, an (asynchronous) iterator; :data:`END` if none is left."""

    source: Any


Step: TypeAlias = Command | RunScript | Sleep | NextItem
Result = TypeVar("Result")
Steps: TypeAlias = Generator[Step, Any, Result]


def raise_if_refused(stream: str, error: Exception) -> None:
    """Raise :class:`StreamFaultError` if ``error`` is a refusal, which no repetition changes."""
    if is_permanent(error):
        raise StreamFaultError(stream, server_words(error)) from None


def run(steps: Steps[Result], perform: Callable[[Step], Any]) -> Result:
    """Take all steps on this thread and return the result.

    Args:
        steps: the generator, not started.
        perform: takes one step and returns its answer; :func:`perform` with a client.
    """
    try:
        step = next(steps)
        while True:
            try:
                answer = perform(step)
            except Exception as error:  # noqa: BLE001 - the generator decides about it
                step = steps.throw(error)
            else:
                step = steps.send(answer)
    except StopIteration as end:
        result: Result = end.value
        return result


async def run_async(steps: Steps[Result], perform: Callable[[Step], Awaitable[Any]]) -> Result:
    """Take all steps on the event loop; otherwise as :func:`run`."""
    try:
        step = next(steps)
        while True:
            try:
                answer = await perform(step)
            except Exception as error:  # noqa: BLE001 - the generator decides about it
                step = steps.throw(error)
            else:
                step = steps.send(answer)
    except StopIteration as end:
        result: Result = end.value
        return result


@contextmanager
def _denials_explained(options: Settings, role: str) -> Iterator[None]:
    """Raise the error that names the missing right in place of the server's."""
    try:
        yield
    except redis.ResponseError as error:
        if is_denial(error):
            raise explain(error, options, role) from error
        raise


def perform(
    step: Step,
    *,
    client: redis.Redis,
    options: Settings,
    role: str,
    sleep: Callable[[float], object] = time.sleep,
) -> Any:
    """Take one step on this thread and return its answer.

    Args:
        step: to take.
        client: of the server with the streams.
        options: with its address.
        role: whose rights are checked if the server denies one.
        sleep: waits.

    Raises:
        MissingRightsError: the server's user may not do this.
    """
    with _denials_explained(options, role):
        match step:
            case NextItem(source):
                return next(source, END)
            case RunScript(script, values):
                return script(client, **values)
            case Command(method, arguments):
                return getattr(client, method)(**arguments)
            case Sleep(seconds):
                return sleep(seconds)


async def perform_async(step: Step, *, client: redis.asyncio.Redis, options: Settings, role: str) -> Any:
    """Take one step on the event loop and return its answer; otherwise as :func:`perform`."""
    with _denials_explained(options, role):
        match step:
            case NextItem(source):
                return await anext(source, END) if hasattr(source, "__anext__") else next(source, END)
            case RunScript(script, values):
                return await script.call_async(client, **values)
            case Command(method, arguments):
                return await getattr(client, method)(**arguments)
            case Sleep(seconds):
                return await asyncio.sleep(seconds)
