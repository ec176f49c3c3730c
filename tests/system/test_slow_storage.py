"""A model whose storage hangs holds up those who ask for it, and nobody else."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import redis

from sutra_tasks import embed
from sutra_tasks.engines.simulated_engine import vectors_of
from sutra_tasks.membership.fleet import fleet_members
from sutra_tasks.models.registry.model_registry import ModelRegistry
from tests.conftest import wait_until
from tests.hanging import hanging, needs_leases
from tests.system.registry import WIDTH, add_version


@needs_leases
def test_calls_for_other_models_are_served_while_one_cannot_be_read(
    start_fleet: Callable[..., Any], client: redis.Redis, tmp_path: Path
) -> None:
    (tmp_path / "models").mkdir()
    store = ModelRegistry(tmp_path / "models")
    for name in ("slow", "quick"):
        add_version(store, name, tmp_path / "sources")
        store.promote(name, 1)
    options = {"models_dir": str(tmp_path / "models"), "task_threads": 4}
    with start_fleet(1, **options) as fleet:
        with hanging(store.folder("slow", 1) / "weights"):
            slow = [embed.delay(f"slow {at}", model="slow") for at in range(8)]  # two for each thread
            for model, prefix in ((None, ""), ("quick", "quick@1"), (None, "")):
                got = embed.delay("a text", model=model).get(timeout=10)
                assert np.allclose(got, vectors_of([f"{prefix}a text"], WIDTH)[0], atol=1e-6)
            before = time.time()
            fleet_seen = fleet_members(client)
            assert all(one.is_live(fleet.options.device_ttl_s) for one in fleet_seen)
            assert time.time() - before < 1
            assert not any(one.ready() for one in slow)
        for at, result in enumerate(slow):
            expected = vectors_of([f"slow@1slow {at}"], WIDTH)[0]
            assert np.allclose(result.get(timeout=20), expected, atol=1e-6)


@needs_leases
def test_a_device_whose_first_model_cannot_be_read_lives_and_says_what_it_waits_for(
    start_fleet: Callable[..., Any], client: redis.Redis, tmp_path: Path
) -> None:
    (tmp_path / "models").mkdir()
    store = ModelRegistry(tmp_path / "models")
    add_version(store, "slow", tmp_path / "sources")
    store.promote("slow", 1)
    options = {"models_dir": str(tmp_path / "models"), "model": "slow", "await_live": False}

    def reasons() -> list[str]:
        return [one.record.reason for one in fleet_members(client) if one.record is not None]

    with ExitStack() as stack:
        stack.enter_context(hanging(store.folder("slow", 1) / "weights"))
        with start_fleet(1, **options) as fleet:
            wait_until(lambda: any("slow is being loaded, for 1 s" in reason for reason in reasons()))
            assert all(one.is_live(fleet.options.device_ttl_s) for one in fleet_members(client))
            stack.close()
            got = embed.delay("a text").get(timeout=20)
            assert np.allclose(got, vectors_of(["slow@1a text"], WIDTH)[0], atol=1e-6)
