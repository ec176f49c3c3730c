"""The torch engine on long texts, against transformers and plain arithmetic, on models of every kind."""

import json
import subprocess
import sys
from base64 import b64decode, b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import SequenceMatcher
from functools import cache
from itertools import chain, pairwise
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st
from tokenizers import Tokenizer

from sutra_tasks.calls import Call
from sutra_tasks.documents.chunking import MOST_OVERLAP, Chunker, Offsets, chunks_of
from sutra_tasks.encoding.batcher import Batcher, Unwanted
from sutra_tasks.encoding.batching import Limits
from sutra_tasks.encoding.models import locate
from sutra_tasks.encoding.service import EmbeddingService
from sutra_tasks.encoding.simulated import SimulatedEncoder
from sutra_tasks.encoding.token_ids import TokenIds
from sutra_tasks.errors import CorruptMessageError, EncodingError, ModelError
from sutra_tasks.settings import METHODS, Settings
from tests.system.tiny_models import KINDS, WINDOW, Kind, build

MINILM = "all-MiniLM-L6-v2"
BLOCK, OVERLAP = 40, 6
CHUNKED = {"block_size": BLOCK, "overlap_tokens": OVERLAP}
LATE = {**CHUNKED, "chunking": "late"}
CLOSE = 5e-6

PROSE = (
    "The quick brown fox jumps over the lazy dog. It costs 3.14, said Dr. Who! Running and jumping, it "
    "passed a text; a query found naïve façades. Nobody represented the sentence, and so on. "
)
FOREIGN = "Привет, мир! こんにちは世界。 हिन्दी में लिखा है। שלום עולם 🙂 "
AWKWARD = ("e\u0301", "ﷺ", "ﬁ", "\u200d", "👩‍👩‍👧", "\0", "\xad", " ", "  ", "\n\n", "\t", "[SEP]", "</s>")
PIECES = st.sampled_from((PROSE, FOREIGN, "words ", "fox", "run", "re", *AWKWARD)) | st.text(max_size=8)
TEXTS = st.lists(PIECES, max_size=6).map("".join)

every_kind = pytest.mark.parametrize("name", KINDS)


