"""What is asked for on schedule, how long it is told of, and how it is cancelled."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import celery
import pytest

from sutra_tasks import CallbackQueueError, DistillationConfig, InvalidOptionError, distill, keys
from sutra_tasks.app import app
from sutra_tasks.celery_settings import celery_settings
from sutra_tasks.cli import distill as command
from sutra_tasks.distillation.distill_task import distill_due
from sutra_tasks.settings import Settings, settings

CONFIG = DistillationConfig(teacher="tiny", texts=("a.txt",))


def test_a_scheduled_run_is_a_message_of_its_own_that_never_expires(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(CONFIG.to_json()))
    monkeypatch.setenv("SUTRA_BROKER_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("SUTRA_DISTILL_CONFIG", str(file))
    settings.cache_clear()
    sent: list[tuple[Any, dict[str, Any]]] = []

    def capture(_: object, args: Any, __: Any, **options: Any) -> Any:
        sent.append((args, options))
        return SimpleNamespace(id="task-1")

    monkeypatch.setattr(celery.Task, "apply_async", capture)
    assert distill_due() == {"task": "task-1"}
    settings.cache_clear()
    assert [args for args, _ in sent] == [(CONFIG.to_json(),)]
    assert sent[0][1]["queue"] == keys.DISTILL_QUEUE
    assert "expires" not in sent[0][1]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"serializer": "pickle"}, InvalidOptionError),
        ({"priority": -1}, InvalidOptionError),
        ({"link": celery.signature("project.save")}, CallbackQueueError),
    ],
)
def test_a_recipe_is_not_sent_with_options_that_cannot_work(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], told: type[Exception]
) -> None:
    monkeypatch.setenv("SUTRA_BROKER_URL", "redis://127.0.0.1:1/0")
    settings.cache_clear()
    with pytest.raises(told):
        distill.apply_async((CONFIG,), **options)
    settings.cache_clear()


def test_what_asks_for_scheduled_runs_does_not_pile_up_while_one_lasts() -> None:
    options = Settings(broker_url="redis://h", distill_every_s=3600.0, distill_config="x.json")
    due = celery_settings(options)["beat_schedule"][keys.DISTILL_DUE_TASK]
    assert due["options"]["expires"] < due["schedule"]


@pytest.mark.parametrize(("ttl_s", "kept_s"), [(600, keys.DISTILLED_S), (10**7, 10**7)])
def test_what_is_said_of_a_run_outlives_a_night(ttl_s: int, kept_s: int) -> None:
    script = "from sutra_tasks.roles.apps import distill_app as made; b = made().backend; "
    script += "print(b.expires, b.failure_expires)"
    given = {"SUTRA_BROKER_URL": "redis://127.0.0.1:1/0", "SUTRA_MODELS_DIR": "models"}
    environ = {**os.environ, **given, "SUTRA_RESULT_TTL_S": str(ttl_s)}
    done = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, check=True)
    assert done.stdout.split() == [str(kept_s).encode()] * 2


def test_a_cancellation_is_kept_for_workers_that_are_not_up(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []
    server = SimpleNamespace(set=lambda *args, **options: done.append((args, options)))
    result = SimpleNamespace(revoke=lambda: done.append("revoked"))
    monkeypatch.setattr(command, "connected", lambda _: server)
    monkeypatch.setattr(app, "AsyncResult", lambda _: result)
    command.cancel(Settings(), "task-1")
    assert done == [((keys.cancelled("task-1"), 1), {"ex": keys.DISTILLED_S}), "revoked"]
