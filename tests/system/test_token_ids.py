"""Token ids of whole texts: their windows, where they stand in the text, and what travels of them."""

import json
import subprocess
import sys
from base64 import b64decode, b64encode
from difflib import SequenceMatcher
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from sutra_tasks.chunking.chunker import Chunker, character_spans
from sutra_tasks.engines.model_folder import locate
from sutra_tasks.engines.tokenizing import slices as slicing
from sutra_tasks.engines.tokenizing import tokenizing_encoder
from sutra_tasks.engines.tokenizing.tokenizing_encoder import TokenizingEncoder
from sutra_tasks.errors import CorruptMessageError
from tests.system.tiny_models import (
    FOREIGN,
    KINDS,
    PROSE,
    WINDOW,
    prompts_of,
    tiny_encoder,
    tokenizer_of,
)

AWKWARD = (
    "e\u0301",
    "ﷺ",
    "ﬁ",
    "\u200d",
    "👩‍👩‍👧",
    "\0",
    "\xad",
    " ",
    "  ",
    "\n\n",
    "\t",
    "[SEP]",
    "</s>",
)
PIECES = st.sampled_from((PROSE, FOREIGN, "words ", "fox", "run", "re", *AWKWARD)) | st.text(max_size=8)
TEXTS = st.lists(PIECES, max_size=6).map("".join)


every_kind = pytest.mark.parametrize("name", KINDS)


# Windows.


@every_kind
@laws(max_examples=40, deadline=None)
@given(data=st.data(), text=TEXTS)
def test_windows_are_slices_between_special_tokens_and_prompt(name, data, text):
    prompt = data.draw(st.sampled_from(prompts_of(name)))
    prefix = KINDS[name].prompts[prompt] if prompt else ""
    ids = tiny_encoder(name)
    (whole,) = ids.tokenize([text], prompt)
    offsets = ids.offsets(whole)
    said = tokenizer_of(name).encode(prefix + text)
    assert whole.content.ids.tolist() == said.ids
    assert whole.tokens == len(said.ids)

    mine = [
        at
        for at, (special, (_, end)) in enumerate(
            zip(said.special_tokens_mask, said.offsets, strict=True)
        )
        if not special and end > len(prefix)
    ]
    assert len(offsets) == len(mine)
    assert [at + 1 for at in mine[:-1]] == mine[1:]
    assert offsets.starts.tolist() == [max(0, said.offsets[at][0] - len(prefix)) for at in mine]
    assert offsets.ends.tolist() == [said.offsets[at][1] - len(prefix) for at in mine]
    assert (offsets.starts <= offsets.ends).all()
    assert (offsets.ends <= len(text)).all()

    first = mine[0] if mine else len(said.ids) - said.special_tokens_mask[1:].count(1)
    total = len(offsets)
    cuts = sorted(data.draw(st.lists(st.integers(0, total), min_size=2, max_size=6)))
    spans = [(start, stop) for start, stop in pairwise(cuts) if start < stop]
    rows = ids.windows(whole, offsets, [(0, total), *spans])
    assert rows[0].content.ids.tolist() == said.ids
    assert rows[0].content.prompt_tokens == whole.content.prompt_tokens
    for row, (start, stop) in zip(rows[1:], spans, strict=True):
        head, tail = said.ids[:first], said.ids[first + total :]
        assert row.content.ids.tolist() == head + said.ids[first + start : first + stop] + tail
        assert row.content.first == first
        assert row.tokens == len(row.content.ids)
        if start:  # none of a text's own tokens is left out of its vector, all of the prompt's are
            leaves = bool(prompt) and not KINDS[name].include_prompt
            assert row.content.prompt_tokens == (first if leaves else 0)


@every_kind
def test_a_tokens_place_is_where_its_letters_are(name):
    ids = tiny_encoder(name)
    text = "run" + PROSE
    for prompt in prompts_of(name):
        (whole,) = ids.tokenize([text], prompt)
        offsets = ids.offsets(whole)
        after = ids.windows(whole, offsets, [(0, len(offsets))])[0].content
        own = after.ids[after.first : after.first + len(offsets)].tolist()
        assert len(own) > 40
        for at, (token, start, end) in enumerate(zip(own, offsets.starts, offsets.ends, strict=True)):
            word = str(tokenizer_of(name).id_to_token(token)).replace("##", "").strip("Ġ▁")
            letters = text[start:end].strip()
            if word and letters.isascii() and word.isascii() and "unk" not in word.lower():
                assert word in (letters, letters.lower()) or (at == 0 and word.endswith(letters))
            assert start == 0 or text[offsets.ends[at - 1] : start].strip() == ""


SPECIALS = {
    "bert": (["[CLS]"], ["[SEP]"]),
    "bert-cls": (["[CLS]"], ["[SEP]"]),
    "roberta": (["<s>"], ["</s>"]),
    "t5": ([], ["</s>"]),
    "qwen": ([], []),
    "bare": ([], []),
}