def prompts_of(name: str) -> list[str | None]:
    return [None, *(KINDS[name].prompts if name in KINDS else ())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return where a model is; each is built once."""

    @cache
    def built(name):
        return locate(name) if name == MINILM else build(KINDS[name], tmp_path_factory.mktemp(name))

    return built


@pytest.fixture(scope="module")
def engine(folder):
    """Return the engine on a model; each is loaded once."""
    from sutra_tasks.encoding.torch_engine import TorchEncoder

    @cache
    def loaded(name, dtype="float32", attention="auto"):
        return TorchEncoder(folder(name), dtype=dtype, attention=attention)

    return loaded


@contextmanager
def serving(encoder, *, on_answer=None, **options) -> Iterator[EmbeddingService]:
    """Give a service on an engine with its batcher."""
    batcher = Batcher(encoder, Limits(max_tokens=8192, max_texts=64, max_wait_s=0))
    batcher.start()
    try:
        yield EmbeddingService(encoder, batcher, "cpu0", Settings(**options), on_answer=on_answer)
    finally:
        batcher.close(10)


def ask(service, texts, **asked):
    call = Call.of([texts], {"details": True, "chunk_vectors": True, **asked}, Settings())
    return service.answer(service.prepare(call))


def plan(service, texts, **asked):
    return service.prepare(Call.of([texts], asked, Settings())).planned


# The reference: transformers' model, ids and pooling by hand.


class Reference:
    """What a vector must be."""

    def __init__(self, folder, kind):
        import transformers

        load: Any = transformers.T5EncoderModel if kind.architecture == "t5" else transformers.AutoModel
        self.kind, self.model = kind, load.from_pretrained(folder, attn_implementation="eager").eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.dense = None
        if kind.dense:
            from safetensors.numpy import load_file

            self.dense = load_file(Path(folder, "2_Dense", "model.safetensors"))

    def split(self, text, prefix):
        """Return ids before a text's own, its own, those behind, and where its own stand."""
        said = self.tokenizer(
            prefix + text, return_offsets_mapping=True, return_special_tokens_mask=True, truncation=False
        )
        ids, places = np.array(said["input_ids"]), np.array(said["offset_mapping"]).reshape(-1, 2)
        special = np.array(said["special_tokens_mask"], dtype=bool)
        own = np.flatnonzero(~special & (places[:, 1] > len(prefix)))
        assert (np.diff(own) == 1).all()
        first, end = own[0], own[-1] + 1
        starts, ends = np.maximum(places[first:end] - len(prefix), 0).T
        return ids[:first], ids[first:end], ids[end:], Offsets(starts, ends)

    def spans(self, text, prefix):
        head, _, tail, offsets = self.split(text, prefix)
        return Chunker(BLOCK - len(head) - len(tail), OVERLAP).spans(text, offsets)

    def states(self, ids):
        import torch

        with torch.inference_mode():
            return self.model(torch.tensor(ids)[None]).last_hidden_state[0].numpy()

    def pooled(self, states):
        """Return the vector of what pooling sees."""
        if self.kind.pooling == "mean":
            row = states.mean(axis=0)
        else:
            row = states[0 if self.kind.pooling == "cls" else -1]
        if self.dense is not None:
            row = np.tanh(self.dense["linear.weight"] @ row + self.dense["linear.bias"])
        return unit(row) if self.kind.normalizes else row

    def rows(self, text, prefix, *, block=BLOCK, overlap=OVERLAP):
        """Return spans and vectors of a long text's chunks, each embedded apart."""
        head, own, tail, offsets = self.split(text, prefix)
        spans = Chunker(block - len(head) - len(tail), overlap).spans(text, offsets)
        unseen = len(head) if prefix and not self.kind.include_prompt else 0
        found = []
        for start, stop in spans:
            leave = unseen
            if not start and unseen:  # as sentence-transformers, which looks at the prompt alone
                prompted = self.tokenizer(prefix, return_special_tokens_mask=True)
                leave = len(prompted["input_ids"]) - prompted["special_tokens_mask"][-1]
            found.append(self.pooled(self.states([*head, *own[start:stop], *tail])[leave:]))
        return spans, np.array(found)


@pytest.fixture(scope="module")
def reference(folder):
    @cache
    def loaded(name):
        kind = KINDS[name] if name in KINDS else Kind(lambda: None, normalizes=True)  # type: ignore[arg-type,return-value]
        return Reference(folder(name), kind)

    return loaded


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def weights_by_hand(spans, method):
    """Return the weights of chunks, token by token."""
    n = len(spans)
    if method == "positional":
        found = [1 - abs(i + 0.5 - n / 2) / (n / 2) for i in range(n)]
    elif method == "overlap_aware":
        holders = [sum(s <= t < e for s, e in spans) for t in range(spans[-1][1])]
        found = [sum(1 / holders[t] for t in range(s, e)) for s, e in spans]
    else:
        found = [1.0] * n
    return np.array(found) / sum(found)


def together(rows, spans, method):
    if method == "max":
        return unit(unit(rows).max(axis=0))
    return unit(weights_by_hand(spans, method) @ unit(rows))


# Short texts are sentence-transformers' own; so is what is left of a cut one.


@pytest.mark.parametrize("name", [*KINDS, MINILM])
def test_texts_within_the_threshold_are_sentence_transformers_own(engine, folder, name):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder(name), device="cpu")
    texts = ["", "a", "fox", PROSE, FOREIGN[:20], "\n", PROSE[:60], "running [SEP] </s>", "日本"]
    long = PROSE * 8
    with serving(engine(name)) as service:
        for prompt in prompts_of(name):
            wanted = model.encode(texts, prompt_name=prompt, normalize_embeddings=True)
            got = ask(service, texts, prompt=prompt)
            assert set(got.chunks) == {1}
            np.testing.assert_allclose(got.vectors, wanted, atol=1e-6)
            bare = ask(service, texts, prompt=prompt, normalize=False, dimensions=5)
            plain = model.encode(texts, prompt_name=prompt, truncate_dim=5)
            np.testing.assert_allclose(bare.vectors, plain, atol=1e-6 * max(1, np.abs(plain).max()))
            cut = ask(service, long, prompt=prompt, truncate=True)
            assert cut.truncated == (True,)
            assert cut.tokens == (engine(name).card.window,)
            wanted = model.encode(long, prompt_name=prompt, normalize_embeddings=True)
            np.testing.assert_allclose(cut.vectors, wanted, atol=1e-6)


# The vector of a long text.


