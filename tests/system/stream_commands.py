"""``sutra stream`` in processes of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

SUTRA = str(Path(sys.executable).with_name("sutra"))


def run(*arguments, stdin=b""):
    done = subprocess.run(
        [SUTRA, "stream", *arguments], input=stdin, capture_output=True, timeout=60, check=False
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.fixture
def begin():
    """Start a command that a test ends."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments):
        one = subprocess.Popen(
            [SUTRA, "stream", *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(one)
        return one

    yield start
    for one in started:
        one.kill()
        one.communicate()