@every_kind
def test_every_window_has_the_special_tokens_and_the_prompt(name):
    ids, kind = tiny_encoder(name), KINDS[name]
    before, after = SPECIALS[name]
    for prompt in prompts_of(name):
        prefix = kind.prompts[prompt] if prompt else ""
        (whole,) = ids.tokenize(["fox jumps over text"], prompt)
        offsets = ids.offsets(whole)
        total = len(offsets)
        for row in ids.windows(whole, offsets, [(0, total), (1, 3), (total - 1, total)]):
            tokens = [str(tokenizer_of(name).id_to_token(token)) for token in row.content.ids.tolist()]
            assert tokens[: len(before)] == before
            assert tokens[len(tokens) - len(after) :] == after
            head = "".join(tokens[len(before) : row.content.first]).replace("##", "")
            # What the prompt ends with may be part of the text's first token instead.
            said = prefix.replace("\n", "Ċ").replace(" ", "")
            head = head.replace("Ġ", "").replace("▁", "")
            assert said.startswith(head) or said.lower().startswith(head)
            assert len(said) - len(head) <= 1 or prompt == "merging"


def test_a_prompts_last_space_is_of_the_texts_first_token():
    ids, tokenizer = tiny_encoder("roberta"), tokenizer_of("roberta")
    (whole,) = ids.tokenize(["fox jumps"], "query")
    offsets = ids.offsets(whole)
    rows = ids.windows(whole, offsets, [(0, 1), (1, len(offsets))])
    one, other = (
        [str(tokenizer.id_to_token(token)) for token in row.content.ids.tolist()] for row in rows
    )
    assert one[-2:] == ["Ġfox", "</s>"]
    assert one[:-2] == other[: len(one) - 2]
    assert other[-2].endswith("s")
    assert (offsets.starts[0], offsets.ends[0]) == (0, 3)


@every_kind
def test_what_a_chunk_says_is_nearly_what_its_ids_are(name):
    ids = tiny_encoder(name)
    text = PROSE * 4
    (whole,) = ids.tokenize([text], None)
    offsets = ids.offsets(whole)
    spans = Chunker(30, 5).spans(text, offsets)
    rows = ids.windows(whole, offsets, spans)
    for row, (start, end) in zip(rows, character_spans(offsets, spans), strict=True):
        again = tokenizer_of(name).encode(text[start:end]).ids
        assert SequenceMatcher(None, again, row.content.ids.tolist()).ratio() > 0.9


# Packed rows.


def packed(ids, texts, prompt=None):
    return json.loads(json.dumps(ids.pack(ids.tokenize(texts, prompt))))


def ids_of(*numbers: int) -> str:
    return b64encode(np.array(numbers, "<i4").tobytes()).decode()


@pytest.mark.parametrize(
    "broken",
    [
        {"ids": "no base64!"},
        {"ids": "é"},
        {"ids": "!" + ids_of(5, 6, 7, 8)},
        {"ids": None},
        {"ids": 7},
        {"ids": ids_of(5, 6, 7)},
        {"ids": ids_of(5, 6, 7, 8, 9)},
        {"ids": b64encode(b"123456789").decode()},
        {"ids": ""},
        {"ids": ids_of(5, 6, 7, -1)},
        {"ids": ids_of(5, 6, 7, 10**6)},
        {"ids": ids_of(5, 6, 7, tokenizer_of("bert").get_vocab_size())},
        {"tokens": [3, 2]},
        {"tokens": [4]},
        {"tokens": [4, 0]},
        {"tokens": [0, 4]},
        {"tokens": [5, -1]},
        {"tokens": [-1, 5]},
        {"tokens": [3, 1.5]},
        {"tokens": [3, None]},
        {"tokens": ["3", "1"]},
        {"tokens": [[3, 1]]},
        {"tokens": [3, 10**30]},
        {"tokens": [3, float("inf")]},
        {"tokens": []},
        {"tokens": None},
        {"tokens": [], "prompt_tokens": [], "ids": ""},
        {"tokens": [4, WINDOW + 1], "ids": ids_of(*[5] * (WINDOW + 5))},
        {"prompt_tokens": [0]},
        {"prompt_tokens": [0, 0, 0]},
        {"prompt_tokens": [0, -1]},
        {"prompt_tokens": [0, None]},
        {"prompt_tokens": [0, float("inf")]},
        {"prompt_tokens": [0, 10**30]},
        {"prompt_tokens": None},
    ],
)
def test_what_was_not_packed_so_is_refused(broken):
    good = {"tokens": [3, 1], "prompt_tokens": [0, 2], "ids": ids_of(5, 6, 7, 8)}
    assert [row.content.ids.tolist() for row in tiny_encoder("bert").unpack(good)] == [[5, 6, 7], [8]]
    with pytest.raises(CorruptMessageError):
        tiny_encoder("bert").unpack(good | broken)


