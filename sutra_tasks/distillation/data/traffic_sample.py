"""A uniform sample of the texts of real calls, kept on the server if ``SUTRA_SAMPLE_TEXTS`` is set.

A text's priority is a keyed hash of it, and the ``k`` texts of lowest priority are the sample: a
bottom-k sketch (Cohen and Kaplan, 2007). So every distinct text is equally likely to be in the sample,
however often it was sent, and any number of devices fill one sample without counting. Once the sample
is full, a device sends a text only if it enters the sample, and each text once.

Texts are stored in one sorted set for each quarter of the retention, which expires as a whole: no text
is kept for longer than the retention, and each for three quarters of it at least. The server stores at
most five times ``k`` texts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final

from sutra_tasks import keys, lua

if TYPE_CHECKING:
    import redis

    from sutra_tasks.settings import Settings

__all__ = ["MOST_CHARS", "PERIODS", "TrafficSample", "open_sample", "priority"]

MOST_CHARS: Final = 2_000
"""Longer texts are never sampled."""
PERIODS: Final = 4
"""Sorted sets in one retention."""
OFFERED_AT_ONCE: Final = 1_000

OFFER: Final = lua.script("distillation/data/offer")


def priority(text: str, salt: bytes) -> float:
    """Return a text's priority in a draw, 0 to under 1: random, but the same for the same text.

    Args:
        text: valid Unicode.
        salt: at most 64 bytes; another salt draws another sample.

    Raises:
        UnicodeEncodeError: the text has a lone surrogate.
    """
    drawn = blake2b(text.encode(), key=salt, digest_size=8).digest()
    # A float, and so a sorted set's score, holds exactly 53 bits.
    return (int.from_bytes(drawn) >> 11) / 2**53


class TrafficSample:
    """One device's access to the sample; safe to use from many threads.

    Args:
        client: of the server; without ``decode_responses``.
        texts: most that each quarter of the retention keeps, and that :meth:`texts` returns.
        retention_s: seconds after which a text is deleted, at most.
        key: returns the key of a period's sorted set, given the period's number.
        salt: decides priorities; the same on all devices.
        most_chars: longer texts are never sampled.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        client: redis.Redis,
        *,
        texts: int,
        retention_s: int,
        key: Callable[[int], str],
        salt: bytes = b"",
        most_chars: int = MOST_CHARS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._client = client
        self._texts, self._retention_s, self._most_chars = texts, retention_s, most_chars
        self._key, self._salt, self._clock = key, salt, clock
        self._lock = threading.Lock()
        self._bound: tuple[int, float] = (-1, 1.0)  # a period, and the priority below which texts enter
        self._sent: set[float] = set()  # priorities of texts that were sent in this period

    def offer(self, texts: Iterable[str]) -> int:
        """Offer texts to the sample; return how many were sent to the server, mostly none.

        Raises:
            redis.RedisError: the server does not answer; these texts are not sampled.
        """
        period = self._period()
        sent, bound = self._state(period)
        fresh: dict[str, float] = {}
        for text in texts:
            if len(text) > self._most_chars or not text.strip():
                continue
            try:
                drawn = priority(text, self._salt)
            except UnicodeEncodeError:
                continue
            if drawn < bound and drawn not in sent:
                fresh[text] = drawn
        # The lowest first: if not all can be sent at once, these are the ones that would stay.
        chosen = sorted(fresh.items(), key=lambda one: one[1])[: min(self._texts, OFFERED_AT_ONCE)]
        if chosen:
            highest: Any = OFFER(
                self._client,
                sample=self._key(period),
                most=self._texts,
                ttl_s=self._ttl_s(period),
                entries=[part for text, drawn in chosen for part in (repr(drawn), text)],
            )
            bound = 1.0 if highest is None else float(highest)
            self._note(period, bound, {drawn for _, drawn in chosen})
        return len(chosen)

    def texts(self) -> list[str]:
        """Return the sample of the whole retention: at most ``texts``, in the order of their priorities.

        Raises:
            redis.RedisError: the server does not answer.
        """
        found: dict[bytes, float] = {}
        for name in self._names():
            rows: Any = self._client.zrange(name, 0, self._texts - 1, withscores=True)
            found.update(rows)
        chosen = sorted(found.items(), key=lambda one: (one[1], one[0]))[: self._texts]
        return [text.decode() for text, _ in chosen]

    def forget(self) -> None:
        """Delete the whole sample.

        Raises:
            redis.RedisError: the server does not answer; the texts expire with their periods.
        """
        self._client.delete(*self._names())
        with self._lock:
            self._bound, self._sent = (-1, 1.0), set()

    def _period_s(self) -> float:
        return self._retention_s / PERIODS

    def _period(self) -> int:
        return int(self._clock() // self._period_s())

    def _names(self) -> list[str]:
        now = self._period()
        return [self._key(period) for period in range(now - PERIODS, now + 1)]

    def _ttl_s(self, period: int) -> int:
        # Counted from the period's start: its first text must not outlive the retention.
        left_s = period * self._period_s() + self._retention_s - self._clock()
        return max(1, int(left_s))

    def _state(self, period: int) -> tuple[set[float], float]:
        with self._lock:
            if self._bound[0] != period:
                self._bound, self._sent = (period, 1.0), set()
            return self._sent, self._bound[1]

    def _note(self, period: int, bound: float, priorities: set[float]) -> None:
        with self._lock:
            if self._bound[0] != period:
                return
            self._bound = (period, bound)
            # A new set, because other threads read the old one; texts above the bound never come back.
            self._sent = {one for one in self._sent | priorities if one <= bound}


def open_sample(client: redis.Redis, options: Settings) -> TrafficSample | None:
    """Return the sample of real traffic; None if the deployment keeps none."""
    if not options.sample_texts:
        return None
    return TrafficSample(
        client, texts=options.sample_texts, retention_s=options.sample_retention_s, key=keys.sample
    )
