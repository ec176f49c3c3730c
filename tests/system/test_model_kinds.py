"""Models as people have them: sentence-transformers' vectors through every entrance, or a sentence."""

import json
import shutil
import string
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sutra_tasks.batching.batcher import Batcher
from sutra_tasks.batching.next_batch import Limits
from sutra_tasks.batching.service import EmbeddingService
from sutra_tasks.client.call import Call
from sutra_tasks.engines.encoder import cut_to_window
from sutra_tasks.engines.golden import GoldenVectors
from sutra_tasks.engines.load import load_engine
from sutra_tasks.errors import ModelError
from sutra_tasks.models.loaded.loading import warm_up
from sutra_tasks.settings import Settings
from sutra_tasks.streaming.consumer.tokenizing import StreamTokenizer
from tests.system.model_kinds import ODD, edit
from tests.system.tiny_models import FOREIGN, KINDS, PROSE, WINDOW, build

CLOSE = 0.9999
TEXTS = ["fox", PROSE, "Query: RUN! " * 7, FOREIGN, PROSE * 3, "dog and fox", "word " * 600]
CHUNKED: dict[str, Any] = {"block_size": 40, "overlap_tokens": 6}

every_kind = pytest.mark.parametrize("name", ODD)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return where a model is; each is built once."""
    return cache(lambda name: ODD[name].build(tmp_path_factory.mktemp("odd")))


@pytest.fixture(scope="module")
def engine(folder):
    """Return the engine on a model; each is loaded once."""
    return cache(lambda name: load(folder(name)))


def load(path) -> Any:
    return load_engine(Settings(model=str(path), engine="torch", dtype="float32"))


@cache
def reference(path):
    """Return the model in sentence-transformers, with the window and the padding that it may lack."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(path), device="cpu", model_kwargs={"dtype": "float32"})
    if model.tokenizer.pad_token_id is None:
        model.tokenizer.pad_token = model.tokenizer.convert_ids_to_tokens(3)
    return model.float()


def expected(path, texts, window, **options):
    """Return sentence-transformers' vectors of each text alone: some models' depend on the batch."""
    model = reference(path)
    model.max_seq_length = min(model.max_seq_length, window)  # where it fails itself
    return np.stack([model.encode(text, normalize_embeddings=True, **options) for text in texts])


@contextmanager
def serving(encoder, **options):
    batcher = Batcher(Limits(max_tokens=8192, max_texts=64, max_wait_s=0))
    batcher.start()
    try:
        yield EmbeddingService(encoder, batcher, "cpu0", Settings(**options))
    finally:
        batcher.close(10)


def ask(service, texts, **asked):
    call = Call.of([texts], {"details": True, **asked}, Settings())
    return service.answer(service.prepare(call))


def agree(ours, theirs):
    assert ours.shape == theirs.shape
    assert np.sum(np.asarray(ours) * theirs, axis=1).min() >= CLOSE


@every_kind
def test_vectors_are_sentence_transformers_own_alone_in_a_list_and_truncated(folder, engine, name):
    encoder, path, window = engine(name), folder(name), ODD[name].window
    assert encoder.info.window == window
    with serving(encoder) as service:
        for prompt in (None, "", *encoder.info.prompts):
            named: dict[str, Any] = {"prompt": ""} if prompt == "" else {"prompt_name": prompt}
            theirs = expected(path, TEXTS, window, **named)
            got = ask(service, TEXTS, truncate=True, prompt=prompt)
            agree(got.vectors, theirs)
            assert got.tokens[-1] <= window
            alone = ask(service, TEXTS[1], truncate=True, prompt=prompt).vectors
            agree(np.asarray(alone)[None], theirs[1:2])


@every_kind
def test_a_model_is_warmed_up_within_its_window(engine, name):
    tokens, seconds = warm_up(engine(name))
    assert 0 < tokens <= 32 * ODD[name].window
    assert seconds > 0


