"""``sutra models``: what the registry holds, and which version of a model serves."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from sutra_tasks.cli.server import connected
from sutra_tasks.encoding.models import locate, registry
from sutra_tasks.errors import ModelError, SettingsError
from sutra_tasks.fleet.promotion import await_served, promote
from sutra_tasks.models.gate import Floor
from sutra_tasks.models.manifest import Facts

if TYPE_CHECKING:
    import redis

    from sutra_tasks.models.store import ModelStore
    from sutra_tasks.settings import Settings

__all__ = ["run_add", "run_list", "run_promote", "run_rollback", "store_of"]

MB = 1_000_000


def store_of(options: Settings) -> ModelStore:
    """Return the registry.

    Raises:
        SettingsError: ``SUTRA_MODELS_DIR`` is not set.
    """
    store = registry(options)
    if store is None:
        raise SettingsError("SUTRA_MODELS_DIR", "", "not set: the folder with the registry of models")
    return store


def run_list(options: Settings, name: str | None, *, as_json: bool) -> None:
    """Print models and versions, the newest first."""
    store = store_of(options)
    names = store.names() if name is None else [name]
    rows = [(one, manifest) for one in names for manifest in reversed(store.versions(one))]
    if as_json:
        facts = [{**_facts(m), "serves": store.current(one) == m.version} for one, m in rows]
        print(json.dumps(facts, indent=2))  # noqa: T201 - this is the output
        return
    if not rows:
        Console().print(
            "no models. Make one with sutra distill, or add one: sutra models add NAME MODEL"
        )
        return
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    drawn.add_column("model", no_wrap=True, overflow="fold")
    for column in ("serves", "made of", "created"):
        drawn.add_column(column, overflow="fold")
    for column in ("width", "MB", "cosine", "spearman", "speed"):
        drawn.add_column(column, justify="right")
    for one, manifest in rows:
        metrics = manifest.metrics
        drawn.add_row(
            f"{one}@{manifest.version}",
            "[green]yes[/]" if store.current(one) == manifest.version else "",
            manifest.parent.model if manifest.parent is not None else "",
            datetime.fromtimestamp(manifest.created_at, UTC).strftime("%Y-%m-%d"),
            str(manifest.width),
            f"{manifest.bytes / MB:,.1f}",
            *(
                _shown(metrics.get(key))
                for key in ("cosine_similarity", "spearman", "speed_improvement")
            ),
        )
    Console().print(drawn)


def run_add(options: Settings, name: str, model: str) -> None:
    """Copy a model into the registry as a new version."""
    # torch takes seconds to import: only here.
    from sutra_tasks.encoding.engines import load_engine
    from sutra_tasks.encoding.golden import Golden

    store, folder = store_of(options), Path(locate(model))
    if not folder.is_dir():
        raise ModelError(model, "is no folder on this machine; download it first, and give its folder")
    encoder = load_engine(options, model, folder)
    golden = Golden.of(encoder).to_json()
    facts = Facts(space=encoder.card.space, width=encoder.card.width, golden=golden, metrics={})
    manifest = store.add(name, folder, facts)
    version = manifest.version
    Console().print(f"{name}@{version} is there. Have it serve: sutra models promote {name} {version}")


def run_promote(
    options: Settings,
    name: str,
    version: int,
    *,
    cosine: float | None,
    spearman: float | None,
    ndcg: float | None,
) -> None:
    """Have a version serve, and say who does."""
    store = store_of(options)
    floor = Floor(cosine=cosine, spearman=spearman, ndcg=ndcg)
    console = Console()
    if options.broker_url is None:
        raise SettingsError("SUTRA_BROKER_URL", "", "not set: which fleet is to serve it?")
    with console.status(f"devices load {name}@{version} aside ..."):
        devices = promote(connected(options), store, name, version, floor=floor, options=options)
    if devices:
        console.print(f"{name}@{version} serves on {', '.join(devices)}")
    else:
        console.print(f"{name}@{version} serves from now on; no device has {name} in memory yet")


def run_rollback(options: Settings, name: str) -> None:
    """Have the version before serve again; devices check it as they load it."""
    store = store_of(options)
    version = store.rollback(name)
    console = Console()
    client: redis.Redis = connected(options)
    with console.status(f"devices go back to {name}@{version} ..."):
        await_served(client, store, name, options)
    console.print(f"{name}@{version} serves again")


def _facts(manifest: Any) -> dict[str, Any]:
    facts = asdict(manifest)
    facts.pop("golden")
    facts.pop("files")
    return facts


def _shown(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else ""
