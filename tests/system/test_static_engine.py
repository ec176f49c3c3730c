"""Static models: the vectors are sentence-transformers' own, and nothing but numpy makes them."""

import json
import shutil
import subprocess
import sys
from base64 import b64encode
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st

from sutra_tasks.chunking.chunker import Chunker
from sutra_tasks.engines import static_engine
from sutra_tasks.engines.load import load_engine
from sutra_tasks.engines.model_folder import locate
from sutra_tasks.engines.static_engine import WINDOW, StaticEncoder, is_static
from sutra_tasks.engines.tokenizing import word_cache as words
from sutra_tasks.engines.tokenizing.word_cache import WordCache, splits_at_spaces
from sutra_tasks.errors import CorruptMessageError, ModelError
from sutra_tasks.settings import Settings
from tests.system.tiny_models import FOREIGN, PROSE, byte_level, unigram, wordpiece

AGREEMENT = 0.99999
WIDTH = 24
AWKWARD = [
    "",
    " ",
    "\n",
    "\0",
    "é" * 300,
    "e\u0301",
    "a\x0bb",
    "a\x1cb\x85c\u2028d\te\r\nf",
    "🙂",
    "ﷺ ﬁ",
]
TEXTS = [*AWKWARD, PROSE, FOREIGN, "[SEP] x[CLS]y </s>", "fox", "Run, RUN! " * 700]
TOKENIZERS = {"wordpiece": wordpiece, "byte_level": byte_level, "unigram": unigram}
MAKES = ("plain", "normalized", "dense", "bias", "residual", "twice", "half", "half_dense")


def save(folder, modules, *, half=False, prompts=None):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(modules=modules, prompts=prompts or {"query": "query: "}, device="cpu")
    (model.half() if half else model).save(str(folder), create_model_card=False)
    return folder