@pytest.mark.parametrize("missing", ["tokens", "prompt_tokens", "ids"])
def test_a_pack_without_a_fact_is_refused(missing):
    pack = packed(tiny_encoder("bert"), ["fox", "dog"])
    del pack[missing]
    with pytest.raises(CorruptMessageError):
        tiny_encoder("bert").unpack(pack)


@pytest.mark.parametrize("thing", [None, [], "text", 7, {}])
def test_what_is_no_pack_is_refused(thing):
    with pytest.raises(CorruptMessageError):
        tiny_encoder("bert").unpack(thing)


def test_ids_behind_a_gap_in_the_vocabulary_are_known():
    sparse = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "fox": 900}, unk_token="[UNK]"))
    sparse.pre_tokenizer = pre_tokenizers.Whitespace()
    ids = TokenizingEncoder(sparse, {}, WINDOW, pools_prompt=True)
    pack = packed(ids, ["a fox"])
    assert ids.unpack(pack)[0].content.ids.tolist() == [1, 900]
    with pytest.raises(CorruptMessageError):
        ids.unpack(pack | {"ids": ids_of(1, 901)})


def test_packed_ids_are_little_endian_whatever_they_were():
    pack = packed(tiny_encoder("bert"), ["fox"])
    assert (
        np.frombuffer(b64decode(pack["ids"]), "<i4").tolist() == tokenizer_of("bert").encode("fox").ids
    )


# Slices.


@every_kind
@laws(max_examples=60, deadline=None)
@given(data=st.data(), text=st.lists(PIECES, max_size=30).map("".join))
def test_a_text_in_slices_has_the_tokens_of_the_whole(name, data, text):
    prompt = data.draw(st.sampled_from(prompts_of(name)))
    prefix = KINDS[name].prompts[prompt] if prompt else ""
    said = tokenizer_of(name).encode(prefix + text)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tokenizing_encoder, "SLICE_CHARS", 40)
        patched.setattr(slicing, "SLICE_CHARS", 40)
        patched.setattr(slicing, "SEAM_CHARS", 32)
        (whole,) = tiny_encoder(name).tokenize([text], prompt)
        assert whole.content.ids.tolist() == said.ids
        spans = tiny_encoder(name).offsets(whole)
    (expected,) = tiny_encoder(name).tokenize([text], prompt)
    plainly = tiny_encoder(name).offsets(expected)
    assert spans.starts.tolist() == plainly.starts.tolist()
    assert spans.ends.tolist() == plainly.ends.tolist()


@pytest.mark.parametrize(
    ("text", "slice_chars"),
    [
        ("a" * 300, 40),
        ("a" * 3000, 400),  # one unknown word, longer than what is looked at around a seam
        ("的" * 300, 40),
        ("a b " * 100, 40),
        ("x" * 39 + " " * 90 + "y" * 50, 40),
    ],
)
def test_where_no_word_ends_a_text_is_tokenised_in_one_piece(text, slice_chars, monkeypatch):
    monkeypatch.setattr(slicing, "SLICE_CHARS", slice_chars)
    monkeypatch.setattr(slicing, "SEAM_CHARS", slice_chars // 3)
    said = tokenizer_of("bert").encode(text, add_special_tokens=False)
    ids, spans = slicing.tokenize_in_slices(tokenizer_of("bert"), text)
    assert ids.tolist() == said.ids
    assert spans.tolist() == [list(span) for span in said.offsets]


# A book.

MEASURE = """
import sys
from tokenizers import Tokenizer
from sutra_tasks.chunking.chunker import Chunker
from sutra_tasks.engines.tokenizing.tokenizing_encoder import TokenizingEncoder

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

tokenizer = Tokenizer.from_file(sys.argv[1])
tokenizer.no_padding()
tokenizer.no_truncation()
ids = TokenizingEncoder(tokenizer, {}, 256, pools_prompt=True)
ids.tokenize(["warm"], None)
text = sys.stdin.read()
before = peak()
(whole,) = ids.tokenize([text], None)
offsets = ids.offsets(whole)
rows = ids.windows(whole, offsets, Chunker(254, 50).spans(text, offsets))
print(len(text), len(rows), (peak() - before) >> 10)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_long_text_is_tokenised_in_little_memory():
    text = ("".join(topics.values()) * 11)[:5_000_000]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(Path(locate("all-MiniLM-L6-v2"), "tokenizer.json"))],
        input=text,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    characters, windows, grown_mib = map(int, done.stdout.split())
    assert characters == 5_000_000
    assert windows > 5000
    assert grown_mib < 300  # 900 in one piece
