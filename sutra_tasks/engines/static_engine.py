"""The engine for static models: a text's vector is the mean of its tokens' vectors; no transformer.

It loads the folders that sentence-transformers saves of a ``StaticEmbedding``, optionally followed by
linear ``Dense`` modules and ``Normalize``, and needs no torch. A linear map of a mean is the mean of the
mapped vectors, so ``Dense`` modules are applied once to the table of token vectors when it is loaded.

Measured on one core of an AMD EPYC, texts of 24 tokens, 384 dimensions, 64 in a batch: the mean takes
4 µs a text from a float32 table, gathered for the batch and added up text by text; 13 with
``np.add.reduceat``, 22 from a float16 table, which numpy converts slowly; 1.5 with torch's
``embedding_bag``, whose import takes 1 s and 200 MB. Tokenising takes 40, and 8 where
:mod:`sutra_tasks.engines.tokenizing.word_cache` knows all words.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from sutra_tasks.engines.encoder import ModelInfo, TokenizedText
from sutra_tasks.engines.model_files import module_kind, read_modules
from sutra_tasks.engines.tokenizing.slices import SLICE_CHARS, tokenize_in_slices
from sutra_tasks.engines.tokenizing.tokenizing_encoder import TokenizingEncoder, WholeTextIds
from sutra_tasks.engines.tokenizing.word_cache import WordCache, encode_ids, splits_at_spaces
from sutra_tasks.errors import ModelError
from sutra_tasks.vectors import finish

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

    from sutra_tasks.engines.offsets import Integers
    from sutra_tasks.vectors import Floats

__all__ = ["WINDOW", "StaticEncoder", "is_static"]

WINDOW: Final = 2**23
"""More tokens than a text can have with the default ``SUTRA_MAX_TEXT_CHARS``. A mean has no window, so
``truncate=True`` cuts nothing, as in sentence-transformers."""

NO_PROMPTS: Final = {"query": "", "document": ""}
"""Names that sentence-transformers knows for every model."""

SENTENCE: Final = "sentence_embedding"
DTYPES: Final = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1",
}  # fmt: skip
"""numpy's names of the types in a file of safetensors."""

GATHERED_TOKENS: Final = 2048
"""Vectors copied out of the table at a time; they fit into a processor's cache."""


def is_static(folder: Path) -> bool:
    """Return whether a folder has a sentence-transformers model that begins with ``StaticEmbedding``."""
    try:
        return module_kind(read_modules("", folder)[0]) == "StaticEmbedding"
    except (OSError, LookupError, ModelError):
        return False