@every_kind
def test_a_long_text_is_the_weighted_mean_of_its_windows(engine, reference, name):
    ours, theirs = engine(name), reference(name)
    with serving(ours, **CHUNKED) as service:
        for prompt in prompts_of(name):
            for text in (PROSE * 4, "presented " + FOREIGN * 6, "ning" + PROSE * 3):
                prefix = KINDS[name].prompts.get(prompt or "", "")
                spans, rows = theirs.rows(text, prefix)
                assert len(spans) > 3
                for method in METHODS:
                    got = ask(service, text, prompt=prompt, aggregation_method=method)
                    assert got.chunks == (len(spans),)
                    np.testing.assert_allclose(got.chunk_vectors, unit(rows), atol=CLOSE)
                    np.testing.assert_allclose(got.weights[0], weights_by_hand(spans, method))
                    np.testing.assert_allclose(got.vectors, together(rows, spans, method), atol=CLOSE)
                    short = ask(service, text, prompt=prompt, aggregation_method=method, dimensions=7)
                    np.testing.assert_allclose(
                        short.vectors, together(rows[:, :7], spans, method), atol=CLOSE
                    )


def test_a_long_text_is_the_weighted_mean_of_its_windows_in_the_packaged_model(engine, reference):
    text = max(topics.values(), key=lambda topic: -abs(len(topic) - 4000)) + FOREIGN * 3
    spans, rows = reference(MINILM).rows(text, "", block=256, overlap=50)
    assert len(spans) > 3
    with serving(engine(MINILM)) as service:
        for method in METHODS:
            for dimensions in (None, 128):
                got = ask(service, text, aggregation_method=method, dimensions=dimensions)
                wanted = together(rows[:, :dimensions], spans, method)
                np.testing.assert_allclose(got.vectors, wanted, atol=CLOSE)
                np.testing.assert_allclose(got.chunk_vectors, unit(rows[:, :dimensions]), atol=CLOSE)


@pytest.mark.parametrize("name", ["bert", "roberta", "t5", "qwen", MINILM])
def test_plain_attention_gives_the_same_vectors_of_chunks(engine, name):
    texts = [PROSE * 12, "short", FOREIGN * 12]
    options = {} if name == MINILM else CHUNKED
    found = []
    for attention in ("auto", "eager"):
        encoder = engine(name, "float32", attention)
        assert encoder.attention.path == ("plain" if attention == "eager" else "cpu_flash")
        with serving(encoder, **options) as service:
            found.append(ask(service, texts))
    assert found[0].chunks[0] > 1 < found[0].chunks[2]
    for one, other in ((found[0].vectors, found[1].vectors), [f.chunk_vectors for f in found]):
        assert (np.asarray(one) * np.asarray(other)).sum(axis=1).min() >= 0.9999


# Token ids.


@cache
def made(name: str) -> Tokenizer:
    return KINDS[name].tokenizer()


@cache
def token_ids(name: str) -> TokenIds:
    kind = KINDS[name]
    return TokenIds(made(name), kind.prompts, WINDOW, pools_prompt=kind.include_prompt)


