"""The commands and their options; a module for each command does the work."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import redis
from kombu.exceptions import OperationalError

from sutra_tasks.decoding import text_encoding
from sutra_tasks.errors import SettingsError, SutraError
from sutra_tasks.extras import how_to_install
from sutra_tasks.server_check import explain
from sutra_tasks.server_errors import is_denial, server_words
from sutra_tasks.settings import ENGINES, PREFIX, Settings, settings

__all__ = ["cli"]

INTERRUPTED = 130
NEWLINE = "\n"
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")


class _Cli(click.Group):
    """Prints errors of this package as one line, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, click.Abort):
            sys.exit(INTERRUPTED)
        except BrokenPipeError:
            raise  # who read the output has gone: click ends in silence
        except Exception as error:
            line = _line(error)
            if line is None:
                raise
            from sutra_tasks.cli.screen import printable

            click.echo(f"sutra: {printable(line, keep=NEWLINE)}", err=True)
            sys.exit(2 if isinstance(error, SettingsError) else 1)


def _line(error: Exception) -> str | None:
    """Return an error in one line for people; None: it is a fault of this package."""
    if isinstance(error, SutraError | OSError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return how_to_install(error)
    if isinstance(error, redis.RedisError) and is_denial(error):
        return str(explain(error, settings(), "operator"))
    if isinstance(error, redis.RedisError | OperationalError):
        return f"the server did not do it: {server_words(error)}"
    return None


@click.group(cls=_Cli, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sutra-tasks")
def cli() -> None:
    """Text embeddings as Celery tasks."""


def _overridden(**given: Any) -> Settings:
    try:
        return replace(settings(), **{name: v for name, v in given.items() if v is not None})
    except SettingsError as error:
        option = "--" + error.variable.removeprefix(PREFIX).lower().removesuffix("_url")
        raise SettingsError(option, error.value, error.reason) from None


def _text_encoding(ctx: click.Context, param: click.Parameter, name: str | None) -> str | None:  # noqa: ARG001 - click's shape
    found = text_encoding(name) if name is not None else None
    if name is not None and found is None:
        raise click.BadParameter(f"{name!r} is no encoding of texts; latin-1, cp1252 and utf-16 are.")
    return found


_encoding = click.option(
    "--encoding",
    metavar="NAME",
    callback=_text_encoding,
    help="Of the file or standard input; default: by its byte-order mark, else UTF-8.",
)


@cli.command()
@click.option("--devices", type=int, metavar="N", help="Devices; default: one per GPU, else per core.")
@click.option(
    "--replicas-per-device",
    type=int,
    default=1,
    show_default=True,
    metavar="N",
    help="Workers on each device, each with its share of the memory.",
)
@click.option("--model", metavar="NAME", help="A sentence-transformers name or folder.")
@click.option("--engine", type=click.Choice(ENGINES), help="What computes the vectors.")
@click.option(
    "--broker",
    metavar="URL",
    help="Redis or Valkey to use; default: start one on loopback. Everybody on this machine can see an "
    "option: set SUTRA_BROKER_URL instead if there is a password in it.",
)
@click.option(
    "--port",
    type=click.IntRange(1, 65_535),
    metavar="P",
    help="Port of the server it starts; default: 6379 if free.",
)
@click.option("--flower", is_flag=True, help="Open Flower on http://127.0.0.1:5555.")
@click.option(
    "--log-level",
    type=click.Choice(LOG_LEVELS, case_sensitive=False),
    default="warning",
    show_default=True,
    help="Of the workers.",
)
def up(
    *,
    devices: int | None,
    replicas_per_device: int,
    model: str | None,
    engine: str | None,
    broker: str | None,
    port: int | None,
    flower: bool,
    log_level: str,
) -> None:
    """Start a fleet on this machine and keep it alive until Ctrl-C."""
    from sutra_tasks.cli.up import run

    options = _overridden(model=model, engine=engine, broker_url=broker)
    run(
        options,
        devices=devices,
        replicas=replicas_per_device,
        port=port,
        flower=flower,
        log_level=log_level,
    )


@cli.command()
@click.argument("source", metavar="TEXT|FILE|-")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A .npy or .jsonl file; default: JSON lines on the screen.",
)
@click.option("--prompt", help="One of the model's named prompts, such as query.")
@click.option("--dimensions", type=int, help="Width of the vectors, for Matryoshka models.")
@_encoding
@click.option("--jsonl", "as_jsonl", is_flag=True, help="Lines of standard input are JSON.")
def embed(
    *,
    source: str,
    out: Path | None,
    prompt: str | None,
    dimensions: int | None,
    encoding: str | None,
    as_jsonl: bool,
) -> None:
    """Embed a text, the texts of a file, or those of standard input.

    A file's suffix says where its texts are: .jsonl, a string or an object with "text" on each line;
    .csv and .parquet, the column "text"; in any other file and on standard input each line is one.
    """
    from sutra_tasks.cli.embedding import run

    run(source, out, prompt=prompt, dimensions=dimensions, encoding=encoding, as_jsonl=as_jsonl)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON.")
def status(*, as_json: bool) -> None:
    """Show the fleet: its devices, what they have done, and what waits."""
    from sutra_tasks.cli.status import run

    run(settings(), as_json=as_json)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON.")
def health(*, as_json: bool) -> None:
    """Have every device exercise its model now, and show how it is."""
    from sutra_tasks.cli.health import run

    run(settings(), as_json=as_json)


@cli.group("dead-letters")
def dead_letters() -> None:
    """Messages that were given up because workers died of them."""


@dead_letters.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON.")
def dead_letters_list(*, as_json: bool) -> None:
    """Show them, the oldest first."""
    from sutra_tasks.cli.dead_letters import run_list

    run_list(settings(), as_json=as_json)


def _chosen(task_ids: tuple[str, ...], *, every: bool) -> tuple[str, ...]:
    if bool(task_ids) == every:
        raise click.UsageError("name tasks, or --all")
    return task_ids


@dead_letters.command("retry")
@click.argument("task_ids", nargs=-1, metavar="[TASK]...")
@click.option("--all", "every", is_flag=True, help="All of them.")
def dead_letters_retry(task_ids: tuple[str, ...], *, every: bool) -> None:
    """Send them again, as if for the first time."""
    from sutra_tasks.cli.dead_letters import run_retry

    run_retry(settings(), _chosen(task_ids, every=every))


@dead_letters.command("drop")
@click.argument("task_ids", nargs=-1, metavar="[TASK]...")
@click.option("--all", "every", is_flag=True, help="All of them.")
def dead_letters_drop(task_ids: tuple[str, ...], *, every: bool) -> None:
    """Forget them for good."""
    from sutra_tasks.cli.dead_letters import run_drop

    run_drop(settings(), _chosen(task_ids, every=every))


@cli.group()
def stream() -> None:
    """Texts in and vectors out, continuously."""


@stream.command("send")
@click.argument("name", metavar="STREAM")
@click.option("--key", help="Standard input is one text of this key, however long; default: one a line.")
@click.option("--jsonl", "as_jsonl", is_flag=True, help='Lines are JSON: {"text": ..., "id": ...}.')
@click.option(
    "--priority", type=click.IntRange(0, 9), default=0, show_default=True, help="From 6 on: may wait."
)
@click.option("--prompt", help="One of the model's named prompts, such as query.")
@_encoding
def stream_send(
    *,
    name: str,
    key: str | None,
    as_jsonl: bool,
    priority: int,
    prompt: str | None,
    encoding: str | None,
) -> None:
    """Send standard input, and wait while the stream is full; Ctrl-C sends what was read."""
    from sutra_tasks.cli.stream import run_send

    sys.exit(
        run_send(name, key=key, priority=priority, prompt=prompt, as_jsonl=as_jsonl, encoding=encoding)
    )


@stream.command("read")
@click.argument("name", metavar="STREAM")
@click.option("--timeout", "timeout_s", type=float, metavar="S", help="Stop after S seconds of silence.")
@click.option("--vectors/--no-vectors", default=True, help="Whether lines hold the vectors.")
def stream_read(*, name: str, timeout_s: float | None, vectors: bool) -> None:
    """Print what comes out as JSON lines; what is printed is acknowledged."""
    from sutra_tasks.cli.stream import run_read

    sys.exit(run_read(name, timeout_s=timeout_s, vectors=vectors))


@stream.command("status")
@click.argument("name", metavar="[STREAM]", required=False)
@click.option("--follow", is_flag=True, help="Until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON.")
def stream_status(*, name: str | None, follow: bool, as_json: bool) -> None:
    """Show backlog, pressure, latencies and quality."""
    from sutra_tasks.cli.stream_status import run_status

    run_status(settings(), only=name, follow=follow, as_json=as_json)


@stream.command("dead-letters")
@click.argument("name", metavar="STREAM")
@click.option("--retry", is_flag=True, help="Send them again, as if for the first time.")
@click.option("--drop", is_flag=True, help="Forget them for good.")
def stream_dead(*, name: str, retry: bool, drop: bool) -> None:
    """Show what was given up, and why: entries, and responses that could not be read."""
    from sutra_tasks.cli.stream_status import run_dead

    if retry and drop:
        raise click.UsageError("--retry or --drop")
    run_dead(settings(), name, retry=retry, drop=drop)


@stream.command("delete")
@click.argument("name", metavar="STREAM")
@click.option("--force", is_flag=True, help="With everything in it.")
def stream_delete(*, name: str, force: bool) -> None:
    """Forget a stream."""
    from sutra_tasks.cli.stream_status import run_delete

    run_delete(settings(), name, force=force)
