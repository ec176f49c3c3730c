"""Reading texts: no row is lost, no bad row is fatal, and no file outside the folder is read."""

import importlib
import json
import os
import random
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st

from sutra_tasks.distillation.data.corpus import BadRows, Corpus, read_corpus, read_pairs, split_corpus
from sutra_tasks.errors import InvalidOptionError, TooLittleTextError

pa: Any = importlib.import_module("pyarrow")  # it carries no type information
pq: Any = importlib.import_module("pyarrow.parquet")
MOST = 100
GOOD = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60).filter(
    str.strip
)
SECRET = "nobody may read this"


def write(folder: Path, name: str, content: str | bytes) -> str:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return name


def texts_of(folder: Path, name: str, content: str | bytes) -> tuple[str, ...]:
    return read_corpus(folder, [write(folder, name, content)], most_chars=MOST).texts


def reasons(corpus: Corpus) -> list[tuple[int, str]]:
    return [(row.line, row.reason) for row in corpus.bad]


def csv_of(texts: list[str]) -> str:
    return "text\n" + "".join('"{}"\n'.format(text.replace('"', '""')) for text in texts)


# --- kinds of files


def test_jsonl_holds_strings_and_objects(tmp_path: Path) -> None:
    content = '"one"\n{"text": "two", "id": 3}\n\n  \n"tre\\u0301"\n"\\ud83d\\ude42"'
    assert texts_of(tmp_path, "a.jsonl", content) == ("one", "two", "tre\u0301", "🙂")


def test_txt_holds_a_text_a_line_as_it_is(tmp_path: Path) -> None:
    content = "one\n\n  two \n \t\nthree\u2028still three\nfour\x0cstill four"
    expected = ("one", "  two ", "three\u2028still three", "four\x0cstill four")
    assert texts_of(tmp_path, "a.txt", content) == expected


def test_csv_holds_a_column_wherever_it_is(tmp_path: Path) -> None:
    content = 'id,text,note\n1,one,\n2,"two, and\na half",x\n\n3,"say ""three""",\n'
    assert texts_of(tmp_path, "a.csv", content) == ("one", "two, and\na half", 'say "three"')


def test_csv_of_a_spreadsheet_has_its_own_delimiter(tmp_path: Path) -> None:
    assert texts_of(tmp_path, "a.csv", "id;text\n1;one, two\n") == ("one, two",)


def test_parquet_holds_a_column_and_its_batches_are_one(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(3_000)]
    table = pa.table({"id": list(range(3_000)), "text": texts})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    assert read_corpus(tmp_path, ["a.parquet"], most_chars=MOST).texts == tuple(texts)


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_has_several_kinds_of_strings(tmp_path: Path, kind: Any) -> None:
    pq.write_table(pa.table({"text": pa.array(["a", "b", "a"]).cast(kind)}), tmp_path / "a.parquet")
    assert read_corpus(tmp_path, ["a.parquet"], most_chars=MOST).texts == ("a", "b")


