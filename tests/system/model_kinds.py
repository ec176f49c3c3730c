"""Tiny models as people have them: an ordinary one of ``tiny_models`` whose files say something odd."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.system.tiny_models import HIDDEN, KINDS, WINDOW, Kind, build, byte_level_without_specials

ABSURD = int(1e30)
"""What transformers writes for a tokenizer that names no limit."""

PROMPTS = {"query": "query: ", "passage": "passage: "}


def edit(file: Path, **changed: Any) -> None:
    """Set fields of a JSON file; None removes one."""
    found = json.loads(file.read_text("utf-8")) | changed
    file.write_text(json.dumps({name: value for name, value in found.items() if value is not None}))


@dataclass(frozen=True)
class Odd:
    """A model that differs from one of ``tiny_models``.

    Attributes:
        kind: that one.
        files: the fields to change, by file.
        window: that the engine must find.
        change: further changes of the folder.
    """

    kind: Kind = KINDS["bert"]
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    window: int = WINDOW
    change: Callable[[Path], None] = lambda _: None

    def build(self, folder: Path) -> Path:
        """Write the model below ``folder``."""
        made = Path(build(self.kind, folder))
        for file, changed in self.files.items():
            edit(made / file, **changed)
        self.change(made)
        return made


def unlimited(limit: Any = None) -> dict[str, dict[str, Any]]:
    """Return the changes that take a model's limits away, or replace them by ``limit``."""
    return {
        "tokenizer_config.json": {"model_max_length": limit},
        "sentence_bert_config.json": {"max_seq_length": None},
    }


def longer(limit: int) -> dict[str, dict[str, Any]]:
    """Return the changes that name a limit beyond the positions that a model has."""
    return {"sentence_bert_config.json": {"max_seq_length": limit}}


def by_default(name: str) -> dict[str, dict[str, Any]]:
    return {"config_sentence_transformers.json": {"default_prompt_name": name}}


def stored_in(dtype: str) -> Callable[[Path], None]:
    """Return a change that stores all weights in another precision."""

    def change(folder: Path) -> None:
        import torch
        from safetensors.torch import load_file, save_file

        for file in folder.rglob("*.safetensors"):
            tensors = {name: one.to(getattr(torch, dtype)) for name, one in load_file(file).items()}
            save_file(tensors, file, metadata={"format": "pt"})
        edit(folder / "config.json", dtype=dtype)

    return change


def without_padding(folder: Path) -> None:
    for file in ("tokenizer_config.json", "config.json"):
        edit(folder / file, pad_token=None, pad_token_id=None)
    described = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps(described | {"padding": None}))


def cased(kind: Kind) -> Kind:
    """Return a kind whose tokenizer keeps upper case apart."""

    def tokenizer() -> Any:
        from tokenizers import normalizers

        made = kind.tokenizer()
        made.normalizer = normalizers.BertNormalizer(lowercase=False)
        return made

    return replace(kind, tokenizer=tokenizer)


def with_modules(make: Callable[[Any], list[Any]]) -> Callable[[Path], None]:
    """Return a change that replaces the modules after the transformer by those that ``make`` returns."""

    def change(folder: Path) -> None:
        import torch
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer import modules

        torch.manual_seed(5)
        old: Any = SentenceTransformer(str(folder), device="cpu")
        prompts = {name: text or "" for name, text in old.prompts.items()}
        for place in (*folder.glob("[1-9]_*"), folder / "modules.json"):
            shutil.rmtree(place) if place.is_dir() else place.unlink()
        SentenceTransformer(modules=[old[0], *make(modules)], prompts=prompts, device="cpu").save(
            str(folder), create_model_card=False
        )

    return change


def layers_weighted(modules: Any) -> list[Any]:
    weighted = modules.WeightedLayerPooling(HIDDEN, num_hidden_layers=2, layer_start=1)
    return [weighted, modules.Pooling(HIDDEN)]


def words_weighted(modules: Any) -> list[Any]:
    vocabulary = [str(at) for at in range(200)]
    weights = {word: 0.5 + at % 7 for at, word in enumerate(vocabulary)}
    return [modules.WordWeights(vocabulary, weights), modules.Pooling(HIDDEN)]


def dense_chain(modules: Any) -> list[Any]:
    import torch

    return [
        modules.Pooling(HIDDEN, ("cls", "mean")),
        modules.Dense(2 * HIDDEN, 40, activation_function=torch.nn.GELU(), use_residual=True),
        modules.LayerNorm(40),
        modules.Dropout(0.5),
        modules.Dense(40, 20, bias=False, activation_function=torch.nn.ReLU()),
        modules.Normalize(),
    ]