@pytest.mark.parametrize("name", [name for name in ODD if name.startswith("default prompt")])
def test_a_default_prompt_is_the_same_as_naming_it_also_in_chunks(engine, name):
    encoder = engine(name)
    default = encoder.info.default_prompt
    ways = [CHUNKED, CHUNKED | {"chunking": "late"}] if encoder.info.pools_mean else [CHUNKED]
    for way in ways:
        with serving(encoder, **way) as service:
            for text in ("fox", PROSE * 4):
                got, named = (
                    ask(service, text, chunk_vectors=True, prompt=prompt) for prompt in (None, default)
                )
                np.testing.assert_array_equal(got.vectors, named.vectors)
                assert got.spans == named.spans
                if encoder.info.prompts[default]:
                    other = ask(service, text, prompt="")
                    assert np.dot(got.vectors, other.vectors) < CLOSE


@pytest.mark.parametrize("name", ["default prompt", "default prompt outside of pooling"])
def test_a_stream_embeds_under_the_default_prompt(folder, engine, name):
    encoder = engine(name)
    tokenizer = StreamTokenizer(encoder, Settings(**CHUNKED))
    raw = (b"1-0", [b"text", PROSE.encode()])
    item = tokenizer.entry_item("s", raw, 0.0)
    assert item.error is None
    tokenizer.tokenize([item])
    assert len(item.chunks) > 1
    rows = encoder.encode(item.rows)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    agree(rows, expected(folder(name), [chunk.text for chunk in item.chunks], WINDOW))


@pytest.mark.parametrize(
    "name", ["positions and padding on the left", "padding on the left", "several poolings"]
)
def test_a_vector_does_not_depend_on_its_batch(engine, name):
    encoder = engine(name)
    batch = [cut_to_window(encoder, text) for text in encoder.tokenize(TEXTS, None)]
    alone = np.concatenate([encoder.encode([text]) for text in batch])
    np.testing.assert_allclose(encoder.encode(batch), alone, atol=2e-5)


def test_a_text_without_a_token_has_a_vector_of_numbers_also_alone(engine):
    encoder = engine("padding on the left")  # its tokenizer adds no special tokens
    texts = encoder.tokenize(["", "fox", ""], None)
    assert [text.tokens for text in texts] == [0, texts[1].tokens, 0]
    rows = encoder.encode(texts)
    assert not rows[[0, 2]].any()
    np.testing.assert_allclose(rows[1:2], encoder.encode(texts[1:2]), atol=1e-6)
    with serving(encoder) as service:
        assert np.isfinite(ask(service, ["", "fox"]).vectors).all()


def test_a_models_own_width_is_the_width_of_its_space(engine):
    info = engine("width of its own").info
    assert info.width == 12
    assert info.space.endswith(":12")
    with serving(engine("width of its own")) as service:
        assert ask(service, "fox", dimensions=8).vectors.shape == (8,)


def test_a_default_prompt_makes_another_space(folder, tmp_path):
    path = Path(shutil.copytree(folder("default prompt"), tmp_path / "copy"))
    spaces = {load(path).info.space}
    for name in (None, "passage"):
        edit(path / "config_sentence_transformers.json", default_prompt_name=name)
        spaces.add(load(path).info.space)
    assert len(spaces) == 3


# Static models.


def static(path, *, half=None, **config):
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = {letter: at for at, letter in enumerate(string.ascii_letters)}
    made = Tokenizer(models.BPE(letters, []))  # what it does not know it leaves out
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(3)
    vectors = torch.randn(len(letters), 16)
    model = SentenceTransformer(
        modules=[StaticEmbedding(made, embedding_weights=vectors), Normalize()],
        prompts={"query": "query ", "document": ""},
        device="cpu",
    )
    (model if half is None else model.to(half)).save(str(path), create_model_card=False)
    if config:
        edit(path / "config_sentence_transformers.json", **config)
    return path


