"""Attention and precision as torch really computes them, on the packaged model and this processor."""

import json
import threading
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend

from sutra_tasks.engines.model_folder import locate
from sutra_tasks.engines.torch_engine.sdpa_kernels import SDPA_KERNELS, SdpaKernels
from tests.conftest import wait_until

MODEL = "all-MiniLM-L6-v2"
TEXTS = ["a", "A few words.", *list(topics.values())[:2], "é" * 300, "日本語のテキスト"]
CLOSE = 0.99999


@pytest.fixture(scope="module")
def reference():
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(locate(MODEL), device="cpu").encode(TEXTS, normalize_embeddings=True)


@pytest.fixture
def native(monkeypatch):
    """Let every processor count as one that computes bfloat16 itself; some are only slower at it."""
    from sutra_tasks.engines.capability import Hardware
    from sutra_tasks.engines.torch_engine import forward_pass

    monkeypatch.setattr(forward_pass, "describe", lambda _: Hardware(cpu_bf16=True))
    monkeypatch.setattr(forward_pass, "LEAST_SPEED_UP", 0.0)


def engine(**options):
    from sutra_tasks.engines.torch_engine.encoder import TorchEncoder

    return TorchEncoder(MODEL, **options)


def cosines(encoder, reference):
    from sutra_tasks.engines.golden import lowest_cosine

    rows = []
    for text in encoder.tokenize(TEXTS, None):
        offsets = encoder.offsets(text)
        room = encoder.info.window - (text.tokens - len(offsets))
        rows += encoder.windows(text, offsets, [(0, min(room, len(offsets)))])
    together = encoder.encode(rows)
    alone = np.vstack([encoder.encode([row]) for row in rows])
    return min(lowest_cosine(got, reference) for got in (together, alone))


@pytest.mark.parametrize("attention", ["auto", "eager", "sdpa", "flash_attention_2"])
def test_in_float32_every_attention_gives_sentence_transformers_vectors(attention, reference):
    encoder = engine(dtype="float32", attention=attention)
    path = "plain" if attention == "eager" else "cpu_flash"
    assert (encoder.attention.implementation, encoder.attention.dtype) == (path, "float32")
    assert cosines(encoder, reference) >= CLOSE


def test_what_is_chosen_unasked_stays_faithful(reference):
    encoder = engine()
    assert encoder.attention.implementation == "cpu_flash"
    assert encoder.attention.dtype == "bfloat16" or encoder.attention.reason
    assert cosines(encoder, reference) >= 0.9999


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_had_for_the_asking_and_names_the_same_space(dtype, reference):
    encoder = engine(dtype=dtype)
    assert encoder.attention.dtype == dtype
    assert 0.999 <= cosines(encoder, reference) < 1
    assert encoder.info.space == engine(dtype="float32").info.space


def test_a_precision_that_is_no_faster_is_not_used(native, monkeypatch, reference):
    from sutra_tasks.engines.torch_engine import forward_pass

    assert engine().attention.dtype == "bfloat16"
    monkeypatch.setattr(forward_pass, "LEAST_SPEED_UP", 1000.0)
    encoder = engine()
    assert encoder.attention.dtype == "float32"
    assert encoder.attention.reason.endswith("times as fast as float32")
    assert cosines(encoder, reference) >= CLOSE  # the weights are whole again


def test_an_attention_that_computes_something_else_is_not_used(monkeypatch, reference):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def without_mask(module, query, key, value, attention_mask, **options):
        return sdpa_attention_forward(module, query, key, value, None, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", without_mask)
    encoder = engine(dtype="float32")
    assert encoder.attention.implementation == "plain"
    assert encoder.attention.reason.startswith("cpu_flash in float32: cosine 0.")
    assert cosines(encoder, reference) >= CLOSE


def test_a_model_that_gives_no_numbers_is_refused(monkeypatch):
    import torch

    from sutra_tasks.engines.torch_engine import encoder as torch_engine
    from sutra_tasks.engines.torch_engine.modules import load_modules as load
    from sutra_tasks.errors import ModelError

    def broken(name, folder):
        model = load(name, folder)
        next(model.parameters()).data.fill_(torch.nan)
        return model

    monkeypatch.setattr(torch_engine, "load_modules", broken)
    with pytest.raises(ModelError, match="plain in float32: cosine nan"):
        engine()


def test_only_padded_batches_bring_a_mask(monkeypatch):
    import torch

    masks = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, **options):
        masks.append(options.get("attn_mask"))
        return attend(*args, **options)

    encoder = engine(dtype="float32")
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    encoder.encode(encoder.tokenize(["one two", "two three"], None))
    assert masks == [None] * 6
    encoder.encode(encoder.tokenize(["one two", "two three four"], None))
    assert None not in masks[6:]


