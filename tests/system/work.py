"""Tasks in flight, each with the answer that it must get."""

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

LOADED: dict[str, Any] = {"simulated_per_token_s": 0.0016, "batch_tokens": 1024}
"""Settings with which three devices compute for some seconds on ``IN_FLIGHT`` texts."""

IN_FLIGHT = 1200
SPARE = 200
"""Tasks that may end between the filling and the fault."""

LEAST_COSINE = 0.99999
WIDTH = 384
_numbers = itertools.count()


@dataclass
class Work:
    """Texts, each sent once, and their results."""

    client: redis.Redis
    sent: dict[str, EmbedResult] = field(default_factory=dict)
    errors: dict[str, type[Exception]] = field(default_factory=dict)
    """The error that each text which cannot be embedded must get."""

    options: dict[str, Any] = field(default_factory=dict)

    def send(
        self, texts: Iterable[str], *, error: type[Exception] | None = None, **options: Any
    ) -> None:
        for text in texts:
            self.sent[text] = embed.apply_async((text,), **{**self.options, **options})
            if error is not None:
                self.errors[text] = error

    def in_flight(self) -> int:
        """Return a lower bound: it takes every key on the server for a result."""
        return len(self.sent) - self.client.dbsize()

    def fill(self, fleet: LocalFleet, **options: Any) -> None:
        """Bring ``IN_FLIGHT`` tasks and some to spare in flight, and a device to work on them."""
        with frozen(*map(fleet.pid, fleet.router_names)):  # else a fast fleet would keep up
            while self.in_flight() < IN_FLIGHT + SPARE:
                self.send((f"text {next(_numbers)}" for _ in range(100)), **options)
        wait_until(lambda: any(device.held for device in fleet.status().devices))

    def check(self, *, timeout: float = 60) -> None:
        """Check that every task ends as it must."""
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