def build(folder, make, tokenizer="wordpiece", *, seed=7, limit=None, rows=0):
    """Save a static model with random vectors, and what ``make`` says behind them."""
    import torch
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, StaticEmbedding

    torch.manual_seed(seed)
    made = TOKENIZERS[tokenizer]()
    if limit:
        made.enable_truncation(limit)
    vectors = torch.randn(made.get_vocab_size() + rows, WIDTH)
    modules: list[Any] = [StaticEmbedding(made, embedding_weights=vectors)]
    linear = torch.nn.Identity()
    if make in ("dense", "half_dense"):
        modules.append(Dense(WIDTH, 16, bias=False, activation_function=linear))
    elif make == "bias":
        modules.append(Dense(WIDTH, 16, activation_function=linear))
    elif make == "residual":
        modules.append(Dense(WIDTH, WIDTH, activation_function=linear, use_residual=True))
    elif make == "twice":
        modules.append(Dense(WIDTH, 20, activation_function=linear, use_residual=True))
        modules.append(Dense(20, 12, activation_function=linear))
    elif make == "tanh":
        modules.append(Dense(WIDTH, 16, activation_function=torch.nn.Tanh()))
    if make not in ("plain", "bias"):
        modules.append(Normalize())
    return save(folder, modules, half=make.startswith("half"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return a folder for each kind of model, made once."""

    @cache
    def made(make, tokenizer="wordpiece", **options):
        return build(tmp_path_factory.mktemp("static") / "model", make, tokenizer, **options)

    return made


@pytest.fixture
def copied(models, tmp_path):
    """Return a copy that may be damaged."""
    return Path(shutil.copytree(models("dense"), tmp_path / "copy"))


def cosines(ours, theirs):
    return np.sum(ours * theirs, axis=1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)


def agree(encoder, folder, texts, prompt=None):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    theirs = model.encode(texts, prompt_name=prompt).astype(np.float32)
    ours = encoder.encode(encoder.tokenize(texts, prompt))
    assert ours.dtype == np.float32
    assert ours.shape == theirs.shape
    # sentence-transformers divides 0 by 0 where it normalises in half precision.
    nothing = ~np.nan_to_num(theirs).any(axis=1)
    assert not ours[nothing].any()
    assert cosines(ours[~nothing], theirs[~nothing]).min() >= AGREEMENT
    one, other = (np.linalg.norm(rows[~nothing], axis=1) for rows in (ours, theirs))
    np.testing.assert_allclose(one, other, rtol=2e-3)


# The vectors.


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("make", MAKES)
def test_vectors_are_sentence_transformers_own(models, make, tokenizer):
    folder = models(make, tokenizer)
    encoder = StaticEncoder("tiny", folder)
    for prompt in (None, "query"):
        agree(encoder, folder, TEXTS, prompt)


def test_a_real_models_token_vectors_give_sentence_transformers_vectors(tmp_path):
    from safetensors.torch import load_file
    from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
    from tokenizers import Tokenizer

    minilm = Path(locate("all-MiniLM-L6-v2"))
    vectors = load_file(minilm / "model.safetensors")["embeddings.word_embeddings.weight"]
    tokenizer = Tokenizer.from_file(str(minilm / "tokenizer.json"))
    folder = save(tmp_path / "m", [StaticEmbedding(tokenizer, vectors), Normalize()], half=True)
    encoder = load_engine(Settings(broker_url="redis://unused", model=str(folder)))
    assert isinstance(encoder, StaticEncoder)
    assert encoder.info.width == 384
    assert encoder.info.window == 128  # its tokenizer truncates, and so does sentence-transformers
    paragraphs = [part for topic in topics.values() for part in topic.split("\n\n")][::20]
    short = [text for text in (*paragraphs, *TEXTS) if encoder.tokenize([text], None)[0].tokens <= 128]
    assert len(short) > 100
    agree(encoder, folder, short)


def test_model2vecs_tensors_are_read_as_sentence_transformers_reads_them(models, tmp_path):
    from safetensors.numpy import save_file

    folder = Path(shutil.copytree(models("plain"), tmp_path / "copy"))
    rng = np.random.default_rng(3)
    size = wordpiece().get_vocab_size()
    tensors: dict[str, Any] = {
        "embeddings": rng.normal(size=(40, WIDTH)).astype(np.float16),
        "mapping": rng.integers(0, 40, size),
        "weights": rng.uniform(0.1, 2, size),
    }
    for names in (["embeddings", "mapping", "weights"], ["embeddings", "mapping"]):
        save_file({name: tensors[name] for name in names}, folder / "model.safetensors")
        agree(StaticEncoder("tiny", folder), folder, TEXTS)


def test_a_texts_vector_does_not_depend_on_its_batch(models):
    encoder = StaticEncoder("tiny", models("dense"))
    batch = encoder.tokenize([*TEXTS, "fox " * 5000, *TEXTS], None)
    alone = np.concatenate([encoder.encode([text]) for text in batch])
    np.testing.assert_array_equal(encoder.encode(batch), alone)
    assert encoder.encode([]).shape == (0, 16)


@laws(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), max_size=12), most=st.integers(1, 20))
def test_blocks_are_all_texts_in_order_and_small_or_of_one(lengths, most):
    blocks = list(static_engine._blocks(lengths, most))
    assert [at for block in blocks for at in block] == list(range(len(lengths)))
    assert all(len(block) == 1 or sum(lengths[at] for at in block) <= most for block in blocks)


# Token ids.


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_ids_and_places_are_those_without_special_tokens(models, tokenizer):
    encoder, made = StaticEncoder("tiny", models("plain", tokenizer)), TOKENIZERS[tokenizer]()
    for text in ("query: ", "", PROSE * 700):  # the last is tokenised in slices
        for prompt in (None, "query"):
            (whole,) = encoder.tokenize([text], prompt)
            prefix = "query: " if prompt else ""
            said = made.encode(prefix + text, add_special_tokens=False)
            own = [(start, end) for start, end in said.offsets if end > len(prefix)]
            offsets = encoder.offsets(whole)
            assert offsets.ends.tolist() == [end - len(prefix) for _, end in own]
            assert whole.tokens == max(1, len(said.ids))
            assert not said.ids or whole.content.ids.tolist() == said.ids


def test_windows_of_a_whole_text_make_its_vector(models):
    encoder = StaticEncoder("tiny", models("plain"))
    text = PROSE * 20
    (whole,) = encoder.tokenize([text], None)
    offsets = encoder.offsets(whole)
    spans = Chunker(100, 0).spans(text, offsets)
    assert len(spans) > 5
    rows = encoder.encode(encoder.windows(whole, offsets, spans))
    weights = np.array([stop - start for start, stop in spans]) / len(offsets)
    np.testing.assert_allclose(weights @ rows, encoder.encode([whole])[0], atol=1e-5)
    assert encoder.info.pools_mean
    (seen,) = encoder.windows(whole, offsets, [(0, len(offsets))])
    np.testing.assert_array_equal(encoder.pool(seen, spans), rows)


def test_a_span_is_pooled_without_the_prompt(models):
    encoder = StaticEncoder("tiny", models("dense"))
    span = (3, 30)
    seen = {}
    for prompt in (None, "query"):
        (whole,) = encoder.tokenize([PROSE], prompt)
        (seen[prompt],) = encoder.windows(whole, encoder.offsets(whole), [span])
    assert seen["query"].tokens > seen[None].tokens
    pooled = encoder.pool(seen["query"], [(0, 27)])
    np.testing.assert_array_equal(pooled, encoder.encode([seen[None]]))


def test_packed_texts_are_unpacked_to_the_same_vectors_empty_ones_too(models):
    encoder = StaticEncoder("tiny", models("bias"))
    batch = encoder.tokenize(TEXTS, "query") + encoder.tokenize(TEXTS, None)
    packed = json.loads(json.dumps(encoder.pack(batch)))
    np.testing.assert_array_equal(encoder.encode(encoder.unpack(packed)), encoder.encode(batch))
    ids = np.array([len(encoder._table)], dtype="<i4")
    beyond = {"tokens": [1], "prompt_tokens": [0], "ids": b64encode(ids.tobytes()).decode()}
    with pytest.raises(CorruptMessageError):
        encoder.unpack(beyond)


def test_a_tokenizer_that_truncates_gives_the_window(models):
    folder = models("plain", limit=9)
    encoder = StaticEncoder("tiny", folder)
    assert encoder.info.window == 9
    (whole,) = encoder.tokenize([PROSE], None)
    assert whole.tokens > 40
    (cut,) = encoder.windows(whole, encoder.offsets(whole), [(0, 9)])
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(str(folder), device="cpu").encode([PROSE])
    assert cosines(encoder.encode([cut]), theirs).min() >= AGREEMENT
    assert StaticEncoder("tiny", models("plain")).info.window == WINDOW


# Words seen before.

WORDPIECE = wordpiece()
SPACES = st.sampled_from(["", " ", "  ", "\n", "\t", "\x0b", "\x1c", "\x85", "\xa0", "\u2028"])
PIECES = st.sampled_from((*PROSE.split(), *FOREIGN.split(), *AWKWARD, "[SEP]", "x" * 40)) | st.text(
    max_size=5
)
LINES = st.lists(st.tuples(PIECES, SPACES), max_size=8).map(
    lambda drawn: "".join(piece + space for piece, space in drawn)
)


@laws(max_examples=150, deadline=None)
@given(batches=st.lists(st.lists(LINES, max_size=4), max_size=4), most=st.sampled_from([3, 10, 1000]))
def test_the_ids_of_words_are_those_of_the_text(batches, most):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, "KNOWN_WORDS", most)
        known = WordCache(WORDPIECE)
        for texts in [*batches, *batches]:
            expected = WORDPIECE.encode_batch(texts, add_special_tokens=False)
            assert [np.frombuffer(ids, dtype=np.int32).tolist() for ids in known(texts)] == [
                one.ids for one in expected
            ]
            assert len(known._known) <= most + 1


def test_only_tokenizers_that_end_words_at_spaces_go_word_by_word():
    assert splits_at_spaces(wordpiece())
    assert not splits_at_spaces(byte_level())
    assert not splits_at_spaces(unigram())
    with_space = wordpiece()
    with_space.add_tokens(["quick brown"])
    assert not splits_at_spaces(with_space)


# The space.


def test_a_model_has_one_space_wherever_it_lies_and_others_have_others(models, tmp_path):
    spaces = [
        StaticEncoder("tiny", models(make, tokenizer)).info.space
        for make in MAKES
        for tokenizer in TOKENIZERS
    ]
    spaces += [StaticEncoder("tiny", models("plain", **{n: 5})).info.space for n in ("seed", "limit")]
    assert len(set(spaces)) == len(spaces)
    assert all(space.startswith("static-") for space in spaces)
    folder = Path(shutil.copytree(models("half"), tmp_path / "elsewhere"))
    (folder / "README.md").write_text("other words")
    assert StaticEncoder("other name", folder).info.space == spaces[MAKES.index("half") * 3]
    settings = folder / "config_sentence_transformers.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "prompts": {"query": "q: "}}))
    assert StaticEncoder("tiny", folder).info.space not in spaces


def test_the_card_says_how_many_bytes_are_held(models):
    info = StaticEncoder("tiny", models("half")).info
    assert info.weight_bytes == (wordpiece().get_vocab_size() + 1) * WIDTH * 4
    assert info.prompts == {"query": "query: ", "document": ""}


# What cannot be served.


def test_what_is_not_linear_is_refused(models):
    with pytest.raises(ModelError, match="Tanh"):
        StaticEncoder("tiny", models("tanh"))


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "model.safetensors", "1_Dense/config.json", "1_Dense/model.safetensors"]
)
@pytest.mark.parametrize("damage", ["missing", "cut", "other"])
def test_a_damaged_folder_is_refused(copied, name, damage):
    file = copied / name
    whole = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"[]")
    with pytest.raises(ModelError):
        StaticEncoder("tiny", copied)


def test_pickled_weights_are_never_read(copied):
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        StaticEncoder("tiny", copied)


def test_a_module_of_another_package_is_refused(copied):
    modules = json.loads((copied / "modules.json").read_text())
    modules[-1]["type"] = "custom_code.Normalize"
    (copied / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelError, match=r"custom_code\.Normalize"):
        StaticEncoder("tiny", copied)


def test_a_tokenizer_with_more_ids_than_vectors_is_refused(models):
    assert StaticEncoder("tiny", models("plain", rows=3))
    with pytest.raises(ModelError, match="ids up to"):
        StaticEncoder("tiny", models("plain", rows=-1))


def test_only_folders_that_begin_with_a_static_embedding_are_static(models, tmp_path):
    assert is_static(models("dense"))
    assert not is_static(Path(locate("all-MiniLM-L6-v2")))
    assert not is_static(tmp_path)
    for text in ("", "[]", "{}", "[1]", '[{"type": 3}]', '[{"type": "mine.StaticEmbedding"}]'):
        (tmp_path / "modules.json").write_text(text)
        assert not is_static(tmp_path)


def test_a_static_model_needs_no_torch(models):
    script = (
        "import sys; from pathlib import Path; from sutra_tasks.engines.static_engine import *\n"
        "e = StaticEncoder('tiny', Path(sys.argv[1])); e.encode(e.tokenize(['fox'], None))\n"
        "print({'torch', 'transformers', 'sentence_transformers', 'scipy'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(models("dense"))], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