@every_kind
@laws(max_examples=40, deadline=None)
@given(data=st.data(), text=TEXTS)
def test_windows_are_slices_between_special_tokens_and_prompt(name, data, text):
    prompt = data.draw(st.sampled_from(prompts_of(name)))
    prefix = KINDS[name].prompts[prompt] if prompt else ""
    ids = token_ids(name)
    (whole,) = ids.tokenize([text], prompt)
    offsets = ids.offsets(whole)
    said = made(name).encode(prefix + text)
    assert whole.content.ids.tolist() == said.ids
    assert whole.tokens == len(said.ids)

    mine = [
        at
        for at, (special, (_, end)) in enumerate(zip(said.special_tokens_mask, said.offsets, strict=True))
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
    ids = token_ids(name)
    for prompt in prompts_of(name):
        (whole,) = ids.tokenize([PROSE], prompt)
        offsets = ids.offsets(whole)
        after = ids.windows(whole, offsets, [(0, len(offsets))])[0].content
        own = after.ids[after.first : after.first + len(offsets)].tolist()
        assert len(own) > 40
        for at, (token, start, end) in enumerate(zip(own, offsets.starts, offsets.ends, strict=True)):
            word = made(name).id_to_token(token).replace("##", "").strip("Ġ▁")
            letters = PROSE[start:end].strip()
            if word.isascii() and letters.isascii():
                assert word == letters or word == letters.lower() or (at == 0 and word.endswith(letters))
            assert start == 0 or PROSE[offsets.ends[at - 1] : start].strip() == ""


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
    ids, kind = token_ids(name), KINDS[name]
    before, after = SPECIALS[name]
    for prompt in prompts_of(name):
        prefix = kind.prompts[prompt] if prompt else ""
        (whole,) = ids.tokenize(["fox jumps over text"], prompt)
        offsets = ids.offsets(whole)
        total = len(offsets)
        for row in ids.windows(whole, offsets, [(0, total), (1, 3), (total - 1, total)]):
            tokens = [made(name).id_to_token(token) for token in row.content.ids.tolist()]
            assert tokens[: len(before)] == before
            assert tokens[len(tokens) - len(after) :] == after
            head = "".join(tokens[len(before) : row.content.first]).replace("##", "")
            # What the prompt ends with may be part of the text's first token instead.
            said = prefix.replace("\n", "Ċ").replace(" ", "")
            head = head.replace("Ġ", "").replace("▁", "")
            assert said.startswith(head) or said.lower().startswith(head)
            assert len(said) - len(head) <= 1 or prompt == "merging"


def test_a_prompts_last_space_is_of_the_texts_first_token():
    ids, tokenizer = token_ids("roberta"), made("roberta")
    (whole,) = ids.tokenize(["fox jumps"], "query")
    offsets = ids.offsets(whole)
    rows = ids.windows(whole, offsets, [(0, 1), (1, len(offsets))])
    one, other = ([tokenizer.id_to_token(token) for token in row.content.ids.tolist()] for row in rows)
    assert one[-2:] == ["Ġfox", "</s>"]
    assert one[:-2] == other[: len(one) - 2]
    assert other[-2].endswith("s")
    assert (offsets.starts[0], offsets.ends[0]) == (0, 3)


@every_kind
def test_what_a_chunk_says_is_nearly_what_its_ids_are(name):
    ids = token_ids(name)
    text = PROSE * 4
    (whole,) = ids.tokenize([text], None)
    offsets = ids.offsets(whole)
    spans = Chunker(30, 5).spans(text, offsets)
    rows = ids.windows(whole, offsets, spans)
    for row, chunk in zip(rows, chunks_of(text, offsets, spans), strict=True):
        again = made(name).encode(chunk.text).ids
        assert SequenceMatcher(None, again, row.content.ids.tolist()).ratio() > 0.9


# Packed rows.


def packed(ids, texts, prompt=None):
    return json.loads(json.dumps(ids.pack(ids.tokenize(texts, prompt))))


@every_kind
def test_packed_rows_are_the_same_rows_and_give_the_same_vectors(engine, name):
    encoder = engine(name)
    for prompt in prompts_of(name):
        texts = encoder.tokenize([PROSE * 3, "fox", PROSE], prompt)
        rows = [texts[1], texts[2]]
        for whole in texts:
            offsets = encoder.offsets(whole)
            rows += encoder.windows(whole, offsets, [(0, 1), (0, min(30, len(offsets)))])
        if prompt is None:
            rows += encoder.tokenize([""], None) * (len(SPECIALS[name][1]) > 0)
        back = encoder.unpack(json.loads(json.dumps(encoder.pack(rows))))
        assert [row.tokens for row in back] == [row.tokens for row in rows]
        for one, other in zip(rows, back, strict=True):
            assert one.content.ids.tolist() == other.content.ids.tolist()
            assert one.content.prompt_tokens == other.content.prompt_tokens
        np.testing.assert_array_equal(encoder.encode(rows), encoder.encode(back))


def ids_of(*numbers: int) -> str:
    return b64encode(np.array(numbers, "<i4").tobytes()).decode()


@pytest.mark.parametrize(
    "broken",
    [
        {"ids": "no base64!"},
        {"ids": "é"},
        {"ids": None},
        {"ids": 7},
        {"ids": ids_of(5, 6, 7)},
        {"ids": ids_of(5, 6, 7, 8, 9)},
        {"ids": b64encode(b"123456789").decode()},
        {"ids": ""},
        {"ids": ids_of(5, 6, 7, -1)},
        {"ids": ids_of(5, 6, 7, 10**6)},
        {"ids": ids_of(5, 6, 7, made("bert").get_vocab_size())},
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
    assert [row.content.ids.tolist() for row in token_ids("bert").unpack(good)] == [[5, 6, 7], [8]]
    with pytest.raises(CorruptMessageError):
        token_ids("bert").unpack(good | broken)


@pytest.mark.parametrize("missing", ["tokens", "prompt_tokens", "ids"])
def test_a_pack_without_a_fact_is_refused(missing):
    pack = packed(token_ids("bert"), ["fox", "dog"])
    del pack[missing]
    with pytest.raises(CorruptMessageError):
        token_ids("bert").unpack(pack)


@pytest.mark.parametrize("thing", [None, [], "text", 7, {}])
def test_what_is_no_pack_is_refused(thing):
    with pytest.raises(CorruptMessageError):
        token_ids("bert").unpack(thing)


def test_ids_behind_a_gap_in_the_vocabulary_are_known():
    from tokenizers import models, pre_tokenizers

    sparse = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "fox": 900}, unk_token="[UNK]"))
    sparse.pre_tokenizer = pre_tokenizers.Whitespace()
    ids = TokenIds(sparse, {}, WINDOW, pools_prompt=True)
    pack = packed(ids, ["a fox"])
    assert ids.unpack(pack)[0].content.ids.tolist() == [1, 900]
    with pytest.raises(CorruptMessageError):
        ids.unpack(pack | {"ids": ids_of(1, 901)})


