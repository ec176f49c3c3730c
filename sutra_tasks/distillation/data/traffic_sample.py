r"""A uniform sample of real traffic, kept on the server for a while; only where somebody asked for one.

A text's place in the draw is a keyed hash of itself, and the ``k`` texts of least place are the sample:
a bottom-k sketch (Cohen and Kaplan, 2007). So every distinct text is as likely to be in it, however
often it was sent, and any number of devices fill one sample without a counter. Once it is full few texts
cost a round trip: those that enter it, each once from each device.

Texts live in one sorted set a quarter of the retention, and go with it: none is kept for longer than the
retention, and when one goes, so do those of its quarter. On the server are at most five times ``k``
texts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final

from sutra_tasks import keys

if TYPE_CHECKING:
    import redis

    from sutra_tasks.settings import Settings

__all__ = ["MOST_CHARS", "PERIODS", "TrafficSample", "open_sample", "priority"]

MOST_CHARS: Final = 2_000
PERIODS: Final = 4
"""In one retention: a text is kept for three quarters of it at the least."""

OFFERED_AT_ONCE: Final = 1_000

OFFER: Final = """
for i = 3, #ARGV, 2 do redis.call('ZADD', KEYS[1], 'NX', ARGV[i], ARGV[i + 1]) end
local over = redis.call('ZCARD', KEYS[1]) - tonumber(ARGV[1])
if over > 0 then redis.call('ZREMRANGEBYRANK', KEYS[1], -over, -1) end
if redis.call('TTL', KEYS[1]) < 0 then redis.call('EXPIRE', KEYS[1], ARGV[2]) end
if over < 0 then return false end
return redis.call('ZRANGE', KEYS[1], -1, -1, 'WITHSCORES')[2]
"""
"""Adds texts with their places, keeps the least, and returns the largest place kept if it is full."""


def priority(text: str, salt: bytes) -> float:
    """Return a text's place in a draw, at random but always the same: 0 to under 1.

    Args:
        text: valid Unicode.
        salt: at most 64 bytes; with another, another sample is drawn.

    Raises:
        UnicodeEncodeError: a lone surrogate is in it.
    """
    drawn = blake2b(text.encode(), key=salt, digest_size=8).digest()
    # 53 bits are what a float holds exactly, and what a sorted set's score is.
    return (int.from_bytes(drawn) >> 11) / 2**53


class TrafficSample:
    """Fills and reads the sample. Any thread may call it.

    Args:
        client: of the server; without ``decode_responses``.
        texts: most that are kept of each quarter of the retention, and that :meth:`texts` returns.
        retention_s: seconds after which a text is gone, at most.
        key: name of the sorted set of a period, from the period's number.
        salt: what places depend on, the same for all devices.
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
        self._client, self._script = client, client.register_script(OFFER)
        self._texts, self._retention_s, self._most_chars = texts, retention_s, most_chars
        self._key, self._salt, self._clock = key, salt, clock
        self._lock = threading.Lock()
        self._full: tuple[int, float] = (-1, 1.0)  # a period, and the place under which it takes texts
        self._sent: set[float] = set()  # places of texts the server has been sent in this period

    def offer(self, texts: Iterable[str]) -> int:
        """Offer texts to the sample; return how many were sent to the server, mostly none.

        Raises:
            redis.RedisError: the server does not answer; nothing is lost but a sample.
        """
        period = self._period()
        sent, bound = self._state(period)
        fresh: dict[str, float] = {}
        for text in texts:
            if len(text) > self._most_chars or not text.strip():
                continue
            try:
                place = priority(text, self._salt)
            except UnicodeEncodeError:
                continue
            if place < bound and place not in sent:
                fresh[text] = place
        # The least first: of more than can be sent at once, those that would stay.
        chosen = sorted(fresh.items(), key=lambda one: one[1])[: min(self._texts, OFFERED_AT_ONCE)]
        if chosen:
            arguments = [part for text, place in chosen for part in (repr(place), text)]
            said: Any = self._script(
                keys=[self._key(period)], args=[self._texts, self._lives_s(period), *arguments]
            )
            self._learn(period, 1.0 if said is None else float(said), {place for _, place in chosen})
        return len(chosen)

    def texts(self) -> list[str]:
        """Return the sample of the whole retention: at most ``texts``, in the order of their places.

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
        """Delete all that was sampled.

        Raises:
            redis.RedisError: the server does not answer; texts go when their time comes.
        """
        self._client.delete(*self._names())
        with self._lock:
            self._full, self._sent = (-1, 1.0), set()

    def _period_s(self) -> float:
        return self._retention_s / PERIODS

    def _period(self) -> int:
        return int(self._clock() // self._period_s())

    def _names(self) -> list[str]:
        now = self._period()
        return [self._key(period) for period in range(now - PERIODS, now + 1)]

    def _lives_s(self, period: int) -> int:
        # From the period's start, not from now: its first text is not to outlive the retention.
        left_s = period * self._period_s() + self._retention_s - self._clock()
        return max(1, int(left_s))

    def _state(self, period: int) -> tuple[set[float], float]:
        with self._lock:
            if self._full[0] != period:
                self._full, self._sent = (period, 1.0), set()
            return self._sent, self._full[1]

    def _learn(self, period: int, bound: float, places: set[float]) -> None:
        with self._lock:
            if self._full[0] != period:
                return
            self._full = (period, bound)
            # A new set: other threads read the old one. What the sample dropped needs no memory.
            self._sent = {place for place in self._sent | places if place <= bound}


def open_sample(client: redis.Redis, options: Settings) -> TrafficSample | None:
    """Return the sample of real traffic; None if the deployment keeps none."""
    if not options.sample_texts:
        return None
    return TrafficSample(
        client, texts=options.sample_texts, retention_s=options.sample_retention_s, key=keys.sample
    )
