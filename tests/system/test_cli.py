"""The command line as a person uses it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sutra_tasks.engines.simulated_engine import vectors_of
from tests.conftest import wait_until

SUTRA = str(Path(sys.executable).with_name("sutra"))


def sutra(*arguments, stdin=None, preexec_fn=None, **environ):
    return subprocess.run(
        [SUTRA, *arguments], env={**os.environ, **environ}, input=stdin,
        capture_output=True, text=True, timeout=60, check=False, preexec_fn=preexec_fn,
    )  # fmt: skip


@pytest.mark.usefixtures("fleet")
def test_texts_from_arguments_files_and_pipes(tmp_path):
    shown = sutra("embed", "one text")
    assert shown.returncode == 0, shown.stderr
    line = json.loads(shown.stdout)
    assert line["index"] == 0
    assert np.allclose(line["vector"], vectors_of(["one text"], 384)[0], atol=1e-6)

    source = tmp_path / "texts.jsonl"
    source.write_text('{"text": "a"}\n\n"b"\n{"text": "c", "id": 7}\n')
    out = tmp_path / "vectors.npy"
    assert sutra("embed", str(source), "--out", str(out)).returncode == 0
    assert np.allclose(np.load(out), vectors_of(["a", "b", "c"], 384), atol=1e-6)

    lines = tmp_path / "vectors.jsonl"
    piped = sutra("embed", "-", "--out", str(lines), "--dimensions", "8", stdin="x\ny\n")
    assert piped.returncode == 0, piped.stderr
    assert [len(json.loads(row)["vector"]) for row in lines.read_text().splitlines()] == [8, 8]


@pytest.mark.usefixtures("fleet")
def test_files_are_embedded_as_they_are_and_written_with_the_umasks_mode(tmp_path):
    source, out, link = tmp_path / "texts.csv", tmp_path / "vectors.npy", tmp_path / "link.npy"
    source.write_bytes('id;text\r\n1;"ü\nb"\r\n2;c\r\n'.encode("utf-16"))
    link.symlink_to("vectors.npy")
    done = sutra("embed", str(source), "--out", str(link), preexec_fn=lambda: os.umask(0o027))
    assert done.returncode == 0, done.stderr
    assert np.allclose(np.load(out), vectors_of(["ü\nb", "c"], 384), atol=1e-6)
    assert (link.is_symlink(), out.stat().st_mode & 0o777) == (True, 0o640)

    (tmp_path / "notes").write_bytes(b"caf\xe9\n")
    refused = sutra("embed", str(tmp_path / "notes"))
    assert (refused.returncode, refused.stdout) == (1, "")
    assert f"{tmp_path / 'notes'}:1: not UTF-8" in refused.stderr
    shown = sutra("embed", str(tmp_path / "notes"), "--encoding", "cp1252")
    assert np.allclose(json.loads(shown.stdout)["vector"], vectors_of(["café"], 384)[0], atol=1e-6)


@pytest.mark.usefixtures("fleet")
@pytest.mark.parametrize("command", [("embed",), ("status",), ("status", "--json"), ("--help",)])
def test_a_reader_that_goes_away_is_no_error_to_talk_about(command, tmp_path):
    source = tmp_path / "texts.txt"
    source.write_text("a\n" * 2000)
    words = [*command, str(source)] if command == ("embed",) else command
    reader, writer = os.pipe()
    process = subprocess.Popen([SUTRA, *words], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    if command == ("embed",):
        os.read(reader, 10)
    os.close(reader)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode in (0, 1)


@pytest.mark.usefixtures("fleet")
def test_a_command_that_is_ended_leaves_no_half_file(tmp_path):
    command = [SUTRA, "embed", "-", "--out", str(tmp_path / "out.jsonl")]
    for ends in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        wait_until(lambda: list(tmp_path.iterdir()))
        process.send_signal(ends)
        assert "Traceback" not in process.communicate(timeout=30)[1]
        assert process.returncode == 128 + ends
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "complaint"),
    [('{"text": "a"}\nnot json\n', ":2: not JSON"), ('{"words": "a"}\n', ":1: expected")],
)
@pytest.mark.usefixtures("fleet")
def test_a_bad_line_is_named_and_no_half_file_stays(tmp_path, content, complaint):
    source = tmp_path / "texts.jsonl"
    source.write_text(content)
    failed = sutra("embed", str(source), "--out", str(tmp_path / "out.npy"))
    assert failed.returncode == 1
    assert complaint in failed.stderr
    assert "Traceback" not in failed.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"texts.jsonl"}


@pytest.mark.parametrize(
    ("arguments", "status", "complaint"),
    [
        (("status",), 2, "SUTRA_BROKER_URL"),
        (("embed", "x"), 2, "sutra up"),
        (("embed", "nowhere.jsonl"), 1, "No such file"),
        (("embed", "."), 1, "is a folder"),
        (("embed", "x", "--encoding", "base64"), 2, "base64"),
        (("embed", "x", "--out", "vectors.csv"), 1, ".npy or .jsonl"),
        (("up", "--broker", "amqp://me:secret@host"), 2, "redis://"),
        (("up", "--devices", "0"), 2, "--devices"),
        (("up", "--engine", "steam"), 2, "steam"),
    ],
)
def test_mistakes_get_one_clear_line(arguments, status, complaint):
    environ = {k: v for k, v in os.environ.items() if not k.startswith("SUTRA_")}
    failed = subprocess.run(
        [SUTRA, *arguments], env=environ, capture_output=True, text=True, timeout=60, check=False
    )
    assert failed.returncode == status, failed.stderr
    assert complaint in failed.stderr
    assert "Traceback" not in failed.stderr
    assert "secret" not in failed.stderr


def test_status_says_when_nobody_lives(client, server):
    shown = sutra("status", SUTRA_BROKER_URL=server)
    assert shown.returncode == 1
    assert "sutra up" in shown.stderr


def test_a_server_that_is_away_is_named(tmp_path):
    away = sutra("status", SUTRA_BROKER_URL="redis://127.0.0.1:1/0")
    assert away.returncode == 1
    assert "does not answer" in away.stderr
