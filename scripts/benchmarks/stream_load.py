"""A producer in a process of its own: ``python -m scripts.benchmarks.stream_load``.

Prints one JSON object: how many were accepted, and what it was held up by.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from itertools import cycle

from sutra_tasks import StreamEntry, StreamProducer


def entries(texts: list[str], first: int, count: int, per_s: float) -> Iterator[StreamEntry]:
    """Yield texts at a rate; ids are numbers."""
    began = time.monotonic()
    for number, text in zip(range(first, first + count), cycle(texts), strict=False):
        if per_s and (ahead := (number - first) / per_s - (time.monotonic() - began)) > 0:
            time.sleep(ahead)
        yield StreamEntry(text, id=str(number))


def main() -> None:
    """Send, and wait while the stream is full."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--streams", required=True, help="names, comma-separated")
    parser.add_argument("--count", type=int, required=True, help="entries for each stream")
    parser.add_argument("--first", type=int, default=0, help="the first id")
    parser.add_argument("--per-s", type=float, default=0.0, help="for all streams together")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--texts", help="a JSON file with a list of texts")
    chosen = parser.parse_args()
    texts = json.load(open(chosen.texts)) if chosen.texts else ["the quick brown fox jumps"]  # noqa: PTH123, SIM115
    streams = chosen.streams.split(",")
    producers = [StreamProducer(name, batch=chosen.batch, timeout_s=120) for name in streams]
    sources = [entries(texts, chosen.first, chosen.count, chosen.per_s / len(streams)) for _ in streams]
    signals = 0
    began = time.monotonic()
    if len(producers) == 1:
        for signal in producers[0].offer(sources[0]):
            signals += 1
            time.sleep(signal.retry_after_s)
    else:
        for _ in range(0, chosen.count, chosen.batch):
            for producer, source in zip(producers, sources, strict=True):
                part = [entry for _, entry in zip(range(chosen.batch), source, strict=False)]
                producer.send_many(part)
    seconds = time.monotonic() - began
    for producer in producers:
        producer.close()
    print(json.dumps({"accepted": chosen.count * len(streams), "signals": signals, "seconds": seconds}))


if __name__ == "__main__":
    main()