def test_packed_ids_are_little_endian_whatever_they_were():
    pack = packed(token_ids("bert"), ["fox"])
    assert np.frombuffer(b64decode(pack["ids"]), "<i4").tolist() == made("bert").encode("fox").ids


# Passes on a processor.


@laws(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 600), min_size=1, max_size=60).map(sorted),
    most=st.integers(1, 3000),
)
def test_passes_cover_all_in_order_and_within_the_budget(lengths, most):
    from sutra_tasks.encoding.torch_engine import passes_of

    passes = passes_of(lengths, most)
    assert list(chain.from_iterable(passes)) == list(range(len(lengths)))
    assert all(passes)

    def padded(one):
        return len(one) * lengths[one[-1]]

    for one in passes:
        assert len(one) == 1 or padded(one) <= most
    for one, other in pairwise(passes):  # none is smaller than it need be
        assert padded(range(one.start, other.start + 1)) > most


@pytest.mark.parametrize("name", ["bert", "t5", "qwen"])
def test_slices_of_a_batch_come_back_in_its_order(engine, name, monkeypatch):
    from sutra_tasks.encoding import torch_engine

    encoder, slices = engine(name), []
    texts = [PROSE[: 7 * n % 150] + "x" for n in range(30)]
    batch = [*encoder.tokenize(texts, None), *encoder.tokenize(texts[::3], "query")]
    alone = np.vstack([encoder.encode([one]) for one in batch])
    run = encoder._passes.__class__.__call__

    def spy(passes, features):
        slices.append(features["input_ids"].shape)
        return run(passes, features)

    monkeypatch.setattr(encoder._passes.__class__, "__call__", spy)
    for most in (1, 64, 500, 10**6):
        slices.clear()
        monkeypatch.setattr(torch_engine, "CPU_TOKENS", most)
        scale = max(1.0, float(np.abs(alone).max()))
        np.testing.assert_allclose(encoder.encode(batch), alone, atol=CLOSE * scale)
        assert all(rows == 1 or rows * longest <= most for rows, longest in slices)
        assert sum(rows for rows, _ in slices) == len(batch)
    assert len(slices) == (1 if KINDS[name].include_prompt else 2)


# Late chunking.

MEAN = [name for name, kind in KINDS.items() if kind.pooling == "mean"]


def late_rows(theirs, found, text, prefix):
    """Pool the chunks of a text by hand from the states of each pass; check what the passes are."""
    head, own, tail, offsets = theirs.split(text, prefix)
    spans = theirs.spans(text, prefix)
    rows = {}
    for one in found.passes:
        start = spans[one.row][0] - one.spans[0][0]
        length = one.text.tokens - len(head) - len(tail)
        window = own[start : start + length]
        assert one.text.content.ids.tolist() == [*head, *window, *tail]
        assert one.text.tokens <= WINDOW
        states = theirs.states([*head, *window, *tail])
        for at, (first, last) in enumerate(one.spans, one.row):
            assert at not in rows
            assert (first + start, last + start) == spans[at]
            rows[at] = theirs.pooled(states[len(head) + first : len(head) + last])
    assert sorted(rows) == list(range(len(spans)))
    return spans, np.array([rows[at] for at in range(len(spans))])