def test_a_static_model_whose_vocabulary_lacks_a_script_serves(tmp_path):
    encoder = load(static(tmp_path / "m"))
    golden = GoldenVectors.of(encoder)
    assert not golden.vectors[2].any()  # the text in Russian
    assert golden.fault() is None
    assert golden.disagreement(GoldenVectors.from_json(golden.to_json())) is None
    with serving(encoder) as service:
        assert not np.asarray(ask(service, "Отправьте").vectors).any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_static_models_have_default_prompts_widths_and_half_precision_too(tmp_path, dtype):
    import torch
    from sentence_transformers import SentenceTransformer

    half = getattr(torch, dtype)
    path = static(tmp_path / "m", half=half, default_prompt_name="query", truncate_dim=8)
    encoder = load(path)
    assert (encoder.info.width, encoder.info.default_prompt) == (8, "query")
    model = SentenceTransformer(str(path), device="cpu").float()
    texts = ["a red bicycle", "fox", "for i"]
    with serving(encoder) as service:
        for prompt in (None, "query", "document"):
            theirs = model.encode(texts, prompt_name=prompt, normalize_embeddings=True)
            agree(ask(service, texts, prompt=prompt).vectors, theirs)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_folder_of_model2vec_is_read_without_modules_json(tmp_path, normalize, monkeypatch):
    from huggingface_hub import constants
    from safetensors.numpy import load_file, save_file
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding

    path = static(tmp_path / "m")
    tensors = load_file(path / "model.safetensors")
    save_file({"embeddings": tensors["embedding.weight"]}, path / "model.safetensors")
    for file in ("modules.json", "config_sentence_transformers.json"):
        (path / file).unlink()
    (path / "config.json").write_text(json.dumps({"model_type": "model2vec", "normalize": normalize}))
    modules: list[Any] = [StaticEmbedding.load(str(path)), *([Normalize()] if normalize else [])]
    texts = ["a red bicycle", "fox"]
    theirs = SentenceTransformer(modules=modules, device="cpu").encode(texts)
    in_hub_cache(tmp_path / "hub", "people/m2v", path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for model in (path, "people/m2v"):
        encoder = load(model)
        np.testing.assert_allclose(encoder.encode(encoder.tokenize(texts, None)), theirs, atol=1e-6)


def in_hub_cache(root, name, source):
    """Put a model where the hub's client keeps what it downloaded; return the variables that say so."""
    revision = "a" * 40
    kept = root / f"models--{name.replace('/', '--')}"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text(revision)
    shutil.copytree(source, kept / "snapshots" / revision)


@pytest.mark.parametrize("asked", ["people/static-words", "static-words"])
def test_a_static_model_is_found_by_its_name_on_the_hub(tmp_path, monkeypatch, asked):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    name = asked if "/" in asked else f"sentence-transformers/{asked}"
    in_hub_cache(tmp_path / "hub", name, static(tmp_path / "m"))
    encoder = load(asked)
    assert encoder.info.is_static
    assert encoder.info.model == asked
    assert encoder.info.space == load(tmp_path / "m").info.space


# What is refused, in one sentence that says what to do.


@pytest.fixture
def copied(ordinary, tmp_path):
    """Return a copy of an ordinary model that may be damaged."""
    return Path(shutil.copytree(ordinary, tmp_path / "copy"))


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory):
    return build(KINDS["t5"], tmp_path_factory.mktemp("ordinary"))


def refused(path) -> str:
    with pytest.raises(ModelError) as error:
        load(path)
    said = str(error.value)
    assert "\n" not in said
    assert str(path) in said
    return said


