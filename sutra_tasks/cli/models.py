"""``sutra models``: lists, adds, promotes and rolls back versions of models."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from redis.exceptions import RedisError
from rich.console import Console
from rich.table import Table

from sutra_tasks.cli.screen import plain
from sutra_tasks.cli.server import connected
from sutra_tasks.engines.model_folder import locate
from sutra_tasks.errors import ModelError, SettingsError, SutraError
from sutra_tasks.models.loaded.single_flight import SingleFlight, StillRunning
from sutra_tasks.models.registry.manifest import VersionFacts
from sutra_tasks.models.registry.resolve import open_registry
from sutra_tasks.models.rollout.gate import Thresholds
from sutra_tasks.models.rollout.promotion import promote, wait_until_served

if TYPE_CHECKING:
    import redis

    from sutra_tasks.models.registry.manifest import Manifest
    from sutra_tasks.models.registry.model_registry import ModelRegistry
    from sutra_tasks.settings import Settings

__all__ = ["required_registry", "run_add", "run_list", "run_promote", "run_rollback"]

MB: Final = 1_000_000
STORAGE_S: Final = 5.0
"""Seconds that the registry's storage may take to answer for one model."""

Answer = TypeVar("Answer")


def required_registry(options: Settings) -> ModelRegistry:
    """Return the registry.

    Raises:
        SettingsError: ``SUTRA_MODELS_DIR`` is not set.
    """
    registry = open_registry(options)
    if registry is None:
        raise SettingsError("SUTRA_MODELS_DIR", "", "not set: the folder with the registry of models")
    return registry


def run_list(options: Settings, name: str | None, *, as_json: bool) -> None:
    """Print models and versions, the newest first."""
    rows, errors = _versions(required_registry(options), name)
    if name is not None and errors and not rows:
        raise errors[0]
    for error in errors:  # cost the other versions nothing
        Console(stderr=True).print(str(error), style="yellow", markup=False, highlight=False)
    if as_json:
        facts = [{**_facts(manifest), "serves": serves} for manifest, serves in rows]
        print(json.dumps(facts, indent=2))  # noqa: T201 - this is the output
        return
    if not rows:
        Console().print(
            "no models. Make one with sutra distill, or add one: sutra models add NAME MODEL"
        )
        return
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    drawn.add_column("model", no_wrap=True, overflow="fold")
    for column in ("serves", "created"):
        drawn.add_column(column, no_wrap=True)
    for column in ("width", "MB", "kept", "spearman", "speed"):
        drawn.add_column(column, justify="right", no_wrap=True)
    for manifest, serves in rows:
        metrics = manifest.metrics
        drawn.add_row(
            plain(f"{manifest.name}@{manifest.version}"),
            "[green]yes[/]" if serves else "",
            datetime.fromtimestamp(manifest.created_at, UTC).strftime("%Y-%m-%d"),
            str(manifest.width),
            f"{manifest.bytes / MB:,.1f}",
            *(_shown(metrics.get(key)) for key in ("lifted_cosine", "spearman", "speed_improvement")),
        )
    Console().print(drawn)


def _versions(
    registry: ModelRegistry, name: str | None
) -> tuple[list[tuple[Manifest, bool]], list[SutraError]]:
    """Return the versions of one model or of all, whether each serves, and what cannot be read."""
    rows, errors = [], []
    for one in _answered("the registry", registry.names) if name is None else (name,):
        try:
            found, current = _answered(one, partial(_inspected, registry, one))
        except SutraError as error:
            errors.append(error)
            continue
        for version in found:
            if isinstance(version, SutraError):
                errors.append(version)
            else:
                rows.append((version, version.version == current))
    return rows, errors


def _inspected(registry: ModelRegistry, name: str) -> tuple[list[Manifest | SutraError], int | None]:
    """Return the versions of a model, the newest first, and which of them serves."""
    return registry.inspect(name)[::-1], registry.current(name)


def _answered(what: str, read: Callable[[], Answer]) -> Answer:
    """Return what is read from the registry.

    Raises:
        ModelError: its storage does not answer.
    """
    try:
        answer: Answer = SingleFlight[Any]().do(what, read, STORAGE_S)
    except StillRunning:
        raise ModelError(
            what,
            f"its files cannot be read, no answer for {STORAGE_S:.0f} s: does their storage hang?",
        ) from None
    return answer


def run_add(options: Settings, name: str, model: str) -> None:
    """Copy a model into the registry as a new version."""
    # torch takes seconds to import: only here.
    from sutra_tasks.engines.golden import GoldenVectors
    from sutra_tasks.engines.load import load_engine

    registry, folder = required_registry(options), Path(locate(model))
    if not folder.is_dir():
        raise ModelError(model, "is no folder on this machine; download it first, and give its folder")
    # The fleet may be simulated; a version in the registry is not.
    encoder = load_engine(replace(options, engine="torch"), model, folder)
    golden = GoldenVectors.of(encoder)
    if (fault := golden.fault()) is not None:
        raise ModelError(model, fault)
    facts = VersionFacts(
        space=encoder.info.space, width=encoder.info.width, golden=golden.to_json(), metrics={}
    )
    manifest = registry.add(name, folder, facts)
    version = manifest.version
    Console().print(
        plain(f"{name}@{version} is there. Have it serve: sutra models promote {name} {version}")
    )


def run_promote(
    options: Settings,
    name: str,
    version: int,
    *,
    cosine: float | None,
    spearman: float | None,
    ndcg: float | None,
) -> None:
    """Promote a version, and print the devices that serve it."""
    registry = required_registry(options)
    thresholds = Thresholds(cosine=cosine, spearman=spearman, ndcg=ndcg)
    console = Console()
    if options.broker_url is None:
        raise SettingsError("SUTRA_BROKER_URL", "", "not set: which fleet is to serve it?")
    with console.status(plain(f"devices load {name}@{version} aside ...")):
        devices = promote(
            connected(options), registry, name, version, thresholds=thresholds, options=options
        )
    if devices:
        console.print(plain(f"{name}@{version} serves on {', '.join(devices)}"))
    else:
        console.print(plain(f"{name}@{version} serves from now on; no device has {name} in memory yet"))


def run_rollback(options: Settings, name: str) -> None:
    """Roll back to the previous version; its files are checked here, its vectors by the devices."""
    registry = required_registry(options)
    client: redis.Redis = connected(options)
    registry.verify(name, registry.previous(name))
    version = registry.rollback(name)
    console = Console()
    try:
        with console.status(plain(f"devices go back to {name}@{version} ...")):
            wait_until_served(client, registry, name, options)
    except (SutraError, RedisError) as error:
        raise SutraError(
            f"the registry went back: {name}@{version} is what devices are to serve, and what those "
            f"that start load. But not all of them were seen to: {error}"
        ) from None
    console.print(plain(f"{name}@{version} serves again"))


def _facts(manifest: Any) -> dict[str, Any]:
    facts = asdict(manifest)
    facts.pop("golden")
    facts.pop("files")
    return facts


def _shown(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else ""