@pytest.mark.parametrize("name", MEAN)
@pytest.mark.parametrize("times", [1, 5])
def test_late_chunks_are_pooled_from_states_that_saw_the_whole_window(engine, reference, name, times):
    text = "ning " + (PROSE + FOREIGN)[: 220 if times == 1 else None] * times
    with serving(engine(name), **LATE, sequence_threshold=30) as service:
        for prompt in prompts_of(name):
            prefix = KINDS[name].prompts.get(prompt or "", "")
            found = plan(service, text, prompt=prompt)
            assert (len(found.passes) > 1) == (times > 1)
            spans, rows = late_rows(reference(name), found, text, prefix)
            assert len(spans) > 1
            for method in METHODS:
                got = ask(service, text, prompt=prompt, aggregation_method=method)
                np.testing.assert_allclose(got.chunk_vectors, unit(rows), atol=CLOSE)
                np.testing.assert_allclose(got.weights[0], weights_by_hand(spans, method))
                np.testing.assert_allclose(got.vectors, together(rows, spans, method), atol=CLOSE)
                assert got.queue_s >= 0
                assert got.compute_s > 0


def test_a_pass_sees_what_chunks_apart_do_not(engine, reference):
    text = PROSE * 4
    with serving(engine("bert"), **LATE) as late, serving(engine("bert"), **CHUNKED) as plain:
        one, other = ask(late, text), ask(plain, text)
    assert one.spans == other.spans
    assert one.weights == other.weights
    assert (np.asarray(one.chunk_vectors) * other.chunk_vectors).sum(axis=1).min() < 0.99


@pytest.mark.parametrize("options", [CHUNKED, LATE])
@pytest.mark.parametrize("name", ["bert", "t5"])
def test_short_and_long_texts_keep_their_order(engine, name, options):
    texts = ["fox", PROSE * 3, "", "query", FOREIGN * 5, PROSE * 2, "dog", PROSE * 3]
    with serving(engine(name), **options) as service:
        got = ask(service, texts, prompt="query")
        assert [count > 1 for count in got.chunks] == [False, True, False, False, True, True, False, True]
        for text, vector in zip(texts, got.vectors, strict=True):
            np.testing.assert_allclose(ask(service, text, prompt="query").vectors, vector, atol=CLOSE)
        assert got.queue_s >= 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_late_chunks_go_through_what_follows_in_half_precision(engine, dtype):
    import torch

    texts = [PROSE * 4, "fox"]
    with serving(engine("t5"), **LATE) as service:
        wanted = ask(service, texts)
    encoder = engine("t5", dtype)
    assert encoder.attention.dtype == dtype
    for throughout in (False, True):
        if throughout:  # as on a GPU, where all weights are
            encoder._passes._autocast = False
            encoder._passes._model.to(getattr(torch, dtype))
        with serving(encoder, **LATE) as service:
            got = ask(service, texts)
        assert got.chunk_vectors.dtype == np.float32
        for one, other in ((got.vectors, wanted.vectors), (got.chunk_vectors, wanted.chunk_vectors)):
            assert 0.995 < (np.asarray(one) * np.asarray(other)).sum(axis=1).min() < 1


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("bert-cls", LATE, "SUTRA_CHUNKING=late needs a model that takes the mean"),
        ("qwen", LATE, "SUTRA_CHUNKING=late needs a model that takes the mean"),
        (MINILM, {"chunking": "late"}, "needs blocks smaller than 85 % of its window of 256"),
        ("bert", {"chunking": "late"}, "needs blocks smaller than 85 % of its window of 128"),
    ],
)
def test_late_chunking_is_refused_where_it_means_nothing(engine, name, options, said):
    with pytest.raises(ModelError, match=said), serving(engine(name), **options):
        pass


def test_late_chunking_is_refused_for_the_simulated_engine():
    with pytest.raises(ModelError, match="SUTRA_CHUNKING=late"), serving(SimulatedEncoder(), **LATE):
        pass


