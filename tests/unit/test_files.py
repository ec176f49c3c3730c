"""Files and folders are there whole or not at all, whoever else writes them."""

import os
import stat
import time
from pathlib import Path

import pytest

from sutra_tasks.files import ABANDONED_S, TEMPORARY, replacing, sweep, write_whole


def test_writers_of_one_file_never_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, replace, flushed = tmp_path / "file", Path.replace, list[int]()
    monkeypatch.setattr(os, "fsync", flushed.append)

    def late(beside: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "replace", replace)
        assert len(flushed) == 1  # the file
        write_whole(path, b"other")  # all of it while the first is about to rename
        return replace(beside, target)

    monkeypatch.setattr(Path, "replace", late)
    write_whole(path, b"one")
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]
    assert len(flushed) == 4  # of each file, and the folder with its name


def test_a_writer_that_fails_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, b"old")

    def write() -> None:
        with replacing(path) as temporary:
            temporary.write_bytes(b"half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_replaces_a_folder_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for name in ("old", "new"):
        with replacing(path) as temporary:
            temporary.mkdir()
            write_whole(temporary / name, b"content")
    assert [one.name for one in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mode", [0o600, 0o444])
def test_permissions_that_are_asked_for_hold_whatever_the_umask(mode: int, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        write_whole(tmp_path / "file", b"", mode=mode)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_what_killed_writers_left_is_deleted_in_time_and_nothing_else(tmp_path: Path) -> None:
    for name in (f".a.old{TEMPORARY}", f".b.young{TEMPORARY}", "c", ".d"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "half").write_bytes(b"")
        age_s = ABANDONED_S - 60 if "young" in name else ABANDONED_S + 60
        os.utime(folder, (time.time() - age_s, time.time() - age_s))
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f".b.young{TEMPORARY}", "c", ".d"}
