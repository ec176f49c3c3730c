"""Where a long text is cut: the laws for any Unicode text, and the places that a boundary prefers."""

import re
from functools import cache
from itertools import chain, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from sutra_tasks.chunking.chunker import Chunker, character_spans, is_word_start
from sutra_tasks.engines.offsets import Offsets

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It costs 3.14, said Dr. Who!",
    "Tokenization of running, jumped and supercalifragilistic words; naïve façades.",
    "Привет, мир! こんにちは世界。 हिन्दी में लिखा है। שלום עולם",
] * 10
ACUTE = "\N{COMBINING ACUTE ACCENT}"
FAMILY = "\N{ZERO WIDTH JOINER}".join("\N{WOMAN}\N{WOMAN}\N{GIRL}")
HONORIFIC = "\N{ARABIC LIGATURE SALLALLAHOU ALAYHE WASALLAM}"  # 18 characters under NFKC
AWKWARD = [
    *f"e{ACUTE} {FAMILY} {HONORIFIC} हिन्दी। שָׁלוֹם 한국어 世界。」 𐍈 \N{LATIN SMALL LIGATURE FFI}".split(),
    *("\0", "\N{SOFT HYPHEN}", "\N{ZERO WIDTH SPACE}", "\N{RIGHT-TO-LEFT OVERRIDE}", "\xa0"),
    *("\n\n", "\r\n", " \t", " " * 40, ". ", '." ', "3.14", "...", ")" * 20, "x" * 30),
]
PROSE = ["The quick brown fox ", "jumps over the lazy dog. ", "words ", "Running, ", "3.14 ", "naïve! "]
PIECES = st.sampled_from(PROSE) | st.sampled_from(AWKWARD) | st.text(max_size=12)
TEXTS = st.builds(lambda pieces, times: "".join(pieces) * times, st.lists(PIECES), st.integers(1, 9))
# Lone surrogates too: no tokenizer takes them, but slices of a text may have them.
ANY_TEXT = st.text(st.characters(codec=None), max_size=60)