@laws(max_examples=50, deadline=None)
@given(texts=st.lists(GOOD, min_size=1, max_size=12))
def test_any_texts_come_back_from_every_kind_that_can_hold_them(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("texts")
    write(folder, "a.jsonl", "".join(json.dumps(text) + "\n" for text in texts))
    write(
        folder, "b.jsonl", "".join(json.dumps({"text": t}, ensure_ascii=False) + "\r\n" for t in texts)
    )
    write(folder, "a.csv", csv_of(texts))
    pq.write_table(pa.table({"text": texts}), folder / "a.parquet")
    for name in ("a.jsonl", "b.jsonl", "a.csv", "a.parquet"):
        corpus = read_corpus(folder, [name], most_chars=MOST)
        assert corpus.texts == tuple(dict.fromkeys(texts)), name
        assert (corpus.bad_rows, corpus.duplicates) == (0, len(texts) - len(corpus.texts))


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("last", [True, False])
def test_line_ends_and_a_byte_order_mark_are_no_part_of_a_text(
    tmp_path: Path, name: str, end: str, encoding: str, last: bool
) -> None:
    rows = ['"one"', '"two"'] if name == "a.jsonl" else ["one", "two"]
    content = end.join([*(["text"] if name == "a.csv" else []), *rows]) + (end if last else "")
    assert texts_of(tmp_path, name, content.encode(encoding)) == ("one", "two")


def test_several_files_are_one_corpus_in_the_order_first_seen(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "one\ntwo\n")
    (tmp_path / "deep").mkdir()
    write(tmp_path, "deep/B.TXT", "two\nthree\none\n")
    corpus = read_corpus(tmp_path, ["a.txt", "deep/B.TXT"], most_chars=MOST)
    assert corpus.texts == ("one", "two", "three")
    assert corpus.duplicates == 2


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv"])
def test_an_empty_file_holds_nothing(tmp_path: Path, name: str) -> None:
    corpus = read_corpus(tmp_path, [write(tmp_path, name, "")], most_chars=MOST)
    assert (corpus.texts, corpus.bad_rows) == ((), 0)


# --- bad rows


def test_bad_rows_of_jsonl_are_named_by_line_and_the_others_are_read(tmp_path: Path) -> None:
    rows: list[bytes] = [
        b'"good"',
        b"{broken",
        b'{"other": 1}',
        b"[1]",
        b'{"text": 7}',
        b'"  "',
        b'"\xff\xfe"',
        b'"\\ud800"',
        b'"nul \\u0000"',
        json.dumps("x" * 101).encode(),
        b"[" * 5_000,
        b"1" * 5_000,
        b'"better"',
    ]
    corpus = read_corpus(tmp_path, [write(tmp_path, "a.jsonl", b"\n".join(rows))], most_chars=MOST)
    assert corpus.texts == ("good", "better")
    assert reasons(corpus) == [
        (2, "not JSON"),
        (3, "no text"),
        (4, "no text"),
        (5, "no text"),
        (6, "empty"),
        (7, "not UTF-8"),
        (8, "not valid Unicode"),
        (9, "a NUL character"),
        (10, "over 100 characters"),
        (11, "not JSON"),
        (12, "not JSON"),
    ]
    assert corpus.bad_rows == 11


def test_bad_rows_of_csv_are_named_and_the_others_are_read(tmp_path: Path) -> None:
    content = b'id,text\n1,good\n2\n3,\n4,\xff\n5,"x"y\n6,' + b"x" * 101 + b"\n7,better\n"
    corpus = read_corpus(tmp_path, [write(tmp_path, "a.csv", content)], most_chars=MOST)
    assert corpus.texts == ("good", "better")
    assert [(line, reason.split(",")[0]) for line, reason in reasons(corpus)] == [
        (3, "no text"),
        (4, "empty"),
        (5, "not valid Unicode"),
        (6, "not CSV"),
        (7, "over 100 characters"),
    ]


def test_a_quote_that_is_never_closed_loses_a_part_and_not_the_file(tmp_path: Path) -> None:
    filler = "".join(f"{i},row\n" for i in range(30_000))
    content = f'id,text\n1,good\n2,"open\n{filler}3,better\n'
    corpus = read_corpus(tmp_path, [write(tmp_path, "a.csv", content)], most_chars=MOST)
    assert corpus.texts == ("good", "row", "better")
    assert corpus.bad_rows == 1


def test_bad_cells_of_parquet_are_named_and_the_others_are_read(tmp_path: Path) -> None:
    broken = pa.Array.from_buffers(
        pa.string(),
        2,
        [None, pa.py_buffer(np.array([0, 2, 4], dtype=np.int32)), pa.py_buffer(b"ok\xff\xfe")],
    )
    column = pa.chunked_array([broken, pa.array([None, "", "better"])])
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    corpus = read_corpus(tmp_path, ["a.parquet"], most_chars=MOST)
    assert corpus.texts == ("ok", "better")
    assert reasons(corpus) == [(2, "not valid Unicode"), (3, "no text"), (4, "empty")]


def test_a_file_in_another_encoding_gives_bad_rows_and_no_nonsense(tmp_path: Path) -> None:
    corpus = read_corpus(
        tmp_path, [write(tmp_path, "a.txt", "one\ntwo\n".encode("utf-16-le"))], most_chars=MOST
    )
    assert corpus.texts == ()
    assert {reason for _, reason in reasons(corpus)} <= {"not UTF-8", "a NUL character"}


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv"])
def test_a_huge_line_is_bad_and_never_in_memory(tmp_path: Path, name: str) -> None:
    head, one, two = {
        "a.jsonl": ("", '"one"', '"two"'),
        "a.txt": ("", "one", "two"),
        "a.csv": ("text\n", "one", "two"),
    }[name]
    write(tmp_path, name, f"{head}{one}\n{'x' * 8_000_000}\n{two}\n")
    tracemalloc.start()
    corpus = read_corpus(tmp_path, [name], most_chars=MOST)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert corpus.texts == ("one", "two")
    assert [row.line for row in corpus.bad] == [3 if head else 2]
    assert peak_bytes < 2_000_000


def test_the_first_bad_rows_are_named_and_all_are_counted(tmp_path: Path) -> None:
    corpus = read_corpus(tmp_path, [write(tmp_path, "a.jsonl", "{\n" * 50)], most_chars=MOST)
    assert corpus.bad_rows == 50
    assert [row.line for row in corpus.bad] == list(range(1, 21))


def test_nothing_that_is_shown_holds_a_text(tmp_path: Path) -> None:
    rows = [json.dumps(SECRET), json.dumps(SECRET * 9), f"{{{SECRET}", f'{{"text": ["{SECRET}"]}}']
    corpus = read_corpus(tmp_path, [write(tmp_path, "a.jsonl", "\n".join(rows))], most_chars=MOST)
    assert corpus.bad_rows == 3
    assert SECRET not in f"{corpus!r} {corpus.bad!r}"


# --- only files of the folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inside = tmp_path / "data"
    inside.mkdir()
    write(tmp_path, "outside.txt", SECRET)
    return inside


def refusal(folder: Path, name: str) -> InvalidOptionError:
    with pytest.raises(InvalidOptionError) as caught:
        read_corpus(folder, [name], most_chars=MOST)
    assert caught.value.option == "texts"
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return caught.value


def test_what_is_outside_is_refused_in_the_words_for_what_is_nowhere(folder: Path) -> None:
    (folder / "link.txt").symlink_to(folder.parent / "outside.txt")
    (folder / "up").symlink_to(folder.parent)
    (folder / "loop.txt").symlink_to(folder / "loop.txt")
    (folder / "folder.txt").mkdir()
    os.mkfifo(folder / "pipe.txt")
    names = [
        "missing.txt",
        "../outside.txt",
        "sub/../../outside.txt",
        str(folder.parent / "outside.txt"),
        "link.txt",
        "up/outside.txt",
        "loop.txt",
        "folder.txt",
        "pipe.txt",
        "a\0.txt",
        "x" * 300 + ".txt",
    ]
    said = {refusal(folder, name).expected for name in names}
    assert said == {"a file that can be read, inside SUTRA_DATA_DIR"}
    # An absolute name, or one that goes up, is refused even if it is a file of the folder.
    write(folder, "a.txt", "one")
    for name in (str(folder / "a.txt"), "../data/a.txt", "folder.txt/../a.txt"):
        assert refusal(folder, name).expected in said


def test_a_link_that_stays_inside_is_followed(folder: Path) -> None:
    write(folder, "a.txt", "one")
    (folder / "b.txt").symlink_to("a.txt")
    (folder.parent / "elsewhere").symlink_to(folder)
    assert read_corpus(folder.parent / "elsewhere", ["b.txt"], most_chars=MOST).texts == ("one",)


def test_a_file_that_cannot_be_read_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, "a.txt", "one")

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", "/secret/place")

    monkeypatch.setattr(Path, "open", refuse)
    assert "/secret" not in str(refusal(folder, "a.txt"))


