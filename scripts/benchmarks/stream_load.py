"""A producer in a process of its own: ``python -m scripts.benchmarks.stream_load``.

Prints one JSON object: how many entries were accepted, how often the stream told the producer to wait,
and for how many seconds it sent.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

from sutra_tasks import StreamEntry, StreamProducer


def entries(texts: list[str], first: int, count: int, per_s: float) -> Iterator[StreamEntry]:
    """Yield entries at random times, ``per_s`` a second on average (0: at once); ids are numbers."""
    draw = random.Random(first)  # noqa: S311 - it draws arrival times
    due = time.monotonic()
    for number, text in zip(range(first, first + count), cycle(texts), strict=False):
        if per_s:
            due += draw.expovariate(per_s)
            if (ahead := due - time.monotonic()) > 0:
                time.sleep(ahead)
        yield StreamEntry(f"{number} {text}", id=str(number))


def main() -> None:
    """Send entries, and wait while a stream is full."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--streams", required=True, help="names, comma-separated")
    parser.add_argument("--count", type=int, required=True, help="entries for each stream, at most")
    parser.add_argument("--seconds", type=float, default=1e9, help="seconds to send, at most")
    parser.add_argument("--first", type=int, default=0, help="the first id")
    parser.add_argument("--per-s", type=float, default=0.0, help="entries a second of each stream")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--texts", type=Path, help="a JSON file with a list of texts")
    chosen = parser.parse_args()
    texts = json.loads(chosen.texts.read_text()) if chosen.texts else ["the quick brown fox"]
    producers = [StreamProducer(name, timeout_s=600) for name in chosen.streams.split(",")]
    sources = [entries(texts, chosen.first, chosen.count, chosen.per_s) for _ in producers]
    accepted = signals = 0
    began = time.monotonic()
    while time.monotonic() - began < chosen.seconds:
        before = accepted
        for producer, source in zip(producers, sources, strict=True):
            part = list(islice(source, chosen.batch))
            for signal in producer.offer(part):
                signals += 1
                time.sleep(signal.retry_after_s)
            accepted += len(part)
        if accepted == before:
            break
    seconds = time.monotonic() - began
    for producer in producers:
        producer.close()
    print(json.dumps({"accepted": accepted, "signals": signals, "seconds": seconds}))


if __name__ == "__main__":
    main()