def test_rotary_frequencies_stay_in_float32_in_every_precision():
    import torch

    from sutra_tasks.engines.torch_engine.forward_pass import _Weights

    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    model.register_buffer("inv_freq", torch.rand(2), persistent=False)
    model.register_buffer("mean", torch.rand(2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = _Weights(model)
    half, whole, cpu = torch.bfloat16, torch.float32, torch.device("cpu")
    weights.put(cpu, half, linear_only=False)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {half}
    assert model.inv_freq.dtype == whole
    weights.put(cpu, half, linear_only=True)
    assert (model[0].weight.dtype, model[1].weight.dtype, model.mean.dtype) == (half, whole, whole)
    weights.put(cpu, whole, linear_only=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_with_flash_attention_batches_go_unpadded(monkeypatch, reference):
    import torch
    from transformers import modeling_flash_attention_utils as flash
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

    from sutra_tasks.engines.capability import Hardware
    from sutra_tasks.engines.torch_engine import forward_pass

    shapes = []

    def varlen(module, query, key, value, attention_mask, **options):
        """Compute what the package's kernel does for texts in one row, text by text."""
        assert attention_mask is None
        shapes.append(query.shape)
        lengths = options["cu_seq_lens_q"].diff().tolist()
        parts = (whole.split(lengths, dim=2) for whole in (query, key, value))
        attended = map(torch.nn.functional.scaled_dot_product_attention, *parts)
        return torch.cat(list(attended), dim=2).transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", varlen)
    monkeypatch.setattr(
        PreTrainedModel, "_check_and_adjust_attn_implementation", lambda _, name, **__: name
    )
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda _: ((None, varlen), ()))
    ampere = Hardware(kind="cuda", capability=(8, 0), flash_attn=True)
    monkeypatch.setattr(forward_pass, "describe", lambda _: ampere)
    encoder = engine()
    assert (encoder.attention.implementation, encoder.attention.dtype) == (
        "flash_attention_2",
        "bfloat16",
    )
    assert cosines(encoder, reference) >= 0.9999
    assert {shape[0] for shape in shapes} == {1}


def test_a_models_own_wish_for_a_kernel_downloads_nothing(tmp_path, monkeypatch):
    from transformers.integrations import hub_kernels

    from sutra_tasks.engines.torch_engine.encoder import TorchEncoder

    def refuse(*_, **__):
        raise AssertionError("a kernel was asked for")

    monkeypatch.setattr(hub_kernels, "get_kernel", refuse)
    source = Path(locate(MODEL))
    for path in source.iterdir():
        (tmp_path / path.name).symlink_to(path)
    wish = {"attn_implementation": "kernels-community/flash-attn2"}
    for name, change in [("sentence_bert_config.json", {"model_args": wish}), ("config.json", wish)]:
        said = json.loads((source / name).read_text())
        (tmp_path / name).unlink()
        (tmp_path / name).write_text(json.dumps(said | change))
    assert TorchEncoder(str(tmp_path)).attention.implementation == "cpu_flash"
    assert not hub_kernels._kernels_enabled


def test_each_pass_says_which_kernels_the_process_may_take(monkeypatch):
    from sutra_tasks.engines.torch_engine import encoder as torch_engine
    from sutra_tasks.engines.torch_engine.modules import load_modules as load

    running = []

    def watched(*args):
        model = load(*args)
        model[0].register_forward_pre_hook(lambda *_: running.append(SDPA_KERNELS._running))
        return model

    monkeypatch.setattr(torch_engine, "load_modules", watched)
    encoder = engine(dtype="float32", attention="sdpa")  # its probes are passes, too
    encoder.encode(encoder.tokenize(TEXTS[:2], None))
    # Two probes of plain attention first, with which it is compared; then one of the states' shape.
    assert running == [0, 0, 1, 1, 1, 1]
    assert SDPA_KERNELS._running == 0


def test_passes_of_other_kernels_wait_and_those_of_the_same_do_not():
    kernels, order = SdpaKernels(), []
    inside, leave = threading.Barrier(3), threading.Event()

    def run(name, *allowed):
        with kernels.only(allowed):
            order.append(name)
            if name in ("one", "two"):
                inside.wait(10)
                leave.wait(10)

    both = [threading.Thread(target=run, args=(n, SDPBackend.FLASH_ATTENTION)) for n in ("one", "two")]
    other = threading.Thread(target=run, args=("other", SDPBackend.MATH))
    for thread in both:
        thread.start()
    inside.wait(10)
    assert not torch.backends.cuda.math_sdp_enabled()
    other.start()
    wait_until(lambda: kernels._waiting == 1)
    late = threading.Thread(target=run, args=("late", SDPBackend.FLASH_ATTENTION))
    late.start()  # it does not overtake
    wait_until(lambda: kernels._waiting == 2)
    assert sorted(order) == ["one", "two"]
    leave.set()
    for thread in (*both, other, late):
        thread.join(10)
    assert sorted(order[2:]) == ["late", "other"]
    assert torch.backends.cuda.math_sdp_enabled()