@pytest.mark.parametrize("name", ["a.pkl", "a", "a.jsonl.gz", ""])
def test_kinds_that_are_not_known_are_refused_with_those_that_are(folder: Path, name: str) -> None:
    assert ".jsonl, .txt, .csv, .parquet" in refusal(folder, name).expected


def test_a_file_without_the_column_is_refused(folder: Path) -> None:
    write(folder, "a.csv", "id,body\n1,one\n")
    pq.write_table(pa.table({"body": ["one"]}), folder / "a.parquet")
    assert "column text" in refusal(folder, "a.csv").expected
    assert "column text" in refusal(folder, "a.parquet").expected


def test_what_is_no_parquet_is_refused(folder: Path) -> None:
    pq.write_table(pa.table({"text": ["one"] * 9}), folder / "a.parquet")
    whole = (folder / "a.parquet").read_bytes()
    for content in (b"", b"no parquet", whole[:-20], whole[:20] + b"\xff" * 30 + whole[50:]):
        write(folder, "b.parquet", content)
        assert "Parquet" in refusal(folder, "b.parquet").expected


def test_without_pyarrow_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, "a.parquet", "")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'sutra-tasks[distill]'" in refusal(folder, "a.parquet").expected


# --- a draw


def drawn(folder: Path, seed: int, most: int = 10) -> Corpus:
    rng = np.random.default_rng(seed)
    return read_corpus(folder, ["a.txt"], most_chars=MOST, most_texts=most, rng=rng)


def test_a_draw_is_uniform_over_different_texts_and_keeps_their_order(tmp_path: Path) -> None:
    texts = [f"text {i:03}" for i in range(40)]
    write(tmp_path, "a.txt", "\n".join([*texts, *["text 007"] * 200]))
    counts = dict.fromkeys(texts, 0)
    for seed in range(400):
        chosen = drawn(tmp_path, seed).texts
        assert len(chosen) == 10
        assert list(chosen) == sorted(chosen)
        for text in chosen:
            counts[text] += 1
    found = np.array(list(counts.values()))
    # Chi squared with 39 degrees of freedom: above 73 once in 1,000 draws.
    assert ((found - 100) ** 2 / 100).sum() < 73


