"""Builds students of sentence-transformers' own modules, and saves them.

Every student ends in ``Normalize``; the losses use the output before it. A saved student loads without
``trust_remote_code``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, StaticEmbedding
from tokenizers import Tokenizer
from torch import nn

from sutra_tasks.distillation.training.batches import StudentTokenizer
from sutra_tasks.errors import ModelError

if TYPE_CHECKING:
    from sutra_tasks.distillation.config import DistillationConfig
    from sutra_tasks.vectors import Floats

__all__ = [
    "build_student",
    "chosen_layers",
    "outputs",
    "save_student",
    "token_vectors",
]

SAMPLE: Final = 256
"""Texts by which the length of an untrained student's vectors is measured."""

SIF: Final = 1e-3
"""The constant a in a / (a + p), of Arora et al. 2017: the weight of a token with the frequency p."""

TOKENS_IN_A_PASS: Final = 512


def chosen_layers(total: int, count: int) -> tuple[int, ...]:
    """Return which of ``total`` layers a student keeps: evenly spaced, with the first and the last.

    A single layer is the first, the only one that was trained on token embeddings as input.

    Raises:
        ValueError: ``count`` is under 1 or over ``total``.
    """
    if not 1 <= count <= total:
        raise ValueError(f"{count} layers of {total}")
    gaps = max(count - 1, 1)
    return tuple((2 * at * (total - 1) + gaps) // (2 * gaps) for at in range(count))


def build_student(
    config: DistillationConfig,
    teacher: SentenceTransformer,
    matrix: Floats,
    texts: Sequence[str],
    *,
    student_model: SentenceTransformer | None = None,
    vectors_of_tokens: Floats | None = None,
) -> SentenceTransformer:
    """Return the student that ``config`` asks for, untrained, on the CPU and in float32.

    Its vectors have a mean length of 1 before they are normalised, so that no term of the loss dominates
    the others. The same arguments give the same student. ``teacher`` is not changed.

    Args:
        config: the recipe.
        teacher: the model to learn from.
        matrix: the projection, shape (width, the teacher's width), orthonormal rows.
        texts: to learn from; a static student needs the frequencies of their tokens.
        student_model: the model to start from, for ``named``.
        vectors_of_tokens: returned by :func:`token_vectors`, for ``static``; None: computed here.

    Raises:
        ModelError: this kind of student cannot be built of the teacher or of the named model.
    """
    body: list[nn.Module]
    matrix = _widened(matrix, _output_width(teacher))
    if config.student == "static":
        if vectors_of_tokens is None:
            vectors_of_tokens = token_vectors(teacher, config.teacher)
        body = [_static(teacher, matrix, texts, vectors_of_tokens)]
    elif config.student == "named":
        if student_model is None:
            raise ModelError(str(config.student_model), "is to be learned by, and was not loaded")
        width = _output_width(student_model)
        body = [*_before_normalize(student_model), _dense(_random(len(matrix), width, config.seed))]
    elif config.student == "layers":
        body = [*_before_normalize(teacher), _dense(matrix)]
        _keep_layers(config.teacher, body[0], config.layers)
        _freeze_tokens(body[0])
    else:
        return _assembled([*copy.deepcopy(list(teacher)), _dense(matrix), Normalize()], teacher)
    student = _assembled([*body, Normalize()], student_model or teacher)
    _scale(student, body[-1], texts)
    return student


def outputs(student: SentenceTransformer, features: dict[str, Any]) -> torch.Tensor:
    """Return a student's output before it normalises: shape (texts, width)."""
    for module in list(student)[:-1]:
        features = module(features)
    found: torch.Tensor = features["sentence_embedding"]
    return found


def token_vectors(teacher: SentenceTransformer, name: str) -> Floats:
    """Return the teacher's unit vector of each single token: float32, shape (vocabulary, width).

    As in Model2Vec (Tulkens and van Dongen 2024), the token is between the tokenizer's special tokens.

    Raises:
        ModelError: the teacher has no fast tokenizer.
    """
    tokenizer = _fast_tokenizer(teacher, name)
    probe = tokenizer.encode("a")
    content = [at for at, special in enumerate(probe.special_tokens_mask) if not special]
    before, after = probe.ids[: content[0]], probe.ids[content[-1] + 1 :]
    alone = [
        np.array([*before, token, *after], dtype=np.int32) for token in range(tokenizer.get_vocab_size())
    ]
    reader, rows = StudentTokenizer(teacher, prompted=False), []
    with torch.inference_mode():
        for start in range(0, len(alone), TOKENS_IN_A_PASS):
            found = teacher(reader.features(alone[start : start + TOKENS_IN_A_PASS]))
            rows.append(
                nn.functional.normalize(found["sentence_embedding"].float(), dim=1).cpu().numpy()
            )
    return np.concatenate(rows)


def save_student(student: SentenceTransformer, folder: Path, half_precision: bool) -> None:
    """Write an ordinary sentence-transformers folder, without a model card.

    Args:
        student: the trained student.
        folder: created if it does not exist.
        half_precision: store the weights in float16. A transformer is still loaded as float32, so that
            its precision does not depend on how it was stored; the table of a static student is not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    student.save(str(folder), create_model_card=False, safe_serialization=True)
    if half_precision:
        for path in folder.rglob("*.safetensors"):
            halved = {
                name: tensor.half() if tensor.is_floating_point() else tensor
                for name, tensor in load_file(path).items()
            }
            save_file(halved, path, metadata={"format": "pt"})


def _assembled(modules: list[nn.Module], like: SentenceTransformer) -> SentenceTransformer:
    made = SentenceTransformer(
        modules=modules,
        device="cpu",
        prompts={name: text or "" for name, text in like.prompts.items()},
        # A prompt would only dilute a mean of token vectors; it is in the targets that they learn.
        default_prompt_name=None
        if isinstance(modules[0], StaticEmbedding)
        else like.default_prompt_name,
        similarity_fn_name=like.similarity_fn_name,
        trust_remote_code=False,
    )
    return made.float().eval()


def _output_width(model: SentenceTransformer) -> int:
    """Return the width of a model's vectors before they are cut to its ``truncate_dim``, if any."""
    with model.truncate_embeddings(None):
        return model.get_embedding_dimension() or 0


def _widened(matrix: Floats, width: int) -> Floats:
    """Return a projection of the first dimensions as one of ``width``; it drops the others."""
    widened: Floats = np.pad(matrix, ((0, 0), (0, max(0, width - matrix.shape[1]))))
    return widened


def _before_normalize(model: SentenceTransformer) -> list[nn.Module]:
    modules = list(model)
    while isinstance(modules[-1], Normalize):
        modules.pop()
    return copy.deepcopy(modules)


def _dense(matrix: Floats) -> Dense:
    width, input_width = matrix.shape
    weight = torch.from_numpy(np.array(matrix, dtype=np.float32))
    return Dense(input_width, width, bias=False, activation_function=nn.Identity(), init_weight=weight)


def _random(width: int, input_width: int, seed: int) -> Floats:
    """Return a random matrix with orthonormal rows, or columns where there are fewer of those."""
    drawn = np.random.default_rng(seed).normal(size=(width, input_width))
    left, _, right = np.linalg.svd(drawn, full_matrices=False)
    found: Floats = (left @ right).astype(np.float32)
    return found


def _keep_layers(name: str, transformer: Any, count: int | None) -> None:
    inner = getattr(transformer, "auto_model", None)
    total = getattr(getattr(inner, "config", None), "num_hidden_layers", None)
    lists = (
        [] if inner is None else [part for part in inner.modules() if isinstance(part, nn.ModuleList)]
    )
    found = next((layers for layers in lists if len(layers) == total), None)
    if inner is None or found is None or total is None:
        raise ModelError(name, "has no list of layers to choose from: take another kind of student")
    count = max(1, total // 2) if count is None else count
    if count > total:
        raise ModelError(name, f"has {total} layers, and the student is to have {count}")
    kept = chosen_layers(total, count)
    layers = [found[at] for at in kept]
    del found[len(layers) :]
    for at, layer in enumerate(layers):
        found[at] = layer
    inner.config.num_hidden_layers = len(layers)
    kinds = getattr(inner.config, "layer_types", None)
    if kinds:
        inner.config.layer_types = [kinds[at] for at in kept]


def _freeze_tokens(transformer: Any) -> None:
    """Exclude the token embeddings from training: they are half of the weights, and it gains nothing."""
    transformer.auto_model.get_input_embeddings().weight.requires_grad_(requires_grad=False)


def _scale(student: SentenceTransformer, module: Any, texts: Sequence[str]) -> None:
    """Scale the last linear module so that the mean length of the outputs is 1."""
    reader = StudentTokenizer(student)
    ids = [one for one in reader.ids(texts[:SAMPLE]) if len(one)]
    with torch.no_grad():
        length = outputs(student, reader.features(ids)).norm(dim=1).mean() if ids else torch.ones(())
        weight = module.embedding.weight if isinstance(module, StaticEmbedding) else module.linear.weight
        weight /= length


def _static(
    teacher: SentenceTransformer, matrix: Floats, texts: Sequence[str], vectors: Floats
) -> StaticEmbedding:
    tokenizer = _fast_tokenizer(teacher, "of the recipe")
    counts = np.zeros(len(vectors))
    for one in tokenizer.encode_batch(list(texts), add_special_tokens=False):
        np.add.at(counts, one.ids, 1)
    rarity = SIF / (SIF + counts / max(counts.sum(), 1))
    # Centred: what all tokens share carries no information, and would dominate a mean of them.
    table = (vectors - vectors.mean(axis=0)) @ matrix.T * rarity[:, None]
    return StaticEmbedding(tokenizer, embedding_weights=table.astype(np.float32))


def _fast_tokenizer(teacher: SentenceTransformer, name: str) -> Tokenizer:
    inner = getattr(teacher.tokenizer, "backend_tokenizer", None)
    if inner is None:
        raise ModelError(name, "has no fast tokenizer (tokenizer.json), which a static student needs")
    made = Tokenizer.from_str(inner.to_str())
    made.no_padding()
    made.no_truncation()
    return made