class StaticEncoder(TokenizingEncoder):
    """One static model; ``encode`` uses one core."""

    def __init__(self, model: str, folder: Path) -> None:
        """Load a model.

        Args:
            model: its name.
            folder: its files; :func:`is_static` is true for it.

        Raises:
            ModelError: a file is missing or damaged, or the model has modules that are not supported.
        """
        try:
            parts = _read(model, folder)
        except ModelError:
            raise
        except ModuleNotFoundError as error:
            raise ModelError(model, f"needs {error.name}: pip install 'sutra-tasks[worker]'") from None
        except Exception as error:
            first_line = next(iter(str(error).splitlines()), "")[:200]
            raise ModelError(
                model,
                f"cannot be loaded ({type(error).__name__}: {first_line}). Save it with "
                "sentence-transformers, as safetensors and with a tokenizer.json.",
            ) from error
        super().__init__(
            parts.tokenizer,
            parts.prompts,
            parts.window,
            pools_prompt=True,
            default_prompt=parts.default_prompt,
        )
        if self._last_id >= len(parts.table) - 1:
            raise ModelError(
                model,
                f"its tokenizer gives ids up to {self._last_id}; it has {len(parts.table) - 1} vectors",
            )
        self._table, self._normalizes = parts.table, parts.normalizes
        # The last row, zeros, is the only token of a text without tokens.
        self._last_id = len(parts.table) - 1
        self._no_tokens = np.array([self._last_id], dtype=np.int32)
        self._words = WordCache(parts.tokenizer) if splits_at_spaces(parts.tokenizer) else None
        width = min(parts.table.shape[1], parts.truncate_dim or parts.table.shape[1])
        self.info = ModelInfo(
            model=model,
            space=f"static-{parts.fingerprint}:{width}",
            width=width,
            window=parts.window,
            prompts=parts.prompts,
            default_prompt=parts.default_prompt,
            weight_bytes=parts.table.nbytes,
            is_static=True,
            pools_mean=True,
        )

    def tokenize(self, texts: Sequence[str], prompt: str | None) -> list[TokenizedText]:
        """Return the token ids of whole texts, the same as sentence-transformers computes."""
        prefix = self._prefix(prompt)
        given = [prefix + text for text in texts] if prefix else texts
        short = [text for text in given if len(text) <= SLICE_CHARS]
        found = self._words(short) if self._words else encode_ids(self._tokenizer, short)
        ids = iter(_split_ids(found))
        return [
            self._whole(text, *tokenize_in_slices(self._tokenizer, text), len(prefix))
            if len(text) > SLICE_CHARS
            else self._whole(text, next(ids), None, len(prefix))
            for text in given
        ]

    def _whole(
        self,
        text: str,
        ids: NDArray[np.int32],
        spans: Integers | None,
        prompt_chars: int,
    ) -> TokenizedText:
        def characters() -> Integers:
            # Computed on request: only texts that are cut need their offsets.
            found = self._tokenizer.encode(text).offsets if spans is None else spans
            return np.array(found, dtype=np.int64).reshape(-1, 2)

        ids = ids if len(ids) else self._no_tokens
        return TokenizedText(len(ids), WholeTextIds(ids, 0, prompt_chars, characters))

    def encode(self, batch: Sequence[TokenizedText]) -> Floats:
        """Return the mean of each text's token vectors; all zeros for one without a token."""
        return self._means([text.content.ids for text in batch])

    def pool(self, text: TokenizedText, spans: Sequence[tuple[int, int]]) -> Floats:
        """Return the mean of each span's token vectors; a static model has no attention to others."""
        first = text.content.first
        return self._means([text.content.ids[first + start : first + stop] for start, stop in spans])

    def _means(self, parts: Sequence[NDArray[np.int32]]) -> Floats:
        rows = np.zeros((len(parts), self._table.shape[1]), dtype=np.float32)
        lengths = np.array([len(ids) for ids in parts])
        for block in _blocks(lengths.tolist(), GATHERED_TOKENS):
            if len(block) == 1:
                row, ids = rows[block.start], parts[block.start]
                for start in range(0, len(ids), GATHERED_TOKENS):
                    row += np.add.reduce(self._table[ids[start : start + GATHERED_TOKENS]], axis=0)
                continue
            vectors = self._table[np.concatenate(parts[block.start : block.stop])]
            start = 0
            for at in block:
                stop = start + len(parts[at])
                np.add.reduce(vectors[start:stop], axis=0, out=rows[at])
                start = stop
        rows /= lengths[:, None].astype(np.float32)
        # The model's own width is cut after its Normalize, as in sentence-transformers.
        return finish(rows, dimensions=None, normalize=self._normalizes)[:, : self.info.width]


def _split_ids(found: Sequence[bytes]) -> Iterator[NDArray[np.int32]]:
    """Yield the ids of each text as views of one array: faster than one array for each."""
    every = np.frombuffer(b"".join(found), dtype=np.int32)
    start = 0
    for one in found:
        stop = start + len(one) // every.itemsize
        yield every[start:stop]
        start = stop


def _blocks(lengths: Sequence[int], most_tokens: int) -> Iterator[range]:
    """Yield blocks of consecutive texts with up to ``most_tokens`` together; longer texts alone."""
    start, tokens = 0, 0
    for at, length in enumerate(lengths):
        if at > start and tokens + length > most_tokens:
            yield range(start, at)
            start, tokens = at, 0
        tokens += length
    if lengths:
        yield range(start, len(lengths))


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class _Parts:
    """The content of a model's folder; the last row of ``table`` is zeros, for texts without tokens."""

    tokenizer: Tokenizer
    window: int
    table: Floats
    normalizes: bool
    prompts: dict[str, str]
    default_prompt: str | None
    truncate_dim: int | None
    fingerprint: str


