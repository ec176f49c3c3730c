"""What `sutra embed` reads: files as people have them; mistakes are named by file and line."""

import io
import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from sutra_tasks.cli.reading import read_texts
from sutra_tasks.errors import SutraError
from sutra_tasks.settings import Settings

TEXTS = ["one", "zwei ü", "三"]


def read(source: object, **options: Any) -> list[str]:
    texts, count = read_texts(str(source), Settings(), **options)
    found = list(texts)
    assert count in (None, len(found))
    return found


def refusal(source: object, **options: Any) -> str:
    with pytest.raises(SutraError) as caught:
        read(source, **options)
    return str(caught.value)


def contents(kind: str) -> str:
    return {
        ".jsonl": "".join(
            json.dumps({"text": one, "id": 1}, ensure_ascii=False) + "\n" for one in TEXTS
        ),
        ".ndjson": "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in TEXTS),
        ".csv": "id,text\n" + "".join(f'1,"{one}"\n' for one in TEXTS),
        ".tsv": "id\ttext\n" + "".join(f"1\t{one}\n" for one in TEXTS),
        ".txt": "".join(one + "\n" for one in TEXTS),
        "": "\n".join(TEXTS),
    }[kind]


@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ""])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_file_is_read_by_its_suffix_whatever_wrote_it(
    tmp_path: Path, kind: str, encoding: str, end: str
) -> None:
    path = tmp_path / f"texts{kind}"
    path.write_bytes(contents(kind).replace("\n", end).encode(encoding))
    assert read(path) == TEXTS


def test_parquet_is_read_by_its_column(tmp_path: Path) -> None:
    arrow: Any = import_module("pyarrow")
    import_module("pyarrow.parquet").write_table(arrow.table({"text": TEXTS}), tmp_path / "t.PARQUET")
    assert read(tmp_path / "t.PARQUET") == TEXTS
    (tmp_path / "u.parquet").write_bytes(b"no")
    assert refusal(tmp_path / "u.parquet").endswith("u.parquet: expected a whole Parquet file")


def test_a_spreadsheets_csv_is_read_with_its_own_delimiter_and_long_fields(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(f'id;text\n1;"a; b\nc"\n2;{"x" * 200_000}\n')
    assert read(path) == ["a; b\nc", "x" * 200_000]


def test_another_encoding_is_refused_by_line_and_read_when_it_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes("one\ncafé\n".encode("latin-1"))
    assert refusal(path) == f"{path}:2: not UTF-8. Name its encoding, such as --encoding latin-1"
    assert read(path, encoding="latin-1") == ["one", "café"]
    path.write_bytes("one".encode("utf-16-le"))
    assert f"{path}:1: a NUL character" in refusal(path)
    assert read(path, encoding="utf-16-le") == ["one"]
    assert refusal(path, encoding="ascii").startswith(f"{path}:1: ")


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("t.jsonl", '"a"\nnot json\n', ":2: not JSON"),
        ("t.jsonl", '"a"\n{"words": "b"}\n', ":2: expected"),
        ("t.jsonl", '["a", "b"]', ":1: expected"),
        ("t.jsonl", '"\\ud800"', ":1: not valid Unicode"),
        ("t.csv", 'text\na\n"b"c\n', ":3: not CSV"),
        ("t.csv", "id,text\n1,a\n2\n", ":3: expected"),
        ("t.csv", "id,body\n1,a\n", ": expected a first row with a column text"),
        ("t.txt", "a\nb\0\n", ":2: a NUL character"),
        ("t.jsonl", "", " has no texts"),
        ("t.jsonl", "\n\n", " has no texts"),
        ("t.csv", "text\n", " has no texts"),
        ("t.txt", "", " has no texts"),
        ("t.csv", "", " has no texts"),
    ],
)  # fmt: skip
def test_the_whole_file_is_checked_before_the_first_text_is_given(
    tmp_path: Path, name: str, content: str, complaint: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(SutraError) as caught:
        read_texts(str(tmp_path / name), Settings())
    assert str(caught.value).startswith(f"{tmp_path / name}{complaint}")
    assert "words" not in str(caught.value)


def test_lines_of_a_text_file_keep_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a\n\n  b\n")
    assert read(tmp_path / "t.txt") == ["a", "", "  b"]


@pytest.mark.parametrize(
    "text", ["a text", "", "a/b", "x" * 5000, "a\nb.txt", "nul \0", "hello.", "1.5"]
)
def test_what_names_no_file_is_a_text(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert read(text) == [text]


@pytest.mark.parametrize(
    "name", ["t.jsonl", "my notes.txt", "t.CSV", "t.parquet", "./t", "../t/t", "/no/t"]
)
def test_a_files_name_is_never_embedded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(name).startswith(f"{name}: No such file or directory. If it is meant as a text")


def test_folders_broken_links_and_files_without_rights_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    assert refusal("texts") == "texts is a folder: name a file in it"
    (tmp_path / "link.txt").symlink_to("nowhere")
    assert refusal("link.txt") == "link.txt: No such file or directory"
    (tmp_path / "t.txt").write_text("a\n")

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert refusal("t.txt") == "t.txt: Permission denied"


def test_a_pipe_is_read_once_and_a_link_is_followed(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"a\nb\n")
    os.close(writer)
    texts, count = read_texts(f"/dev/fd/{reader}", Settings())
    assert (list(texts), count) == (["a", "b"], None)
    os.close(reader)
    (tmp_path / "t.jsonl").write_text('"a"\n')
    (tmp_path / "latest").symlink_to("t.jsonl")
    assert read(tmp_path / "latest") == ["a"]


class Input(io.TextIOWrapper):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))


def test_a_lone_dash_is_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Input("\ufeffa\r\nü\r\n".encode("utf-16-le")))
    assert read("-") == ["a", "ü"]
    monkeypatch.setattr(sys, "stdin", Input(b'"a"\n{"text": "b"}\n'))
    assert read("-", as_jsonl=True) == ["a", "b"]
    monkeypatch.setattr(sys, "stdin", Input(b"a\n\xff\n"))
    assert refusal("-").startswith("standard input:2: not UTF-8")
    monkeypatch.setattr(sys, "stdin", Input(b""))
    assert refusal("-") == "standard input has no texts"
    monkeypatch.setattr(sys, "stdin", None)
    assert refusal("-") == "standard input is closed"
