"""The torch engine on long texts, against transformers and plain arithmetic, on models of every kind."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import chain, pairwise
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any
from weakref import ref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st

from sutra_tasks.batching.batcher import Batcher
from sutra_tasks.batching.jobs import JobContext, Unwanted
from sutra_tasks.batching.next_batch import Limits
from sutra_tasks.batching.service import EmbeddingService
from sutra_tasks.chunking.chunker import Chunker
from sutra_tasks.client.call import Call
from sutra_tasks.engines.model_folder import locate
from sutra_tasks.engines.offsets import Offsets
from sutra_tasks.engines.simulated_engine import SimulatedEncoder
from sutra_tasks.errors import EncodingError, ModelError
from sutra_tasks.settings import METHODS, Settings
from tests.system.tiny_models import (
    FOREIGN,
    KINDS,
    PROSE,
    WINDOW,
    Kind,
    build,
    prompts_of,
    tiny_encoder,
    tokenizer_of,
)

MINILM = "all-MiniLM-L6-v2"
BLOCK, OVERLAP = 40, 6
CHUNKED = {"block_size": BLOCK, "overlap_tokens": OVERLAP}
LATE = {**CHUNKED, "chunking": "late"}
CLOSE = 5e-6

every_kind = pytest.mark.parametrize("name", KINDS)


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
    from sutra_tasks.engines.torch_engine.encoder import TorchEncoder

    @cache
    def loaded(name, dtype="float32", attention="auto"):
        return TorchEncoder(folder(name), dtype=dtype, attention=attention)

    return loaded


@contextmanager
def serving(encoder, *, on_answer=None, **options) -> Iterator[EmbeddingService]:
    """Give a service on an engine with its batcher."""
    batcher = Batcher(Limits(max_tokens=8192, max_texts=64, max_wait_s=0))
    batcher.start()
    try:
        yield EmbeddingService(encoder, batcher, "cpu0", Settings(**options), on_answer=on_answer)
    finally:
        batcher.close(10)


def ask(service, texts, **asked):
    call = Call.of([texts], {"details": True, "chunk_vectors": True, **asked}, Settings())
    return service.answer(service.prepare(call))


def chunked(service, texts, **asked):
    return service.prepare(Call.of([texts], asked, Settings())).chunked


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

    def alone(self, prefix):
        said = self.tokenizer(prefix, return_special_tokens_mask=True)
        return len(said["input_ids"]) - said["special_tokens_mask"][-1]

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
        found = []
        for start, stop in spans:
            unpooled = 0
            if prefix and not self.kind.include_prompt:
                # Where a text begins, as sentence-transformers, which looks at the prompt alone.
                unpooled = len(head) if start else self.alone(prefix)
            found.append(self.pooled(self.states([*head, *own[start:stop], *tail])[unpooled:]))
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
    texts = ["", "a", "fox", PROSE[:90], FOREIGN[:20], "\n", PROSE[:60], "running [SEP] </s>", "日本"]
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
            assert cut.tokens == (engine(name).info.window,)
            wanted = model.encode(long, prompt_name=prompt, normalize_embeddings=True)
            np.testing.assert_allclose(cut.vectors, wanted, atol=1e-6)


# The vector of a long text.


@every_kind
def test_a_long_text_is_the_weighted_mean_of_its_windows(engine, reference, name):
    ours, theirs = engine(name), reference(name)
    with serving(ours, **CHUNKED) as service:
        for prompt in prompts_of(name):
            for text in (PROSE * 4, "presented " + FOREIGN * 12, "ning" + PROSE * 3):
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
        for method, dimensions in ((METHODS[0], 128), *((method, None) for method in METHODS)):
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
        assert encoder.attention.implementation == ("plain" if attention == "eager" else "cpu_flash")
        with serving(encoder, **options) as service:
            found.append(ask(service, texts))
    assert found[0].chunks[0] > 1 < found[0].chunks[2]
    for one, other in ((found[0].vectors, found[1].vectors), [f.chunk_vectors for f in found]):
        assert (np.asarray(one) * np.asarray(other)).sum(axis=1).min() >= 0.9999


# Packed rows.


@every_kind
def test_packed_rows_are_the_same_rows_and_give_the_same_vectors(engine, name):
    encoder = engine(name)
    for prompt in prompts_of(name):
        texts = encoder.tokenize([PROSE * 3, "fox", PROSE[:40]], prompt)
        rows = texts[1:]
        for whole in texts:
            offsets = encoder.offsets(whole)
            rows += encoder.windows(whole, offsets, [(0, 1), (0, min(30, len(offsets)))])
        if prompt is None:
            rows += encoder.tokenize([""], None) * (
                name not in ("qwen", "bare")
            )  # which see nothing at all of it
        back = encoder.unpack(json.loads(json.dumps(encoder.pack(rows))))
        assert [row.tokens for row in back] == [row.tokens for row in rows]
        for one, other in zip(rows, back, strict=True):
            assert one.content.ids.tolist() == other.content.ids.tolist()
            assert one.content.prompt_tokens == other.content.prompt_tokens
        np.testing.assert_array_equal(encoder.encode(rows), encoder.encode(back))


# Passes on a processor.


@laws(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 600), min_size=1, max_size=60).map(sorted),
    most=st.integers(1, 3000),
)
def test_passes_cover_all_in_order_and_within_the_budget(lengths, most):
    from sutra_tasks.engines.torch_engine.encoder import split_by_tokens

    passes = split_by_tokens(lengths, most)
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
    from sutra_tasks.engines.torch_engine import encoder as torch_engine

    encoder, slices = engine(name), []
    texts = [PROSE[: 7 * n % 150] + "x" for n in range(30)]
    batch = [*encoder.tokenize(texts, None), *encoder.tokenize(texts[::3], "query")]
    alone = np.vstack([encoder.encode([one]) for one in batch])
    run = encoder._forward_pass.__class__.__call__

    def spy(passes, features):
        slices.append(features["input_ids"].shape)
        return run(passes, features)

    monkeypatch.setattr(encoder._forward_pass.__class__, "__call__", spy)
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
    head, own, tail, _ = theirs.split(text, prefix)
    spans = theirs.spans(text, prefix)
    rows = {}
    for one in found.late_windows:
        start = spans[one.first_row][0] - one.spans[0][0]
        length = one.text.tokens - len(head) - len(tail)
        window = own[start : start + length]
        assert one.text.content.ids.tolist() == [*head, *window, *tail]
        assert one.text.tokens <= WINDOW
        states = theirs.states([*head, *window, *tail])
        for at, (first, last) in enumerate(one.spans, one.first_row):
            assert at not in rows
            assert (first + start, last + start) == spans[at]
            rows[at] = theirs.pooled(states[len(head) + first : len(head) + last])
    assert sorted(rows) == list(range(len(spans)))
    return spans, np.array([rows[at] for at in range(len(spans))])


@pytest.mark.parametrize("name", MEAN)
@pytest.mark.parametrize("times", [1, 5])
def test_late_chunks_are_pooled_from_states_that_saw_the_whole_window(engine, reference, name, times):
    tokens = tiny_encoder(name).tokenize([(PROSE * 2)[:end] for end in range(300)], None)
    one_window = (PROSE * 2)[: next(end for end, text in enumerate(tokens) if text.tokens > 60)]
    text = "ning " + (one_window if times == 1 else (PROSE + FOREIGN) * times)
    with serving(engine(name), **LATE, sequence_threshold=30) as service:
        for prompt in prompts_of(name):
            prefix = KINDS[name].prompts.get(prompt or "", "")
            found = chunked(service, text, prompt=prompt)
            assert (len(found.late_windows) > 1) == (times > 1)
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
    texts = ["fox", PROSE * 3, "", "query", FOREIGN * 12, PROSE * 4, "dog", PROSE * 3]
    with serving(engine(name), **options) as service:
        got = ask(service, texts, prompt="query")
        assert [count > 1 for count in got.chunks] == [
            False,
            True,
            False,
            False,
            True,
            True,
            False,
            True,
        ]
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
            encoder._forward_pass._autocast = False
            encoder._forward_pass._model.to(getattr(torch, dtype))
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


def test_late_chunking_is_refused_where_pooling_is_not_what_follows_the_transformer(engine):
    from sentence_transformers.sentence_transformer.modules import Dense

    from sutra_tasks.engines.torch_engine.facts import pools_mean

    encoder = engine("bert")
    first, *rest = list(encoder._model)
    again = Dense(32, 32, module_input_name="token_embeddings", module_output_name="token_embeddings")
    assert encoder.info.pools_mean
    assert not pools_mean([first, again, *rest])


def test_no_pass_runs_for_a_call_that_is_given_up(engine, monkeypatch):
    encoder, ran = engine("bert"), []
    pool = encoder.pool

    def spy(text, spans):
        ran.append(text)
        return pool(text, spans)

    monkeypatch.setattr(encoder, "pool", spy)
    with serving(encoder, **LATE) as service:
        prepared = service.prepare(Call.of([PROSE * 12], {}, Settings()))
        assert len(prepared.chunked.late_windows) > 3
        with pytest.raises(Unwanted):
            service.answer(prepared, JobContext(lambda: len(ran) < 2))
    assert len(ran) == 2


def test_a_pass_that_fails_names_its_text_and_tells_none_of_it(engine, monkeypatch):
    encoder = engine("bert")
    pool = encoder.pool

    def fails(text, spans):
        if text.content.ids[text.content.first] == tokenizer_of("bert").encode("query").ids[1]:
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
    call = prepared.chunked
    assert work["tokens"] == sum(one.text.tokens for one in call.late_windows) + call.rows[0].tokens
    assert 0 < work["compute_s"] <= seconds


def test_a_pass_without_memory_gives_back_what_it_had(engine, monkeypatch):
    import torch

    freed: list[Any] = []
    held: list[Any] = []
    encoder = engine("bert")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(held[-1]()))

    def full(_):
        allocated = torch.zeros(1)
        held.append(ref(allocated))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(encoder, "_forward_pass", full)
    (whole,) = encoder.tokenize([PROSE], None)
    (row,) = encoder.windows(whole, encoder.offsets(whole), [(0, 30)])
    for run in (lambda: encoder.encode([row]), lambda: encoder.pool(row, [(0, 30)])):
        with pytest.raises(torch.OutOfMemoryError):
            run()
    assert freed == [None, None]
