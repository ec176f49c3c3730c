"""Work under way, with the answer that each piece of it must get."""

import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import redis

from sutra_tasks import embed, keys
from sutra_tasks.client.results import EmbedResult
from sutra_tasks.engines.simulated_engine import vectors_of
from tests.conftest import wait_until
from tests.system.local_fleet import LocalFleet, frozen

LOADED: dict[str, Any] = {"simulated_per_token_s": 0.001, "batch_tokens": 1024}
"""What makes a fleet of three compute for some seconds on as much as is in flight."""

IN_FLIGHT = 2000
SPARE = 300
"""Tasks that may end between the filling and the fault."""

LEAST_COSINE = 0.99999
WIDTH = 384
_numbers = itertools.count()


@dataclass
class Work:
    """Texts that were sent, each once, and what becomes of them."""

    client: redis.Redis
    sent: dict[str, EmbedResult] = field(default_factory=dict)
    errors: dict[str, type[Exception]] = field(default_factory=dict)
    """What must become of the texts that cannot be embedded."""

    options: dict[str, Any] = field(default_factory=dict)

    def send(
        self, texts: Iterable[str], *, error: type[Exception] | None = None, **options: Any
    ) -> None:
        for text in texts:
            self.sent[text] = embed.apply_async((text,), **{**self.options, **options})
            if error is not None:
                self.errors[text] = error

    def in_flight(self) -> int:
        """Count from below: what is stored beside the results makes it less."""
        return len(self.sent) - self.client.dbsize()

    def fill(self, fleet: LocalFleet, **options: Any) -> None:
        """Have a little more than so many tasks under way, and a device at work on them."""
        with frozen(*map(fleet.pid, fleet.router_names)):  # or a fast fleet would keep up
            while self.in_flight() < IN_FLIGHT + SPARE:
                self.send((f"text {next(_numbers)}" for _ in range(100)), **options)
        wait_until(lambda: any(device.held for device in fleet.status().devices))

    def check(self, *, timeout: float = 60) -> None:
        """See every task end as it must."""
        texts = [text for text in self.sent if text not in self.errors]
        got = np.vstack([self.sent[text].get(timeout=timeout) for text in texts])
        assert got.shape == (len(texts), WIDTH)
        assert np.isfinite(got).all()
        cosines = np.sum(got * vectors_of(texts, WIDTH), axis=1, dtype=np.float64)
        assert cosines.min() >= LEAST_COSINE
        for text, error in self.errors.items():
            with pytest.raises(error):
                self.sent[text].get(timeout=timeout)

    def ids(self) -> set[str]:
        return {result.id for result in self.sent.values()}


def tasks_in_flight(client: redis.Redis, incarnation: str) -> set[str]:
    """Return the ids of the tasks a worker holds."""
    messages: Any = client.lrange(keys.in_flight(incarnation), 0, -1)
    return {json.loads(message)["headers"]["id"] for message in messages}