@st.composite
def chunkers(draw: st.DrawFn, largest: int = 24) -> Chunker:
    block = draw(st.integers(1, largest))
    return Chunker(block, draw(st.integers(0, 85 * block // 100)))


@st.composite
def tokens_anywhere(draw: st.DrawFn) -> tuple[str, Offsets]:
    """Draw a text, and tokens that may share characters, skip some, be empty or go back."""
    text = draw(ANY_TEXT)
    span = st.tuples(st.integers(0, len(text)), st.integers(0, len(text))).map(sorted)
    spans = draw(st.lists(span, max_size=100))
    return text, offsets_of(sorted(spans) if draw(st.booleans()) else spans)


def offsets_of(spans: list[list[int]] | list[tuple[int, int]]) -> Offsets:
    starts, ends = np.array(spans, dtype=np.int64).reshape(-1, 2).T
    return Offsets(starts, ends)


def one_a_character(text: str) -> Offsets:
    return offsets_of([(at, at + 1) for at in range(len(text))])


def cuts(chunker: Chunker, text: str) -> list[tuple[int, int]]:
    """Return the chunks of a text whose characters are its tokens."""
    return chunker.spans(text, one_a_character(text))


@cache
def tokenizer(name: str) -> Tokenizer:
    """Train a tokenizer with a small vocabulary, so that most words have several tokens."""
    made: Tokenizer
    trainer: trainers.Trainer
    if name == "wordpiece":
        made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.normalizer = normalizers.BertNormalizer()
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(
            vocab_size=150, special_tokens=["[UNK]"], show_progress=False
        )
    elif name == "unigram":
        made = Tokenizer(models.Unigram())
        made.normalizer = normalizers.NFKC()
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=150, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
        )
    else:
        trim = name == "byte-level, trimmed"
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=trim)
        made.post_processor = processors.ByteLevel(trim_offsets=trim)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    return made


def tokenized(name: str, text: str) -> Offsets:
    return offsets_of(tokenizer(name).encode(text, add_special_tokens=False).offsets)


every_tokenizer = pytest.mark.parametrize(
    "name", ["wordpiece", "byte-level", "byte-level, trimmed", "unigram"]
)


def check_spans(chunker: Chunker, total: int, spans: list[tuple[int, int]]) -> None:
    block, overlap = chunker.block, chunker.overlap
    assert set(chain.from_iterable(range(*span) for span in spans)) == set(range(total))
    assert all(1 <= end - start <= block for start, end in spans)
    assert len(spans) <= 1 or total > block

    steps = list(pairwise(spans))
    assert all(before[0] < after[0] and before[1] < after[1] for before, after in steps)
    shared = [before[1] - after[0] for before, after in steps]
    assert shared[:-1] == [overlap] * len(shared[:-1])
    assert all(tokens >= overlap for tokens in shared)

    assert all(20 * (block - (end - start)) <= 3 * block for start, end in spans[:-1])
    assert all(2 * (after - before) >= block - overlap for (before, _), (after, _) in steps[:-1])
    assert len(spans) <= 2 + 2 * max(0, total - block) / (block - overlap)
    if steps:
        (_, before), (start, end) = steps[-1]
        assert 4 * (end - before) >= block or end - start == block
        assert shared[-1] == overlap or 4 * (end - before) < block


def check_characters(offsets: Offsets, spans: list[tuple[int, int]]) -> None:
    found = character_spans(offsets, spans)
    assert len(found) == len(spans)
    in_order = bool(np.all(np.diff(offsets.starts) >= 0) and np.all(np.diff(offsets.ends) >= 0))
    for tokens, (start, end) in zip(spans, found, strict=True):
        first, last = offsets.starts[slice(*tokens)].min(), offsets.ends[slice(*tokens)].max()
        assert start <= first
        assert last <= end
        if in_order:
            assert (start, end) == (first, last)
    for before, after in pairwise(found):
        assert before[0] <= after[0]
        assert before[1] <= after[1]


def check_retreats(chunker: Chunker, text: str, offsets: Offsets, spans: list[tuple[int, int]]) -> None:
    """Check that each boundary that retreated is at the end of a word or a sentence."""
    for start, end in spans[:-1]:
        if end - start == chunker.block:
            continue
        before, after = int(offsets.ends[end - 1]), int(offsets.starts[end])
        assert before <= after, "within a character"
        assert not re.fullmatch(r"[^\W_]{2,}", text[max(0, before - 1) : after + 1]), "within a word"


@every_tokenizer
@laws(max_examples=50, deadline=None)
@given(text=TEXTS, chunker=chunkers())
def test_the_laws_hold_for_any_text_and_tokenizer(name: str, text: str, chunker: Chunker) -> None:
    offsets = tokenized(name, text)
    spans = chunker.spans(text, offsets)
    check_spans(chunker, len(offsets), spans)
    check_characters(offsets, spans)
    check_retreats(chunker, text, offsets, spans)


@laws(max_examples=50, deadline=None)
@given(tokens=tokens_anywhere(), chunker=chunkers())
def test_the_laws_hold_wherever_tokens_stand(tokens: tuple[str, Offsets], chunker: Chunker) -> None:
    text, offsets = tokens
    spans = chunker.spans(text, offsets)
    check_spans(chunker, len(offsets), spans)
    check_characters(offsets, spans)
    check_retreats(chunker, text, offsets, spans)


@laws(max_examples=40, deadline=None)
@given(text=st.text("ab. \n", max_size=900), chunker=chunkers(largest=200))
def test_the_laws_hold_for_large_blocks(text: str, chunker: Chunker) -> None:
    spans = cuts(chunker, text)
    check_spans(chunker, len(text), spans)
    check_characters(one_a_character(text), spans)


def specified(total: int, chunk_size: int, overlap: int) -> list[tuple[int, int]]:
    """Cut as the specification's ``create_overlapping_chunks`` does."""
    chunks = []
    start_idx = 0
    while start_idx < total:
        end_idx = min(start_idx + chunk_size, total)
        chunks.append((start_idx, end_idx))
        if end_idx == total:
            break
        start_idx = end_idx - overlap
    return chunks


@laws(max_examples=60, deadline=None)
@given(total=st.integers(0, 900), chunker=chunkers(largest=200))
def test_one_giant_word_is_cut_as_specified_but_for_a_short_tail(total: int, chunker: Chunker) -> None:
    expected = specified(total, chunker.block, chunker.overlap)
    if len(expected) > 1 and 4 * (total - expected[-2][1]) < chunker.block:
        expected[-1] = (total - chunker.block, total)
    assert cuts(chunker, "x" * total) == expected


def test_the_specifications_own_picture() -> None:
    assert cuts(Chunker(512, 50), "x" * 1436) == [(0, 512), (462, 974), (924, 1436)]


def best_cut(text: str, least: int, most: int) -> int:
    """Return the last end of a sentence, else of a word, else the most: by looking at each."""
    sentences, words = [0], [0]
    for cut in range(least, most + 1):
        before, after = text[:cut], text[cut:]
        space = before[len(before.rstrip()) :] + after[: -len(after.lstrip())]
        if space.count("\n") > 1 or (space and re.search(r'\."*\s*$', before)):
            sentences.append(cut)
        if space or not (before + after)[cut - 1 : cut + 1].isalnum():
            words.append(cut)
    return max(sentences) or max(words) or most


@laws(max_examples=60, deadline=None)
@given(around=st.text('ab. \n"', min_size=14, max_size=20))
def test_a_boundary_is_the_last_sentence_end_else_the_last_word_end(around: str) -> None:
    text = "x" * 46 + around + "x" * 80
    assert cuts(Chunker(60, 0), text)[0] == (0, best_cut(text, 60 - 9, 60))


@pytest.mark.parametrize(
    "text",
    [
        "One. |Two three^ four",  # a sentence before a word
        "One two |thr^ee",
        "One two. |^Three",
        "One two.|^ Three",  # the space may be the next window's
        "One two.  |^ Three",
        "One. Two three! |Fo^ur",
        "Stop. |Pi is 3.1^4",  # a decimal point
        "Stop. |See a.b^c",
        "Which? |Then^",
        'He said "Stop." |Then we^nt',
        "It stops (here [now!]) |and^",
        "«¡Alto!» |Lue^go",
        "Wait…|an d^",
        "下一句。|还有、很^多",  # no space follows a full stop in Chinese
        "「下一句。」|还有、^很多",
        "下一句！|还有、^很多",  # noqa: RUF001
        "本当？|はい、^",  # noqa: RUF001
        "半角｡|そう、^",
        "लिखा है। |फिर से^",
        "نعم؟ |ثم نعم^",
        "Stop. |a\nb ^c",  # a single line break ends a word only
        "Stop. A title\n\n|and the^n",
        "Stop. A title\n  \n|and the^n",
        "Stop. A title.            |and the^n",
        "Stop. A title\r\n\r\n|and the^n",
        "plain, |wor^d",
        "well-|known^",
        "逗号、|没有^空格",
        "हिन्|^दी",  # vowel signs are of their word
        f"cafe{ACUTE}|^s",
        "😀😀|^😀",
    ],
)
def test_a_boundary_retreats(text: str) -> None:
    """A block that is full at ``^`` is cut at ``|``."""
    cut, full = text.replace("^", "").index("|"), text.replace("|", "").index("^")
    before = "x" * (200 - full)
    spans = cuts(Chunker(200, 0), before + text.replace("|", "").replace("^", "") + "x" * 300)
    assert spans[0] == (0, len(before) + cut)


@pytest.mark.parametrize(("overlap", "retreat"), [(0, 15), (50, 15), (70, 15), (71, 14), (85, 7)])
@pytest.mark.parametrize("end", [". ", " "])
def test_a_boundary_retreats_15_percent_or_half_the_way(overlap: int, retreat: int, end: str) -> None:
    for back, expected in ((retreat, 100 - retreat), (retreat + 1, 100)):
        text = ("x" * (100 - back - len(end)) + end).ljust(300, "x")
        assert cuts(Chunker(100, overlap), text)[0] == (0, expected)


@pytest.mark.parametrize("block", [20, 100, 512])
def test_the_largest_overlap_still_advances_by_half_of_the_way(block: int) -> None:
    chunker = Chunker(block, 85 * block // 100)
    way = block - chunker.overlap
    full, retreating = (cuts(chunker, text * 10 * block) for text in ("x", ". "))
    assert {after[0] - before[0] for before, after in pairwise(full[:-1])} == {way}
    assert len(full) <= 1 + -(-9 * block // way)
    assert len(retreating) <= 1 + -(-19 * block // (way - way // 2))


@pytest.mark.parametrize(
    "text", ["|one| |two|", "|3|.|14|", f"|cafe{ACUTE}s|", "|नि|!|", "|😀|x|", "|", "|a|_|b|"]
)
def test_a_word_starts_where_no_letters_or_digits_meet(text: str) -> None:
    parts = text.split("|")
    expected = {len("".join(parts[: at + 1])) for at in range(len(parts) - 1)}
    whole = "".join(parts)
    assert {at for at in range(len(whole) + 1) if is_word_start(whole, at)} == expected


def test_boundaries_near_the_beginning_of_a_text() -> None:
    for beginning in (" " * 9, "xxxxxxx. -", "xxxxxxx\n\n-"):
        assert cuts(Chunker(10, 0), beginning.ljust(60, "x") + "\n")[0] == (0, 9)


@every_tokenizer
def test_a_boundary_is_not_within_a_character(name: str) -> None:
    text = ("fox" + FAMILY) * 40
    offsets = tokenized(name, text)
    for block in range(40, 60):
        for _, end in Chunker(block, 0).spans(text, offsets)[:-1]:
            assert offsets.ends[end - 1] <= offsets.starts[end]


@every_tokenizer
@pytest.mark.parametrize("syllable", [f"e{ACUTE}a", "नि", "न्"])
def test_a_word_does_not_end_where_the_tokenizer_drops_an_accent(name: str, syllable: str) -> None:
    word = syllable * 45
    offsets = tokenized(name, word)
    assert len(offsets) > 40
    cut = [end for _, end in Chunker(20, 0).spans(word, offsets)]
    assert cut[:-1] == [*range(20, len(offsets), 20)][: len(cut) - 1]


def test_a_word_ends_where_the_tokenizer_drops_a_space_or_a_symbol() -> None:
    for dropped in (" ", "\N{ZERO WIDTH SPACE}", "😀"):
        text = "x" * 18 + dropped + "x" * 41
        tokens = [(at, at + 1) for at in range(len(text)) if at != 18]
        assert Chunker(20, 0).spans(text, offsets_of(tokens))[0] == (0, 18)


@pytest.mark.parametrize("text", [")", " ", ". ", "\n", "x", "\u0301", '."'])
def test_no_text_is_looked_at_more_than_a_few_times(text: str) -> None:
    looked_at = 0

    class Watched(str):
        __slots__ = ()

        def __getitem__(self, key: object) -> str:
            nonlocal looked_at
            found = super().__getitem__(key)  # type: ignore[index]
            looked_at += len(found)
            return found

    tokens = 20_000
    cuts(Chunker(512, 50), Watched((text * tokens)[:tokens]))
    assert looked_at < 50 * tokens


@pytest.mark.parametrize(
    ("total", "expected"),
    [
        (0, []),
        (1, [(0, 1)]),
        (20, [(0, 20)]),
        (21, [(0, 20), (1, 21)]),  # one new token: the window is moved back
        (24, [(0, 20), (4, 24)]),
        (25, [(0, 20), (15, 25)]),  # a quarter of the block is worth a window
        (35, [(0, 20), (15, 35)]),
        (39, [(0, 20), (15, 35), (19, 39)]),
        (40, [(0, 20), (15, 35), (30, 40)]),
    ],
)
def test_a_tail_with_few_new_tokens_moves_back(total: int, expected: list[tuple[int, int]]) -> None:
    assert cuts(Chunker(20, 5), "x" * total) == expected


def test_chunks_are_slices_of_the_text() -> None:
    text = "Eins. Zwei drei vier. Fünf!"
    words = [(0, 4), (4, 5), (6, 10), (11, 15), (16, 20), (20, 21), (22, 26), (26, 27)]
    found = character_spans(offsets_of(words), [(0, 4), (3, 8)])
    assert found == ((0, 15), (11, 27))
    assert [text[slice(*span)] for span in found] == ["Eins. Zwei drei", "drei vier. Fünf!"]


def test_chunks_go_forward_where_tokens_do_not() -> None:
    tokens = offsets_of([(0, 1), (3, 4), (1, 3), (4, 5)])
    found = character_spans(tokens, [(0, 2), (1, 3), (3, 4)])
    assert ["abcde"[slice(*span)] for span in found] == ["abcd", "bcd", "e"]


@laws(max_examples=50, deadline=None)
@given(block=st.integers(-2, 10_000), data=st.data())
def test_an_overlap_is_at_most_85_percent_of_a_block_that_holds_text(
    block: int, data: st.DataObject
) -> None:
    most = 85 * block // 100
    overlap = data.draw(st.integers(-2, max(1, block + 2)) | st.sampled_from([most, most + 1]))
    if block >= 1 and 0 <= 100 * overlap <= 85 * block:
        assert Chunker(block, overlap).overlap == overlap
    else:
        with pytest.raises(ValueError, match=str(block)):
            Chunker(block, overlap)


@pytest.mark.parametrize(("block", "most"), [(1, 0), (6, 5), (20, 17), (256, 217), (512, 435)])
def test_a_refusal_tells_what_is_allowed(block: int, most: int) -> None:
    assert Chunker(block, most).overlap == most
    for overlap in (-1, most + 1, block, 2 * block):
        with pytest.raises(ValueError, match=rf"{overlap} tokens must be 0 to {most}: .* {block}$"):
            Chunker(block, overlap)
    for nothing in (0, -block):
        with pytest.raises(ValueError, match=f"{nothing} tokens holds no text"):
            Chunker(nothing, 0)
