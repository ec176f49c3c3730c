"""Chunks of a text that arrives in pieces: the three laws with any tokenizer, and where they are cut."""

import re
from collections.abc import Callable
from itertools import pairwise
from random import Random
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st

from sutra_tasks.engines.offsets import Offsets
from sutra_tasks.streaming.chunker import Chunk, Ending, OverlapChunker, TextProgress

Tokenize = Callable[[str], Offsets]


def offsets_of(spans: list[tuple[int, int]]) -> Offsets:
    starts, ends = np.array(spans, dtype=np.int64).reshape(-1, 2).T
    return Offsets(starts, ends)


def words(text: str) -> Offsets:
    return offsets_of([word.span() for word in re.finditer(r"\S+", text)])


def letters(text: str) -> Offsets:
    return offsets_of([(at, at + 1) for at in range(len(text))])


def pairs(text: str) -> Offsets:
    return offsets_of([(at, min(at + 2, len(text))) for at in range(0, len(text), 2)])


def utf8(text: str) -> Offsets:
    """One token a byte: those of a character share it."""
    return offsets_of([(at, at + 1) for at, one in enumerate(text) for _ in one.encode()])


def five_a_letter(text: str) -> Offsets:
    return offsets_of([(at // 5, at // 5 + 1) for at in range(5 * len(text))])


def sharing(text: str) -> Offsets:
    """Tokens of three letters, each two of them its neighbour's too; spaces are dropped."""
    return offsets_of([(at, min(at + 3, len(text))) for at, one in enumerate(text) if not one.isspace()])


def back_and_forth(text: str) -> Offsets:
    """Words, every second one named before the one in front of it."""
    spans = [word.span() for word in re.finditer(r"\w+|[^\w\s]", text)]
    spans[:-1:2], spans[1::2] = spans[1::2], spans[: len(spans) // 2 * 2 : 2]
    return offsets_of(spans)


def pieces_of_words(text: str) -> Offsets:
    """Tokenise as WordPiece does: by itself half a word has other tokens, and a long word only one."""
    spans: list[tuple[int, int]] = []
    for word in re.finditer(r"\S+", text):
        start, end = word.span()
        size = 1 if end - start < 5 else 3 if end - start < 12 else end - start
        spans += [(at, min(at + size, end)) for at in range(start, end, size)]
    return offsets_of(spans)


def nothing(text: str) -> Offsets:
    return offsets_of([])


def anything(text: str) -> Offsets:
    """Any tokens at all, by the whole text: the smallest change makes all of them others."""
    dice = Random(crc32(text.encode()))
    most = dice.choice([0, 1, len(text) // 4, len(text), 3 * len(text)])
    spans = [sorted(dice.choices(range(len(text) + 1), k=2)) for _ in range(dice.randint(0, most))]
    return offsets_of([(one[0], one[1]) for one in (sorted(spans) if dice.random() < 0.7 else spans)])


TOKENIZERS: dict[str, Tokenize] = {
    one.__name__: one
    for one in (
        words, letters, pairs, utf8, five_a_letter, sharing, back_and_forth, pieces_of_words, nothing,
        anything,
    )
}  # fmt: skip
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS)

SOME = [
    "The quick brown fox ",
    "over. ",
    "3.14",
    "naïve! ",
    "世界。",
    "👩‍👩‍👧",
    "e\u0301",
    " " * 30,
    "\n\n",
    "x" * 15,
]
TEXTS = st.builds(
    lambda some, times: "".join(some) * times,
    st.lists(st.sampled_from(SOME) | st.text(st.characters(codec="utf-8"), max_size=9), max_size=6),
    st.integers(1, 6),
)
CUTS = st.lists(st.integers(0, 400), max_size=12).map(sorted)


@st.composite
def chunkers(draw: st.DrawFn, tokenizer: str = "words", largest: int = 12) -> OverlapChunker:
    size = draw(st.integers(1, largest))
    return OverlapChunker(size, draw(st.integers(0, 85 * size // 100)), TOKENIZERS[tokenizer])


class Writer:
    """A text that arrives, and what is kept of it, as a device does."""

    def __init__(self, chunker: OverlapChunker) -> None:
        self.chunker, self.kept, self.progress, self.missing = chunker, "", TextProgress(), 0
        self.chunks: list[Chunk] = []

    def add(self, piece: str, ending: Ending | None = None) -> list[Chunk]:
        self.kept += piece
        found, left = self.chunker.chunks(self.kept, self.progress, ending)
        self.kept = self.kept[left.progress.position - self.progress.position :]
        self.progress, self.missing = left.progress, left.missing
        self.chunks += found
        return found


def split(text: str, cuts: list[int]) -> list[str]:
    return [text[before:after] for before, after in pairwise([0, *cuts, max(len(text), *cuts, 0)])]


def chunks_of(chunker: OverlapChunker, text: str) -> list[Chunk]:
    return chunker.chunks(text, TextProgress(), "end")[0]


def check_laws(chunker: OverlapChunker, text: str, chunks: list[Chunk]) -> None:
    assert [chunk.number for chunk in chunks] == [*range(len(chunks))]
    assert [chunk.text for chunk in chunks] == [text[chunk.start : chunk.end] for chunk in chunks]
    assert (chunks[0].start, chunks[0].overlap_previous, chunks[-1].end) == (0, False, len(text))
    for before, after in pairwise(chunks):
        assert before.start <= after.start <= before.end
        assert before.end < after.end or (after is chunks[-1] and before.end == after.end)
        assert after.overlap_previous == (after.start < before.end)

    assert [chunk.overlap_next for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    for chunk in chunks:
        assert len(chunker.offsets(chunk.text)) <= chunker.chunk_size or len(chunk.text) == 1


@every_tokenizer
@laws(max_examples=25, deadline=None)
@given(data=st.data(), text=TEXTS, cuts=CUTS)
def test_the_laws_hold_however_a_text_is_split(
    tokenizer: str, data: st.DataObject, text: str, cuts: list[int]
) -> None:
    chunker = data.draw(chunkers(tokenizer))
    # Some texts end where a stretch does.
    text = text[: data.draw(st.sampled_from([len(text), *chunker.probes()]))]
    expected = chunks_of(chunker, text)
    check_laws(chunker, text, expected)
    assert all(chunk.flushed is None for chunk in expected)

    pieces = [*split(text, cuts), *data.draw(st.sampled_from([[], [""]]))]
    writer = Writer(chunker)
    for piece in pieces[:-1]:
        writer.add(piece)
        assert len(writer.kept) < chunker.most_chars
    writer.add(pieces[-1], "end")
    assert writer.chunks == expected


@every_tokenizer
@laws(max_examples=10, deadline=None)
@given(data=st.data(), text=TEXTS)
def test_no_chunk_comes_before_the_characters_that_are_missing(
    tokenizer: str, data: st.DataObject, text: str
) -> None:
    chunker = data.draw(chunkers(tokenizer))
    eager, patient, waiting = Writer(chunker), Writer(chunker), ""
    idle = data.draw(st.sets(st.integers(0, 30)))
    for at, letter in enumerate(text[:300]):
        before = eager.missing
        found = eager.add(letter)
        assert eager.missing >= 1
        if before > 1:
            assert (found, eager.missing) == ([], before - 1)
        waiting += letter
        if len(waiting) >= patient.missing:
            patient.add(waiting)
            waiting = ""
        if at in idle:
            eager.add("", "idle")
            patient.add(waiting, "idle")
            waiting = ""
    assert patient.chunks == eager.chunks


@every_tokenizer
@laws(max_examples=25, deadline=None)
@given(data=st.data(), text=TEXTS, cuts=CUTS)
def test_the_laws_hold_if_a_text_stands_still_anywhere(
    tokenizer: str, data: st.DataObject, text: str, cuts: list[int]
) -> None:
    chunker = data.draw(chunkers(tokenizer))
    writer = Writer(chunker)
    pieces = split(text, cuts)
    ends = [sum(map(len, pieces[: at + 1])) for at in range(len(pieces))]
    for piece, end in zip(pieces, ends, strict=True):
        covered = writer.progress.covered
        found = writer.add(piece, "idle")
        assert writer.progress.covered == end
        if covered == end:
            assert not found
        else:
            assert found[-1].end == end
            assert all(chunk.flushed is None for chunk in found[:-1])
            # Where the text stood still just as a chunk was complete, nothing is left to flush.
            assert found[-1].flushed == "idle" or len(found[-1].text) in chunker.probes()
        assert not writer.add("", "idle")
        assert writer.missing >= 1
        assert len(writer.kept) < chunker.most_chars
    (last,) = writer.add("", "end")[-1:]
    assert last.flushed is None
    check_laws(chunker, text, writer.chunks)


@laws(max_examples=50, deadline=None)
@given(total=st.integers(1, 400), chunker=chunkers("letters", largest=40))
def test_one_giant_word_is_cut_as_specified(total: int, chunker: OverlapChunker) -> None:
    """As ``extract_chunk`` does, but for what it reads behind the end."""
    expected = [(0, min(chunker.chunk_size, total))]
    while expected[-1][1] < total:
        start = max(0, expected[-1][1] - chunker.overlap)
        expected.append((start, min(start + chunker.chunk_size, total)))
    found = chunks_of(chunker, "x" * total)
    assert [(chunk.start, chunk.end) for chunk in found] == expected


@laws(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), max_size=200), chunker=chunkers("words", largest=30))
def test_chunks_are_full_and_share_what_they_should(lengths: list[int], chunker: OverlapChunker) -> None:
    size, overlap = chunker.chunk_size, chunker.overlap
    found = chunks_of(chunker, " ".join("x" * length for length in lengths))
    assert sum(len(words(chunk.text)) for chunk in found) >= len(lengths)
    for chunk in found[:-1]:
        assert len(words(chunk.text)) == size
    for before, after in pairwise(found):
        assert len(words(before.text[after.start - before.start :])) == overlap


def test_a_chunk_ends_with_a_sentence_and_the_next_begins_with_a_word() -> None:
    text = "Aaa bbb ccc ddd eee fff ggg hhh iii. Jjj kkk lll mmm nnn ooo ppp qqq rrr"
    found = chunks_of(OverlapChunker(40, 6, letters), text)
    assert [chunk.text for chunk in found] == [
        "Aaa bbb ccc ddd eee fff ggg hhh iii. ",  # not "Jjj"
        " iii. Jjj kkk lll mmm nnn ooo ppp qqq ",
        "ppp qqq rrr",
    ]


def test_the_start_of_a_word_is_looked_for_in_a_quarter_of_the_way() -> None:
    for word, expected in ((33, 33), (26, 26), (25, 34)):
        text = " ".join(["x" * (word - 1), "y" * 300])
        first, second, *_ = chunks_of(OverlapChunker(40, 6, letters), text)
        assert (first.end, second.start) == (40, expected)


def test_a_word_that_is_cut_has_no_more_tokens_by_itself() -> None:
    text = ("y" * 12 + " ") * 30  # one token; 11 of its letters are four
    for size in range(1, 9):
        chunker = OverlapChunker(size, 85 * size // 100, pieces_of_words)
        check_laws(chunker, text, chunks_of(chunker, text))


def test_an_overlap_that_leaves_no_room_is_left_out() -> None:
    def dense_by_itself(text: str) -> Offsets:
        return five_a_letter(text) if text.startswith("bb") else letters(text)

    found = chunks_of(OverlapChunker(4, 2, dense_by_itself), "aabbaaaaaa")
    assert [(chunk.text, chunk.start) for chunk in found] == [("aabb", 0), ("aaaa", 4), ("aaaa", 6)]
    assert [chunk.overlap_previous for chunk in found] == [False, False, True]


def test_a_boundary_does_not_retreat_into_the_overlap() -> None:
    def dense_by_itself(text: str) -> Offsets:
        first = [(0, 1), (0, 1)] if text.startswith("b") else []
        return offsets_of([*first, *((at, at + 1) for at in range(len(text)))])

    found = chunks_of(OverlapChunker(20, 17, dense_by_itself), "aaab" + "c" * 15 + " " + "d" * 40)
    assert [(chunk.start, chunk.end) for chunk in found[:2]] == [(0, 20), (3, 21)]


def test_a_chunk_waits_for_a_few_tokens_behind_it() -> None:
    writer = Writer(OverlapChunker(31, 0, pairs))
    assert (31 + 8) * 2 in writer.chunker.probes()
    assert not writer.add("x" * 77)
    assert writer.add("x")


@pytest.mark.parametrize("tokenizer", [words, letters])
@pytest.mark.parametrize("text", ["", " ", " \n" * 9, "\t" * 700])
def test_a_text_without_words_has_chunks_too(tokenizer: Tokenize, text: str) -> None:
    chunker = OverlapChunker(5, 2, tokenizer)
    found = chunks_of(chunker, text)
    check_laws(chunker, text, found)
    if len(text) <= 5:
        assert found == [Chunk(text, 0, 0, len(text), overlap_previous=False, overlap_next=False)]


def test_what_there_is_becomes_a_chunk_when_a_text_stands_still() -> None:
    writer = Writer(OverlapChunker(4, 2, words))
    (flushed,) = writer.add("one two three", "idle")
    assert flushed == Chunk(
        "one two three", 0, 0, 13, overlap_previous=False, overlap_next=True, flushed="idle"
    )
    assert writer.kept == "two three"
    assert writer.add(" four", None) == []
    assert writer.add("", "end") == [
        Chunk("two three four", 1, 4, 18, overlap_previous=True, overlap_next=False)
    ]


def test_a_text_that_stands_still_before_it_begins_has_no_chunk() -> None:
    writer = Writer(OverlapChunker(4, 2, words))
    assert writer.add("", "idle") == []
    assert writer.progress == TextProgress()


def test_a_flushed_chunk_within_the_overlap_is_whole_in_the_next() -> None:
    writer = Writer(OverlapChunker(8, 4, words))
    writer.add("Hello", "idle")
    (second,) = writer.add(" there", "idle")
    assert (second.text, second.start, second.overlap_previous) == ("Hello there", 0, True)


def test_a_text_that_ends_after_it_stood_still_has_a_last_chunk() -> None:
    for overlap, text in ((0, ""), (4, "Hello")):
        writer = Writer(OverlapChunker(8, overlap, words))
        writer.add("Hello", "idle")
        (last,) = writer.add("", "end")
        assert (last.text, last.end, last.overlap_next, last.flushed) == (text, 5, False, None)


def test_an_abandoned_text_has_a_last_chunk_that_says_so() -> None:
    writer = Writer(OverlapChunker(3, 1, letters))
    found = writer.add("abcdef", "abandoned")
    assert [(one.text, one.overlap_next, one.flushed) for one in found] == [
        ("abc", True, None),
        ("cde", True, None),
        ("ef", False, "idle"),
    ]


@pytest.mark.parametrize("tokenizer", TOKENIZERS.keys() - {"anything"})
@pytest.mark.parametrize("letter", ["x", " ", "x ", ". ", "世"])
def test_a_text_that_never_ends_is_not_kept(tokenizer: str, letter: str) -> None:
    longest = 0

    def watched(text: str) -> Offsets:
        nonlocal longest
        longest = max(longest, len(text))
        return TOKENIZERS[tokenizer](text)

    chunker = OverlapChunker(16, 4, watched)
    assert 32 * 16 <= chunker.most_chars < 41 * 16
    writer = Writer(chunker)
    for _ in range(20):
        writer.add(letter * 100)
        assert len(writer.kept) < chunker.most_chars
    total = 2000 * len(letter)
    assert writer.progress.covered > total - chunker.most_chars
    tokens = len(TOKENIZERS[tokenizer](letter * 2000))
    assert len(writer.chunks) <= 2 * tokens // (16 - 4) + total // (32 * 16)
    assert longest <= chunker.most_chars


def test_very_long_words_are_not_in_many_chunks() -> None:
    chunker = OverlapChunker(16, 4, words)
    text = ("x" * 99 + " ") * 200
    found = chunks_of(chunker, text)
    check_laws(chunker, text, found)
    assert len(found) <= len(text) // (32 * 16) + 1


def test_a_stretch_is_as_long_as_its_text_needs() -> None:
    """Letters wait for twice their number, white space for the largest stretch."""
    for letter, most in (("x", 2 * 40), ("xxxx ", 7 * 40), (" " * 9, 40 * 40)):
        writer = Writer(OverlapChunker(30, 3, letters if letter == "x" else words))
        while not writer.add(letter):
            assert len(writer.kept) < most


def test_stretches_grow_by_a_quarter() -> None:
    for size in (1, 2, 20, 254, 8000):
        probes = OverlapChunker(size, 0, words).probes()
        assert probes[0] == max(8, 2 * size)
        assert probes[-2] < 32 * size <= probes[-1]
        assert all(before < after <= 1.25 * before + 1 for before, after in pairwise(probes))


@laws(max_examples=50, deadline=None)
@given(size=st.integers(-2, 10_000), data=st.data())
def test_an_overlap_that_might_never_advance_is_refused(size: int, data: st.DataObject) -> None:
    most = 85 * size // 100
    overlap = data.draw(st.integers(-2, max(1, size + 2)) | st.sampled_from([most, most + 1]))
    if size >= 1 and 0 <= 100 * overlap <= 85 * size:
        assert OverlapChunker(size, overlap, words).overlap == overlap
    else:
        with pytest.raises(ValueError, match=str(size)):
            OverlapChunker(size, overlap, words)


def test_a_refusal_tells_what_is_allowed() -> None:
    with pytest.raises(ValueError, match=r"overlap of 18 tokens must be 0 to 17: .* of 20$"):
        OverlapChunker(20, 18, words)
    with pytest.raises(ValueError, match="a chunk of 0 tokens holds no text"):
        OverlapChunker(0, 0, words)


def test_a_log_is_no_place_for_texts() -> None:
    (chunk,) = chunks_of(OverlapChunker(4, 1, words), "secret")
    assert repr(chunk) == "<Chunk 0 0:6>"
