"""Answers questions from the Python manual with a fleet on this machine; ``scripts/demo`` starts it."""

from __future__ import annotations

import os
import sys
import tempfile
import time
import warnings
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model comes from a package

from pydoc_data.topics import topics

import numpy as np
import redis
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from sutra_tasks import SutraError, embed
from sutra_tasks.cli.status import read, table
from sutra_tasks.host.embedded_server import embedded_server
from sutra_tasks.host.local_fleet import await_devices, local_devices, run_workers, stop_on_signals
from sutra_tasks.host.supervisor import worker_specs
from sutra_tasks.settings import Settings

QUESTIONS = (
    "how do I catch several exceptions?",
    "what is the difference between a list and a tuple?",
    "how can an object be used in a with statement?",
    "why are my default argument values shared between calls?",
)
PASSAGE_WORDS = 150
TEXTS_A_MESSAGE = 16


def passages() -> list[tuple[str, str]]:
    """Return the manual as (topic, passage), each short enough for the model's window."""
    found = []
    for topic, text in topics.items():
        words: list[str] = []
        for paragraph in [*text.split("\n\n"), None]:
            more = paragraph.split() if paragraph is not None else []
            if words and (paragraph is None or len(words) + len(more) > PASSAGE_WORDS):
                found.append((topic, " ".join(words)))
                words = []
            words += more[:PASSAGE_WORDS]
    return found


def main(questions: tuple[str, ...]) -> None:
    """Run the demo."""
    console = Console()
    options = Settings.from_env(os.environ)
    manual = passages()
    with stop_on_signals(), ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sutra-demo-")))
        address = stack.enter_context(embedded_server())
        options = replace(options, broker_url=address)
        os.environ["SUTRA_BROKER_URL"] = address  # as in a user's application
        devices = local_devices(options, None)
        specs = worker_specs(options, devices)
        output = {
            spec.name: stack.enter_context((folder / f"{spec.name}.log").open("wb")) for spec in specs
        }
        began = time.monotonic()
        supervisor = stack.enter_context(
            run_workers(options, specs, report=console.print, output=output)
        )
        with console.status(f"starting a server, a router and {len(devices)} devices ..."):
            await_devices(supervisor, options, devices)
        console.print(
            f"a server, a router and {len(devices)} devices in {time.monotonic() - began:.1f} s"
        )

        began = time.monotonic()
        results = [
            embed.delay([text for _, text in manual[start : start + TEXTS_A_MESSAGE]])
            for start in range(0, len(manual), TEXTS_A_MESSAGE)
        ]
        columns = (TextColumn("embedding the Python manual"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            parts = [result.get(timeout=120) for result in progress.track(results, total=len(results))]
        vectors = np.vstack(parts)
        seconds = time.monotonic() - began
        console.print(
            f"{len(manual)} passages of {len(topics)} topics in {seconds:.1f} s: "
            f"{len(manual) / seconds:.0f} embeddings/s\n"
        )

        for question in questions:
            question_vector = embed.delay(question).get(timeout=30)
            scores = vectors @ question_vector
            console.print(f"[bold]{escape(question)}[/]")
            for index in np.argsort(-scores)[:3]:
                topic, text = manual[index]
                line = f"  {scores[index]:.2f}  {topic:<20} {' '.join(text.split())}"
                console.print(line[: console.width - 1], markup=False, highlight=False)
            console.print()

        client = redis.Redis.from_url(address)
        done = len(manual) + len(questions)
        deadline = time.monotonic() + 5
        seen = read(client, options.device_ttl_s)
        while (
            sum(d.record.texts for d in seen.devices if d.record) < done and time.monotonic() < deadline
        ):
            time.sleep(supervisor.step(time.monotonic()))  # a heartbeat brings the last counts
            seen = read(client, options.device_ttl_s)
        client.close()
        console.print(table(seen))
        with console.status("stopping ..."):
            stack.close()
        console.print("\nall stopped.")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    try:
        main(tuple(sys.argv[1:]) or QUESTIONS)
    except SutraError as error:
        sys.exit(f"demo: {error}")