def test_a_draw_is_what_its_generator_says_and_all_there_is_where_that_is_less(tmp_path: Path) -> None:
    texts = [f"text {i:03}" for i in range(40)]
    write(tmp_path, "a.txt", "\n".join([*texts, "text 001"]))
    assert drawn(tmp_path, 1).texts == drawn(tmp_path, 1).texts != drawn(tmp_path, 2).texts
    whole = drawn(tmp_path, 1, most=40)
    assert (whole.texts, whole.duplicates) == (tuple(texts), 1)


def test_memory_is_that_of_the_texts_that_are_kept(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "".join(f"{i:090}\n" for i in range(40_000)))
    tracemalloc.start()
    corpus = drawn(tmp_path, 0, most=100)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(corpus.texts) == 100
    assert peak_bytes < 1_000_000


def test_a_sample_is_part_of_the_draw(tmp_path: Path) -> None:
    texts, sample = [f"text {i:03}" for i in range(40)], [f"real {i:03}" for i in range(40)]
    write(tmp_path, "a.txt", "\n".join(texts))

    def found(most: int) -> Corpus:
        rng = np.random.default_rng(1)
        more = ["text 001", "nul \0", *sample]
        return read_corpus(tmp_path, ["a.txt"], most_chars=MOST, sample=more, most_texts=most, rng=rng)

    assert (found(80).texts, found(80).duplicates) == ((*texts, *sample), 0)
    drawn_texts = found(40).texts
    assert len(drawn_texts) == 40
    assert 10 < len(set(drawn_texts) & set(sample)) < 30


# --- both sides


@laws(max_examples=50, deadline=None)
@given(
    texts=st.lists(GOOD, min_size=9, max_size=60, unique=True),
    more=st.lists(GOOD, max_size=30, unique=True),
    seed=st.integers(0, 9),
)
def test_a_text_that_was_learned_from_is_never_held_out_when_files_grow(
    texts: list[str], more: list[str], seed: int
) -> None:
    train, held_out = split_corpus(Corpus(tuple(texts)), 3, seed)
    assert len(held_out) == 3
    assert sorted([*train, *held_out]) == sorted(texts)
    assert [*train] == [text for text in texts if text in train]
    grown = [*dict.fromkeys([*more, *texts])]
    random.Random(seed).shuffle(grown)
    later_train, later = split_corpus(Corpus(tuple(grown)), 3, seed)
    assert not set(later) & set(train)
    assert set(later_train) >= set(train)


def test_another_seed_holds_out_other_texts() -> None:
    corpus = Corpus(tuple(f"text {i}" for i in range(300)))
    assert split_corpus(corpus, 50, 1) == split_corpus(corpus, 50, 1)
    assert len(set(split_corpus(corpus, 50, 1)[1]) & set(split_corpus(corpus, 50, 2)[1])) < 25


def test_too_little_text_is_refused_with_the_number_needed() -> None:
    corpus = Corpus(tuple(map(str, range(59))), bad_rows=4)
    with pytest.raises(TooLittleTextError) as caught:
        split_corpus(corpus, 20, 0)
    assert caught.value.args == (59, 60, 4, 0)
    assert len(split_corpus(Corpus(tuple(map(str, range(60)))), 20, 0)[0]) == 40


# --- labelled pairs


def test_pairs_are_read_and_bad_rows_are_named(tmp_path: Path) -> None:
    rows = [
        '{"query": "q", "positive": "p", "more": 1}',
        '{"query": "q"}',
        '{"query": "q", "positive": ""}',
        '["q", "p"]',
        "{",
        '{"query": "q", "positive": "p2"}',
    ]
    write(tmp_path, "a.jsonl", "\n".join(rows))
    bad = BadRows()
    assert read_pairs(tmp_path, "a.jsonl", bad=bad) == [("q", "p"), ("q", "p2")]
    assert [row.line for row in bad.first] == [2, 3, 4, 5]
    assert bad.first[1].reason == "query and positive: empty"
    assert read_pairs(tmp_path, "a.jsonl") == [("q", "p"), ("q", "p2")]


@pytest.mark.parametrize("name", ["missing.jsonl", "../a.jsonl", "a.txt", "none.jsonl"])
def test_pairs_that_are_none_are_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path, "a.txt", "one")
    write(tmp_path, "none.jsonl", '"one"\n')
    with pytest.raises(InvalidOptionError) as caught:
        read_pairs(tmp_path, name)
    assert caught.value.option == "pairs"