@pytest.mark.parametrize(
    "missing",
    ["modules.json", "config.json", "model.safetensors", "tokenizer.json", "1_Pooling/config.json",
     "2_Dense/config.json", "2_Dense/model.safetensors"],
)  # fmt: skip
@pytest.mark.parametrize("damage", ["missing", "cut", "pipe"])
def test_a_damaged_folder_is_refused_by_the_file_at_fault(copied, missing, damage):
    import os

    file = copied / missing
    whole = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(whole[: len(whole) // 2])
    elif damage == "pipe":
        os.mkfifo(file)
    assert file.name in refused(copied)


def test_weights_that_are_missing_from_a_whole_file_are_named(copied):
    from safetensors.torch import load_file, save_file

    file = copied / "model.safetensors"
    tensors = load_file(file)
    lost = sorted(name for name in tensors if "block.1" in name)
    save_file(
        {name: one for name, one in tensors.items() if name not in lost}, file, metadata={"format": "pt"}
    )
    said = refused(copied)
    assert lost[0] in said
    assert "random" in said


def test_weights_that_are_not_numbers_are_refused_at_start(copied):
    from safetensors.torch import load_file, save_file

    file = copied / "model.safetensors"
    tensors = {
        name: one * float("nan") if one.is_floating_point() else one
        for name, one in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    assert "faithfully" in refused(copied) or "numbers" in refused(copied)


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ({"type": "people.CustomPooling", "path": "1_Pooling"}, "trust_remote_code"),
        ({"type": "sentence_transformers.models.Router", "path": "1_Router"}, ""),
    ],
)
def test_modules_with_code_of_their_own_are_refused(copied, module, said):
    found = json.loads((copied / "modules.json").read_text())
    found[1] |= module
    (copied / "modules.json").write_text(json.dumps(found))
    assert said in refused(copied)


def test_an_architecture_with_code_of_its_own_is_refused(copied):
    edit(
        copied / "config.json",
        model_type="homemade",
        auto_map={"AutoConfig": "homemade.Config", "AutoModel": "homemade.Model"},
    )
    assert "trust_remote_code" in refused(copied)


def test_a_model_that_routes_queries_and_documents_apart_is_refused(tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Router

    inner: Any = SentenceTransformer(build(KINDS["bert"], tmp_path / "one"), device="cpu")
    router = Router.for_query_document(query_modules=list(inner), document_modules=list(inner))
    SentenceTransformer(modules=[router, Normalize()], device="cpu").save(
        str(tmp_path / "routed"), create_model_card=False
    )
    assert "Router" in refused(tmp_path / "routed")


def test_a_model_without_pooling_is_refused(copied):
    found = json.loads((copied / "modules.json").read_text())
    (copied / "modules.json").write_text(json.dumps(found[:1]))
    assert "Pooling" in refused(copied)


def test_a_chat_template_is_refused_rather_than_left_out(tmp_path):
    path = Path(build(KINDS["qwen"], tmp_path))
    template = "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}"
    (path / "chat_template.jinja").write_text(template)
    for file in ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"):
        (path / file).unlink()
    shutil.rmtree(path / "1_Pooling")
    assert "chat template" in refused(path)


@pytest.mark.parametrize(
    ("file", "changed", "said"),
    [
        ("1_Pooling/config.json", {"embedding_dimension": 64}, "they have 32"),
        ("1_Pooling/config.json", {"pooling_mode": "median"}, "'median'"),
        ("config.json", {"vocab_size": 20}, "other shapes"),
        ("config.json", {"model_type": "homemade"}, "`homemade`"),
        ("config_sentence_transformers.json", {"model_type": "CrossEncoder"}, "a CrossEncoder"),
        ("config_sentence_transformers.json", {"default_prompt_name": "nope"}, "'nope'"),
        ("config_sentence_transformers.json", {"truncate_dim": "wide"}, "truncate_dim is 'wide'"),
        ("config_sentence_transformers.json", {"truncate_dim": 0}, "truncate_dim is 0"),
        ("config_sentence_transformers.json", {"requirements": {"torch": ">=99"}}, "torch>=99"),
        ("sentence_bert_config.json", {"max_seq_length": 2}, "window of 2 tokens"),
        ("tokenizer_config.json", {"tokenizer_class": "ByT5Tokenizer"}, "no fast version"),
    ],
)
def test_what_a_folder_says_and_is_not_is_told(tmp_path, file, changed, said):
    path = Path(build(KINDS["bert"], tmp_path))
    edit(path / file, **changed)
    if "tokenizer_class" in changed:
        (path / "tokenizer.json").rename(path / "vocab.json")
    assert said in refused(path)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    path = Path(build(KINDS["bert"], tmp_path))
    described = json.loads((path / "tokenizer.json").read_text())
    described["model"]["vocab"] |= {f"word{at}": 1000 + at for at in range(9)}
    (path / "tokenizer.json").write_text(json.dumps(described))
    assert "ids up to 1008" in refused(path)


def test_a_plain_transformer_is_loaded_as_sentence_transformers_loads_it(tmp_path):
    build(KINDS["bert"], tmp_path)
    path = tmp_path / "bare"
    with serving(load(path)) as service:
        agree(ask(service, TEXTS[:5], truncate=True).vectors, expected(path, TEXTS[:5], WINDOW))


def test_what_is_no_folder_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    for path, said in ((tmp_path / "nothing", "no folder"), (tmp_path / "file", "is a file")):
        assert said in refused(path)


def test_a_prompt_that_fills_the_window_is_refused(copied):
    edit(
        copied / "config_sentence_transformers.json",
        prompts={"query": "word " * WINDOW},
        default_prompt_name="query",
    )
    assert "window of 128" in refused(copied)
