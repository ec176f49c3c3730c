"""Models of a few thousand weights, one for each way a model can treat special tokens and prompts.

Their weights are random and their tokenizers are built here, so their vectors mean nothing. But two ways
to compute the same vector must agree.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from sutra_tasks.engines.tokenizing.tokenizing_encoder import TokenizingEncoder

WINDOW = 128
HIDDEN = 32

PROSE = (
    "The quick brown fox jumps over the lazy dog. It costs 3.14, said Dr. Who! Running and jumping, it "
    "passed a text; a query found naïve façades. Nobody represented the sentence, and so on. "
)
FOREIGN = "Привет, мир! こんにちは世界。 हिन्दी में लिखा है। שלום עולם 🙂 "
CORPUS = [
    "The quick brown fox jumps over the lazy dog. It costs 3.14, said Dr. Who! query: passage: text",
    "Represent the sentence: Instruct: find what answers it. Query: running, jumped, represented.",
    "Привет, мир! こんにちは世界。 हिन्दी में लिखा है। שלום עולם naïve façades 🙂",
] * 5
PIECES = ("re", "repres", "query", "##ing", "##ed", "##ented", "##er", "##re", "##th", "##es")


@dataclass(frozen=True)
class Kind:
    """One model: its tokenizer, its pooling, and the modules after pooling."""

    tokenizer: Callable[[], Tokenizer]
    pooling: str = "mean"
    include_prompt: bool = True
    dense: int = 0
    normalizes: bool = False
    left: bool = False
    architecture: str = "bert"
    prompts: dict[str, str] = field(default_factory=dict)
    hidden: int = HIDDEN


def _wordpiece() -> Tokenizer:
    normalizer, splitter = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    words = {
        word for text in CORPUS for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))
    }
    letters = sorted(set("".join(words)))
    # Not trained: a trainer chooses other tokens from run to run.
    tokens = [*letters, *(f"##{letter}" for letter in letters), *sorted(words)[::2], *PIECES]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {token: at for at, token in enumerate(dict.fromkeys([*special, *tokens]))}
    made: Tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizer, splitter
    return made


def wordpiece() -> Tokenizer:
    made = _wordpiece()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return made


def wordpiece_without_specials() -> Tokenizer:
    return _wordpiece()


def byte_level(*, trim: bool = True, specials: bool = True) -> Tokenizer:
    made: Tokenizer = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=trim)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    made.post_processor = (
        processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=trim, add_prefix_space=False)
        if specials
        else processors.ByteLevel(trim_offsets=trim)
    )
    return made


def byte_level_without_specials() -> Tokenizer:
    return byte_level(trim=False, specials=False)


def unigram() -> Tokenizer:
    made: Tokenizer = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=180,
        unk_token="<unk>",
        special_tokens=["<pad>", "</s>", "<unk>"],
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    # Rounded and sorted: a trainer's scores differ from run to run.
    scores = {name: round(score, 1) for name, score in json.loads(made.to_str())["model"]["vocab"]}
    special = ["<pad>", "</s>", "<unk>"]
    pieces = [(name, scores[name]) for name in (*special, *sorted(set(scores) - set(special)))]
    made.model = models.Unigram(pieces, unk_id=2)
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return made


RESERVING = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta", "mpnet": "MPNet"}
"""Architectures that reserve the first positions, and their classes in transformers."""

KINDS = {
    # Special tokens on both sides.
    "bert": Kind(wordpiece, prompts={"query": "query: ", "merging": "re"}),
    "bert-cls": Kind(wordpiece, pooling="cls", prompts={"query": "query: "}),
    "roberta": Kind(
        byte_level,
        include_prompt=False,
        architecture="roberta",
        prompts={"query": "query: ", "merging": "Represent the"},
    ),
    # Special tokens at the end only, as INSTRUCTOR has them.
    "t5": Kind(
        unigram,
        include_prompt=False,
        dense=24,
        normalizes=True,
        architecture="t5",
        prompts={"query": "Represent the sentence: ", "merging": "run"},
    ),
    # No special tokens.
    "qwen": Kind(
        byte_level_without_specials,
        pooling="lasttoken",
        normalizes=True,
        left=True,
        architecture="qwen2",
        prompts={"query": "Instruct: find what answers it.\nQuery:", "merging": "query: "},
    ),
    "bare": Kind(
        wordpiece_without_specials,
        include_prompt=False,
        dense=24,
        prompts={"query": "query: ", "merging": "re"},
    ),
}


def token(made: Tokenizer, *names: str) -> str | None:
    return next((name for name in names if made.token_to_id(name) is not None), None)


def build(kind: Kind, folder: Path) -> str:
    """Write a model as a sentence-transformers folder below ``folder``; return its path."""
    import torch
    import transformers
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

    torch.manual_seed(7)
    made = kind.tokenizer()
    shape: dict[str, Any] = {
        "vocab_size": made.get_vocab_size(),
        "hidden_size": kind.hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": WINDOW,
        "initializer_range": 0.3,  # else all vectors would be nearly the same
        "pad_token_id": 0,
    }
    inner: Any
    if kind.architecture == "bert":
        inner = transformers.BertModel(transformers.BertConfig(**shape))
    elif kind.architecture in RESERVING:
        shape |= {"max_position_embeddings": WINDOW + 2, "pad_token_id": 1}
        name = RESERVING[kind.architecture]
        inner = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**shape))
    elif kind.architecture == "gpt2":
        inner = transformers.GPT2Model(
            transformers.GPT2Config(
                vocab_size=made.get_vocab_size(), n_embd=kind.hidden, n_layer=2, n_head=2, n_inner=64,
                n_positions=WINDOW, initializer_range=0.3, bos_token_id=0, eos_token_id=2,
            )
        )  # fmt: skip
    elif kind.architecture == "qwen2":
        shape |= {"num_key_value_heads": 1, "pad_token_id": 1}
        inner = transformers.Qwen2Model(transformers.Qwen2Config(**shape))
    else:
        inner = transformers.T5EncoderModel(
            transformers.T5Config(
                vocab_size=made.get_vocab_size(), d_model=HIDDEN, d_kv=16, d_ff=64, num_layers=2,
                num_heads=2, pad_token_id=0, eos_token_id=1,
            )
        )  # fmt: skip
    bare = folder / "bare"
    inner.eval().save_pretrained(bare)
    names = ["input_ids", "attention_mask"] + ["token_type_ids"] * (kind.architecture == "bert")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        model_max_length=WINDOW,
        model_input_names=names,
        padding_side="left" if kind.left else "right",
        unk_token=token(made, "[UNK]", "<unk>"),
        pad_token=token(made, "[PAD]", "<pad>"),
        sep_token=token(made, "[SEP]", "</s>"),
        cls_token=token(made, "[CLS]", "<s>"),
    ).save_pretrained(bare)
    modules: list[Any] = [Transformer(str(bare), max_seq_length=WINDOW)]
    modules.append(Pooling(kind.hidden, kind.pooling, include_prompt=kind.include_prompt))
    if kind.dense:
        modules.append(Dense(kind.hidden, kind.dense, activation_function=torch.nn.Tanh()))
    if kind.normalizes:
        modules.append(Normalize())
    saved = folder / "model"
    SentenceTransformer(modules=modules, prompts=kind.prompts, device="cpu").save(
        str(saved), create_model_card=False
    )
    return str(saved)


def prompts_of(name: str) -> list[str | None]:
    return [None, *(KINDS[name].prompts if name in KINDS else ())]


@cache
def tokenizer_of(name: str) -> Tokenizer:
    return KINDS[name].tokenizer()


@cache
def tiny_encoder(name: str) -> TokenizingEncoder:
    kind = KINDS[name]
    return TokenizingEncoder(tokenizer_of(name), kind.prompts, WINDOW, pools_prompt=kind.include_prompt)
