"""What an entry, or a stretch of an open text, becomes on a device: chunks and rows, or an error."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sutra_tasks.engines.simulated_engine import SimulatedEncoder
from sutra_tasks.errors import PoisonMessageError
from sutra_tasks.settings import Settings
from sutra_tasks.streaming.chunker import Ending, TextProgress
from sutra_tasks.streaming.consumer.items import StreamItem
from sutra_tasks.streaming.consumer.tokenizing import StreamTokenizer
from sutra_tasks.streaming.delivered import OpenText

OPTIONS = Settings(block_size=12, overlap_tokens=3, max_text_chars=10_000)
TOKENIZER = StreamTokenizer(SimulatedEncoder(width=4), OPTIONS)
NAMES = st.sampled_from([b"text", b"id", b"key", b"seq", b"end", b"priority", b"prompt", b"other"])
WORDS = st.lists(st.sampled_from(["a", "süß", "🙂", "文 字", "\n", "end.\n\n", "longer"]), max_size=120)
START = TextProgress()


def entry_item(*fields: bytes) -> StreamItem:
    return TOKENIZER.entry_item("s", (b"17-3", list(fields)), 0.0)


def open_text(
    buffer: bytes, ending: Ending | None = "end", progress: TextProgress | None = None
) -> OpenText:
    return OpenText(b"k", b"1", 1, ending, buffer, "id", None, progress or TextProgress(), 5)


def cut(text: OpenText) -> StreamItem:
    item = TOKENIZER.text_item("s", text, 0.0)
    TOKENIZER.tokenize([item])
    return item


@given(st.lists(st.one_of(st.binary(max_size=12), NAMES), max_size=12))
def test_an_entry_of_any_fields_gets_rows_or_an_error(fields: list[bytes]) -> None:
    item = entry_item(*fields)
    assert item.arrived_ms == 17
    assert item.source
    TOKENIZER.tokenize([item])
    assert bool(item.rows) is (item.error is None)
    assert item.error_ids()


@pytest.mark.parametrize(
    ("fields", "source"),
    [
        ([b"id", b"mine", b"text", b"\xff"], "mine"),
        ([b"text", b"x", b"id", b"mine", b"seq", b"1"], "mine"),
        ([b"id", b"mine"], "mine"),
        ([b"id", b"\xff", b"text", b"x"], "17-3"),
        ([b"id", b"", b"text", b"\xff"], "17-3"),
        ([b"id", b"i" * 201, b"text", b"x"], "17-3"),
        ([b"text", b"\xff"], "17-3"),
    ],
)
def test_an_error_names_the_entry_as_its_producer_does(fields: list[bytes], source: str) -> None:
    item = entry_item(*fields)
    assert item.error is not None
    assert item.error_ids() == [source]


@given(WORDS)
def test_a_long_entry_is_cut_into_chunks_that_cover_it(words: list[str]) -> None:
    text = " ".join(words)
    item = entry_item(b"id", b"it", b"text", text.encode())
    TOKENIZER.tokenize([item])
    chunks = item.embedded()
    assert len(item.rows) == len(chunks)
    assert all(row.tokens <= 12 for row in item.rows)
    assert [row.content for row in item.rows] == [text[one.start : one.end] for one in chunks]
    assert (chunks[0].start, chunks[-1].end) == (0, len(text))
    assert all(two.start <= one.end < two.end for one, two in itertools.pairwise(chunks))
    assert [one.overlap_next for one in chunks] == [True] * (len(chunks) - 1) + [False]
    expected = ["it"] if len(chunks) == 1 else [f"it#{n}" for n in range(len(chunks))]
    assert [one.id for one in chunks] == expected


@given(WORDS, st.lists(st.integers(0, 40), min_size=1, max_size=400))
def test_a_text_cut_as_it_comes_gives_the_chunks_of_the_whole(
    words: list[str], sizes: list[int]
) -> None:
    whole = " ".join(words).encode()
    expected = cut(open_text(whole)).embedded()
    got = expected[:0]
    buffer, progress, taken = b"", TextProgress(), itertools.cycle(sizes)
    while whole:
        size = next(taken) + 1
        buffer, whole = buffer + whole[:size], whole[size:]
        item = cut(open_text(buffer, None, progress))
        assert item.error is None
        assert item.text_after == "open"
        assert item.need > len(buffer) - item.done_bytes
        assert [row.content for row in item.rows] == [chunk.text for chunk in item.chunks]
        got += item.embedded()
        buffer, progress = buffer[item.done_bytes :], item.progress
    last = cut(open_text(buffer, "end", progress))
    assert last.text_after == "ended"
    assert got + last.embedded() == expected


@pytest.mark.parametrize("ending", [None, "end", "idle", "abandoned"])
def test_bytes_that_are_not_utf8_are_given_up_and_the_text_goes_on_behind_them(
    ending: Ending | None,
) -> None:
    text = open_text(b"good \xff bad", ending, TextProgress(100, 7, 110))
    item = cut(text)
    assert type(item.error).__name__ == "InvalidTextError"
    assert (item.done_bytes, item.rows, item.chunks) == (len(text.buffer), [], [])
    assert item.progress == TextProgress(110, 8, 110)
    assert item.text_after == ("ended" if ending in ("end", "abandoned") else "open")
    assert item.error_ids() == ["id"]
    assert "good" not in str(item.error)


def test_a_piece_whose_text_is_damaged_says_which_keys_to_delete() -> None:
    item = entry_item(b"text", b"x", b"key", b"k")
    assert "sutra:stream:s:text:k and sutra:stream:s:pieces:k" in str(item.error)


def test_a_character_that_has_arrived_in_part_is_waited_for() -> None:
    text = "süß".encode()[:-1]
    item = cut(open_text(text, None))
    assert item.error is None
    item = cut(open_text(text, "idle"))
    assert [chunk.text for chunk in item.chunks] == ["sü"]
    assert item.text_after == "idle"


def test_a_text_that_is_given_up_is_neither_decoded_nor_tokenised() -> None:
    error = PoisonMessageError(3, "it ended its workers")
    item = TOKENIZER.text_item("s", open_text(b"it \xff"), 0.0)
    TOKENIZER.give_up(item, error)
    TOKENIZER.tokenize([item])
    assert item.error is error
    assert (item.done_bytes, item.text_after, item.rows) == (4, "ended", [])
    assert b"it \xff" in item.letter
