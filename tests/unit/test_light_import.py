"""A client imports little, quickly, and takes nothing over in its process."""

import json
import subprocess
import sys
from typing import Any

import pytest

SCRIPT = """
import json, sys, time
import celery, celery.app.task, numpy
before = celery.current_app._get_current_object()
began = time.process_time()
import sutra_tasks
seconds = time.process_time() - began
print(json.dumps({
    "seconds": seconds,
    "modules": sorted(sys.modules),
    "same_app": celery.current_app._get_current_object() is before is not sutra_tasks.app,
    "configured": sutra_tasks.app.configured,
}))
"""


@pytest.fixture(scope="module")
def imported() -> Any:
    """Facts about a process that has imported the package and nothing else."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, check=True)
    assert not done.stderr
    return json.loads(done.stdout)


def test_nothing_of_the_worker_is_imported(imported: Any) -> None:
    heavy = {"torch", "transformers", "sentence_transformers", "tokenizers", "rich", "psutil"}
    assert not heavy & set(imported["modules"])
    folders = {name.split(".")[1] for name in imported["modules"] if name.startswith("sutra_tasks.")}
    assert not folders & {"batching", "broker", "cli", "device", "engines", "fanout", "health", "host"}
    assert not folders & {"membership", "roles", "routing"}


def test_the_import_is_quick_beyond_celery_and_numpy(imported: Any) -> None:
    assert imported["seconds"] < 0.4  # processor time: a busy machine does not fail it


def test_the_current_app_stays_what_it_was(imported: Any) -> None:
    assert imported["same_app"]


def test_settings_are_not_read_before_they_are_needed(imported: Any) -> None:
    assert not imported["configured"]