def on_tokens(modules: Any) -> list[Any]:
    return [
        modules.Dense(
            HIDDEN, 24, module_input_name="token_embeddings", module_output_name="token_embeddings"
        ),
        modules.Normalize(module_input_name="token_embeddings"),
        modules.Pooling(24),
    ]


def ended() -> Any:
    """Return a tokenizer that ends each text by a special token, which is the last token to pool."""
    from tokenizers import processors

    made = byte_level_without_specials()
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", made.token_to_id("</s>"))]
    )
    return made


GPT2 = replace(KINDS["qwen"], architecture="gpt2", normalizes=False, prompts=PROMPTS)
ROBERTA = KINDS["roberta"]

ODD: dict[str, Odd] = {
    "default prompt": Odd(replace(KINDS["bert"], prompts=PROMPTS), by_default("query")),
    "default prompt that is empty": Odd(files=by_default("document")),
    "default prompt outside of pooling": Odd(replace(ROBERTA, prompts=PROMPTS), by_default("passage")),
    "default prompt of a decoder": Odd(replace(KINDS["qwen"], prompts=PROMPTS), by_default("query")),
    "reserved positions": Odd(ROBERTA, unlimited()),
    "reserved positions, absurd limit": Odd(ROBERTA, unlimited(1e30)),
    "reserved positions, larger limit": Odd(ROBERTA, longer(4096)),
    "reserved positions of xlm-roberta": Odd(replace(ROBERTA, architecture="xlm-roberta"), unlimited()),
    "reserved positions of mpnet": Odd(replace(ROBERTA, architecture="mpnet"), unlimited()),
    "no limit": Odd(files=unlimited()),
    "absurd limit": Odd(files=unlimited(ABSURD)),
    "larger limit": Odd(files=longer(100_000)),
    "smaller limit": Odd(files=longer(40), window=40),
    "no limit and no positions": Odd(KINDS["t5"], unlimited(), window=8192),
    "limit of the processor": Odd(
        files={"sentence_bert_config.json": {"processing_kwargs": {"text": {"max_length": 24}}}},
        window=24,
    ),
    "no padding token": Odd(change=without_padding),
    "no padding token, decoder": Odd(GPT2, change=without_padding),
    "positions and padding on the left": Odd(GPT2),
    "padding on the left": Odd(KINDS["qwen"]),
    "decoder that ends texts by a token": Odd(replace(KINDS["qwen"], tokenizer=ended)),
    "padding on the right of a decoder": Odd(replace(KINDS["qwen"], left=False)),
    "padding on the left of an encoder": Odd(replace(KINDS["bert"], left=True)),
    "last tokens are kept": Odd(
        replace(KINDS["bert"], prompts={}), {"tokenizer_config.json": {"truncation_side": "left"}}
    ),
    "float16": Odd(replace(KINDS["bert-cls"], dense=16), change=stored_in("float16")),
    "bfloat16": Odd(KINDS["qwen"], change=stored_in("bfloat16")),
    "width of its own": Odd(files={"config_sentence_transformers.json": {"truncate_dim": 12}}),
    "width of its own behind a Dense": Odd(
        KINDS["t5"], {"config_sentence_transformers.json": {"truncate_dim": 8}}
    ),
    "another similarity": Odd(
        files={"config_sentence_transformers.json": {"similarity_fn_name": "euclidean"}}
    ),
    "lower case": Odd(cased(KINDS["bert"]), {"sentence_bert_config.json": {"do_lower_case": True}}),
    "upper case": Odd(cased(KINDS["bert"])),
    **{
        f"pooling {mode}": Odd(replace(KINDS["bert"]), {"1_Pooling/config.json": {"pooling_mode": mode}})
        for mode in ("cls", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
    },
    "several poolings": Odd(files={"1_Pooling/config.json": {"pooling_mode": ["cls", "max", "mean"]}}),
    "several poolings as old releases write them": Odd(
        files={
            "1_Pooling/config.json": {
                "pooling_mode": None,
                "embedding_dimension": None,
                "word_embedding_dimension": 32,
                "pooling_mode_cls_token": True,
                "pooling_mode_mean_tokens": True,
            }
        }
    ),
    "dense, layer norm, dropout and residual": Odd(change=with_modules(dense_chain)),
    "modules on tokens": Odd(change=with_modules(on_tokens)),
    "weights of words": Odd(change=with_modules(words_weighted)),
    "weights of layers": Odd(
        files={"config.json": {"output_hidden_states": True}}, change=with_modules(layers_weighted)
    ),
    "weighted mean of a decoder": Odd(
        KINDS["qwen"], {"1_Pooling/config.json": {"pooling_mode": "weightedmean"}}
    ),
}
