"""The examples in docs/streams.md add an entry that devices can read, in each language found here."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import redis

from sutra_tasks import keys
from sutra_tasks.streaming.entries import StreamEntry

PAGE = Path(__file__).parents[2] / "docs" / "streams.md"
EXAMPLES = {
    language: code
    for language, code in re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    if "XADD" in code or "xadd" in code
}
RUN = {
    "sh": ("redis-cli", ["sh", "FILE"]),
    "python": (sys.executable, [sys.executable, "FILE"]),
    "js": ("node", ["node", "FILE"]),
    "go": ("go", ["go", "run", "FILE"]),
}


def test_there_is_an_example_for_each_language() -> None:
    assert EXAMPLES.keys() == RUN.keys()


@pytest.mark.parametrize("language", [name for name, (needed, _) in RUN.items() if shutil.which(needed)])
def test_an_example_adds_an_entry(
    language: str, url: str, client: redis.Redis, leaves: set[str], tmp_path: Path
) -> None:
    file = tmp_path / f"example.{'py' if language == 'python' else language}"
    file.write_text(EXAMPLES[language])
    command = [str(file) if word == "FILE" else word for word in RUN[language][1]]
    subprocess.run(
        command, env={**os.environ, "SUTRA_BROKER_URL": url}, check=True, timeout=60, capture_output=True
    )
    leaves |= {keys.streams(), keys.stream("docs", "in")}
    assert client.smembers(keys.streams()) == {b"docs"}
    found: Any = client.xrange(keys.stream("docs", "in"))
    ((_, fields),) = found
    flat: list[bytes] = [word for pair in fields.items() for word in pair]
    assert StreamEntry.parse(flat, 100) == StreamEntry("one text", id="42")