def _read(model: str, folder: Path) -> _Parts:
    from tokenizers import Tokenizer  # noqa: PLC0415 - the simulated engine does not need it

    first, *rest = read_modules(model, folder)
    place = folder / first["path"]
    described = json.loads((place / "tokenizer.json").read_text("utf-8"))
    window = int((described.pop("truncation", None) or {}).get("max_length", WINDOW))
    # No special tokens either: they have no meaning in a mean.
    described |= {"padding": None, "truncation": None, "post_processor": None}
    tokenizer = Tokenizer.from_str(json.dumps(described))
    if not tokenizer.encode("a").ids:
        raise ModelError(model, "its tokenizer gives no token for the letter a")
    settings = folder / "config_sentence_transformers.json"
    options = json.loads(settings.read_text("utf-8")) if settings.exists() else {}
    prompts = {name: text or "" for name, text in (options.get("prompts") or {}).items()}
    default_prompt = options.get("default_prompt_name")
    decides = [described, window, prompts, *([default_prompt] if default_prompt else [])]
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode())
    prompts = NO_PROMPTS | prompts
    if default_prompt is not None and default_prompt not in prompts:
        raise ModelError(model, f"its default prompt {default_prompt!r} is none of its prompts")
    table = _table(model, _tensors(place, digest))
    table = np.concatenate([table, np.zeros((1, table.shape[1]), dtype=np.float32)])
    normalizes = False
    for module in rest:
        if module_kind(module) == "Dense" and not normalizes:
            table = _mapped(model, folder / module["path"], table, digest)
        elif module_kind(module) == "Normalize":
            normalizes = True
        else:
            raise ModelError(model, f"a static model with {module.get('type')} cannot be served")
    digest.update(b"normalized" if normalizes else b"as it is")
    truncate_dim = options.get("truncate_dim")
    return _Parts(
        tokenizer,
        window,
        table,
        normalizes,
        prompts,
        default_prompt,
        None if truncate_dim is None else int(truncate_dim),
        digest.hexdigest()[:16],
    )


def _tensors(place: Path, digest: Any) -> dict[str, NDArray[Any]]:
    from safetensors import deserialize  # noqa: PLC0415 - the simulated engine does not need it

    read: Any = deserialize  # untyped
    stored = read((place / "model.safetensors").read_bytes())
    tensors = {name: _array(one) for name, one in stored}
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}:{tensor.dtype}{tensor.shape};".encode())
        digest.update(np.ascontiguousarray(tensor).view(np.uint8).data)
    return tensors


def _array(stored: Mapping[str, Any]) -> NDArray[Any]:
    """Return a tensor as safetensors describes it; bfloat16 is the upper half of a float32."""
    if stored["dtype"] == "BF16":
        halves = np.frombuffer(stored["data"], dtype="<u2").astype(np.uint32) << 16
        return halves.view(np.float32).reshape(stored["shape"])
    return np.frombuffer(stored["data"], dtype=DTYPES[stored["dtype"]]).reshape(stored["shape"])


def _table(model: str, tensors: Mapping[str, NDArray[Any]]) -> Floats:
    """Return the vector of each token id, of sentence-transformers' or model2vec's tensors."""
    table = tensors.get("embedding.weight", tensors.get("embeddings"))
    if table is None or table.ndim != 2:  # noqa: PLR2004 - a matrix
        raise ModelError(model, "its weights hold no matrix of token vectors")
    if "embedding.weight" not in tensors and "mapping" in tensors:
        table = table[tensors["mapping"].astype(np.int64)]
    table = table.astype(np.float32)
    if "embedding.weight" not in tensors and "weights" in tensors:
        table *= tensors["weights"].astype(np.float32)[:, None]
    return table


def _mapped(model: str, place: Path, table: Floats, digest: Any) -> Floats:
    """Return the table after a linear ``Dense`` module."""
    config = json.loads((place / "config.json").read_text("utf-8"))
    activation = str(config.get("activation_function", "the default"))
    if not activation.startswith("torch.nn.") or not activation.endswith(".Identity"):
        raise ModelError(model, f"a static model with {activation} cannot be served: it is not linear")
    names = {config.get(name) or SENTENCE for name in ("module_input_name", "module_output_name")}
    if names != {SENTENCE}:
        raise ModelError(model, f"its Dense module works on {', '.join(sorted(names - {SENTENCE}))}")
    tensors = {name: tensor.astype(np.float32) for name, tensor in _tensors(place, digest).items()}
    digest.update(b"residual" if config.get("use_residual") else b"linear")
    matrix = tensors["linear.weight"]
    if config.get("use_residual"):
        matrix = matrix + tensors.get("residual.weight", np.eye(len(matrix), dtype=np.float32))
    mapped: Floats = table @ matrix.T
    return mapped + tensors["linear.bias"] if "linear.bias" in tensors else mapped