def test_late_chunking_is_refused_where_pooling_is_not_what_follows_the_transformer(engine, monkeypatch):
    from sentence_transformers.sentence_transformer.modules import Dense

    encoder = engine("bert")
    first, *rest = list(encoder._model)
    again = Dense(32, 32, module_input_name="token_embeddings", module_output_name="token_embeddings")
    monkeypatch.setattr(encoder, "_model", [first, again, *rest])
    with pytest.raises(ModelError, match="SUTRA_CHUNKING=late"):
        encoder.check_pool()


def test_no_pass_runs_for_a_call_that_is_given_up(engine, monkeypatch):
    encoder, ran = engine("bert"), []
    pool = encoder.pool
    monkeypatch.setattr(encoder, "pool", lambda *given: ran.append(given) or pool(*given))
    with serving(encoder, **LATE) as service:
        prepared = service.prepare(Call.of([PROSE * 12], {}, Settings()))
        assert len(prepared.planned.passes) > 3
        with pytest.raises(Unwanted):
            service.answer(prepared, wanted=lambda: len(ran) < 2)
    assert len(ran) == 2


def test_a_pass_that_fails_names_its_text_and_tells_none_of_it(engine, monkeypatch):
    encoder = engine("bert")
    pool = encoder.pool

    def fails(text, spans):
        if text.content.ids[text.content.first] == made("bert").token_to_id("query"):
            raise ValueError(PROSE)
        return pool(text, spans)

    monkeypatch.setattr(encoder, "pool", fails)
    with serving(encoder, **LATE) as service:
        with pytest.raises(EncodingError) as failed:
            ask(service, ["fox", PROSE * 3, "query " + PROSE * 3, PROSE * 3])
        assert (failed.value.position, failed.value.reason) == (2, "ValueError")
        assert PROSE not in str(failed.value)
        assert ask(service, PROSE * 3).chunks[0] > 1  # the next call is served


def test_passes_count_in_what_the_device_says_of_its_work(engine):
    said = []
    with serving(engine("bert"), **LATE, on_answer=lambda s, **work: said.append((s, work))) as service:
        prepared = service.prepare(Call.of([["fox", PROSE * 6]], {}, Settings()))
        service.answer(prepared)
    ((seconds, work),) = said
    planned = prepared.planned
    assert work["tokens"] == sum(one.text.tokens for one in planned.passes) + planned.rows[0].tokens
    assert 0 < work["compute_s"] <= seconds


def test_a_pass_without_memory_gives_back_what_it_had(engine, monkeypatch):
    import torch

    from sutra_tasks.encoding import torch_engine

    freed = []
    encoder = engine("bert")
    monkeypatch.setattr(torch_engine, "_free_memory", freed.append)

    def full(features):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(encoder, "_passes", full)
    (whole,) = encoder.tokenize([PROSE], None)
    (row,) = encoder.windows(whole, encoder.offsets(whole), [(0, 30)])
    for run in (lambda: encoder.encode([row]), lambda: encoder.pool(row, [(0, 30)])):
        with pytest.raises(torch.OutOfMemoryError):
            run()
    assert len(freed) == 2


# A book.

MEASURE = """
import sys, time
from tokenizers import Tokenizer
from sutra_tasks.documents.chunking import Chunker
from sutra_tasks.encoding.token_ids import TokenIds

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

tokenizer = Tokenizer.from_file(sys.argv[1])
tokenizer.no_padding(), tokenizer.no_truncation()
ids = TokenIds(tokenizer, {}, 256, pools_prompt=True)
ids.tokenize(["warm"], None)
text = sys.stdin.read()
before, began = peak(), time.monotonic()
(whole,) = ids.tokenize([text], None)
tokenized = time.monotonic()
offsets = ids.offsets(whole)
spans = Chunker(254, 50).spans(text, offsets)
rows = ids.windows(whole, offsets, spans)
done = time.monotonic()
print(len(text), whole.tokens, len(rows), (peak() - before) >> 10, tokenized - began, done - tokenized)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["prose", "dense"])
def test_a_book_is_tokenised_in_little_memory(kind, record_property):
    page = "".join(topics.values()) if kind == "prose" else "1.2;3,4?é日本 "
    text = (page * (5_000_000 // len(page) + 1))[:5_000_000]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(Path(locate(MINILM), "tokenizer.json"))],
        input=text,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    characters, _, windows, grown_mib, *seconds = done.stdout.split()
    record_property("seconds", seconds)
    print(kind, done.stdout)
    assert int(characters) == 5_000_000
    assert int(windows) > 1000
    assert int(grown_mib) < 600
