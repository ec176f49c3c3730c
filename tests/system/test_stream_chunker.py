"""Texts that arrive in pieces, with real tokenizers: the laws of their chunks."""

import re
from functools import cache
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st
from tokenizers import Tokenizer

from sutra_tasks.engines.model_folder import locate
from sutra_tasks.engines.tokenizing.tokenizing_encoder import TokenizingEncoder
from sutra_tasks.streaming.chunker import OverlapChunker, TextProgress
from tests.system.tiny_models import FOREIGN, KINDS, PROSE, tiny_encoder

BOOK = "\n".join(topics.values())
PIECES = st.sampled_from(
    (PROSE, FOREIGN, BOOK[:3000], "words ", "x" * 130, " " * 50, "👩‍👩‍👧", "ﷺ", "[SEP]")
)
TEXTS = st.lists(PIECES | st.text(st.characters(codec="utf-8"), max_size=9), max_size=12).map("".join)


@cache
def minilm() -> TokenizingEncoder:
    tokenizer = Tokenizer.from_file(str(Path(locate("all-MiniLM-L6-v2"), "tokenizer.json")))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return TokenizingEncoder(tokenizer, {}, 256, pools_prompt=True)


def tokens_of(name):
    ids = minilm() if name == "minilm" else tiny_encoder(name)

    def offsets(text):
        (whole,) = ids.tokenize([text], None)
        return ids.offsets(whole)

    return offsets


def arriving(chunker, pieces):
    kept, progress, found = "", TextProgress(), []
    for at, piece in enumerate(pieces):
        kept += piece
        chunks, left = chunker.chunks(kept, progress, "end" if at == len(pieces) - 1 else None)
        kept = kept[left.progress.position - progress.position :]
        progress = left.progress
        assert len(kept) < chunker.most_chars
        found += chunks
    return found


def check_laws(chunker, text, chunks):
    assert (chunks[0].start, chunks[-1].end) == (0, len(text))
    assert [chunk.overlap_next for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    for before, after in pairwise(chunks):
        assert before.start <= after.start <= before.end
        assert before.end < after.end or after is chunks[-1]
    for chunk in chunks:
        assert chunk.text == text[chunk.start : chunk.end]
        assert len(chunker.offsets(chunk.text)) <= chunker.chunk_size or len(chunk.text) == 1


@pytest.mark.parametrize("name", ["minilm", *KINDS])
@laws(max_examples=25, deadline=None)
@given(
    text=TEXTS,
    size=st.integers(1, 40),
    share=st.floats(0, 0.85),
    cuts=st.lists(st.integers(0, 5000), max_size=20).map(sorted),
)
def test_the_laws_hold_however_a_text_is_split(name, text, size, share, cuts):
    chunker = OverlapChunker(size, int(share * size), tokens_of(name))
    expected = arriving(chunker, [text])
    check_laws(chunker, text, expected)
    assert (
        arriving(chunker, [text[a:b] for a, b in pairwise([0, *cuts, max([len(text), *cuts])])])
        == expected
    )


def test_a_books_chunks_are_full_overlap_and_begin_with_words():
    text = BOOK[:60_000]
    chunker = OverlapChunker(254, 25, tokens_of("minilm"))
    expected = arriving(chunker, [text])
    check_laws(chunker, text, expected)
    assert arriving(chunker, re.findall(r".{1,97}", text, re.DOTALL)) == expected

    lengths = [len(chunker.offsets(chunk.text)) for chunk in expected]
    assert min(lengths[:-1]) >= 0.85 * 254 - 1
    for before, after in pairwise(expected):
        shared = len(chunker.offsets(text[after.start : before.end]))
        assert 25 <= shared <= 25 + (254 - 25) // 4
        assert not re.fullmatch(r"[^\W_]{2}", text[after.start - 1 : after.start + 1])
