"""Checks the files of a model's folder before a library loads them: one sentence names what is wrong.

sentence-transformers goes on with a folder that lacks modules.json, and gives other vectors. Its errors,
and those of the libraries that read weights and tokenizers, name many things, and seldom the file.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from sutra_tasks.errors import ModelError

__all__ = ["check_files", "module_kind", "read_modules"]

OURS: Final = "sentence_transformers"
MODULES: Final = "modules.json"
CONFIG: Final = "config.json"
OF_SENTENCE_TRANSFORMERS: Final = (
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "1_Pooling",
)
"""A folder with one of these was saved by sentence-transformers, which writes modules.json as well."""

WEIGHTS: Final = (
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.bin",
)
TOKENIZERS: Final = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spm.model",
    "tekken.json",
)
NEEDED: Final[Mapping[str, tuple[tuple[str, ...], ...]]] = {
    "Transformer": (("config.json", "adapter_config.json"), WEIGHTS, TOKENIZERS),
    "StaticEmbedding": (WEIGHTS, ("tokenizer.json",)),
    "Pooling": (("config.json",),),
    "Dense": (("config.json",), WEIGHTS),
}
"""The files that a module needs, by its class; of each group one is enough."""

READ_AS_JSON: Final = frozenset(
    {
        "adapter_config.json",
        "added_tokens.json",
        "config.json",
        "config_sentence_transformers.json",
        "preprocessor_config.json",
        "processor_config.json",
        "sentence_bert_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    }
)
"""Files that sentence-transformers and transformers read, if they are there."""

POINTER: Final = b"version https://git-lfs"
"""How a file begins that Git left on its server."""

WIDTHS: Final = ("embedding_dimension", "word_embedding_dimension")
AGAIN: Final = "Copy the model's folder again, whole."
BLOCK_BYTES: Final = 1 << 22
HEADER_LENGTH: Final = struct.Struct("<Q")


def check_files(model: str, folder: Path) -> None:
    """Raise an error if a model cannot be loaded from a folder.

    Reads every file of weights once. Storage that hangs holds up this thread only, because the reads
    release Python's lock; the libraries map the files into memory, and a page that does not come would
    stop the whole process.

    Raises:
        ModelError: a file is missing, damaged or not readable; it names the file.
    """
    with _readable(model, folder):
        os.scandir(folder).close()
        _check_kind(model, folder)
        for module in read_modules(model, folder):
            kind, place = module_kind(module), folder / str(module.get("path", ""))
            if kind is None:
                raise ModelError(
                    model,
                    f"its module {module.get('type')} is code of its own (trust_remote_code), which "
                    "workers never run. Take a model of sentence-transformers' own modules.",
                )
            _check_module(model, folder, place, kind)


def read_modules(model: str, folder: Path) -> list[dict[str, Any]]:
    """Return the modules in a folder, as modules.json lists them; a plain transformer is one of them.

    Raises:
        ModelError: it is missing from a folder that had one, or damaged.
        OSError: it cannot be read.
    """
    if not (folder / MODULES).exists():
        config = _json(model, folder, folder / CONFIG) if (folder / CONFIG).exists() else None
        if isinstance(config, dict) and config.get("model_type") == "model2vec":
            # As model2vec saves it, without what sentence-transformers needs to load it by itself.
            normalize = ["Normalize"] if config.get("normalize") else []
            return [{"type": f"{OURS}.{kind}", "path": ""} for kind in ("StaticEmbedding", *normalize)]
        beside = next((name for name in OF_SENTENCE_TRANSFORMERS if (folder / name).exists()), None)
        if beside is not None:
            raise ModelError(model, f"{folder} has {beside} and lacks {MODULES}. {AGAIN}")
        return [{"type": f"{OURS}.Transformer", "path": ""}]
    found = _json(model, folder, folder / MODULES)
    if not isinstance(found, list) or not all(
        isinstance(one, dict) and isinstance(one.get("type"), str) and isinstance(one.get("path"), str)
        for one in found
    ):
        raise ModelError(model, f"{folder / MODULES} is no list of modules with type and path. {AGAIN}")
    return found


def module_kind(module: Mapping[str, Any]) -> str | None:
    """Return the class name of a module of sentence-transformers; None for any other."""
    package, _, kind = str(module["type"]).rpartition(".")
    return kind if package.partition(".")[0] == OURS else None


def _check_kind(model: str, folder: Path) -> None:
    """Refuse models that are none of embeddings: sentence-transformers would convert them to a mean."""
    path = folder / OF_SENTENCE_TRANSFORMERS[0]
    if path.exists():
        config = _json(model, folder, path)
        kind = config.get("model_type") if isinstance(config, dict) else None
        if kind not in {None, "SentenceTransformer"}:
            raise ModelError(
                model, f"{folder} holds a {kind}, and workers serve SentenceTransformer models"
            )


def _check_module(model: str, folder: Path, place: Path, kind: str) -> None:
    for names in NEEDED.get(kind, ()):
        if not any((place / name).exists() for name in names):
            what = f"{names[0]} or its like" if len(names) > 1 else names[0]
            raise ModelError(model, f"{folder} lacks {(place / what).relative_to(folder)}. {AGAIN}")
    if not place.is_dir():  # of a module that needs no file, such as Normalize
        return
    for path in sorted(place.iterdir()):  # folders of models hold other files as well, in any state
        if path.name in WEIGHTS and path.suffix != ".json":
            _check_weights(model, folder, path)
        elif path.name in READ_AS_JSON or path.name in WEIGHTS:
            described = _json(model, folder, path)
            if path.name in WEIGHTS:
                _check_index(model, folder, path, described)
            elif kind == "Pooling" and path.name == "config.json":
                _check_pooling(model, path, described)


def _check_pooling(model: str, path: Path, config: Any) -> None:
    if not isinstance(config, dict) or not any(name in config for name in WIDTHS):
        raise ModelError(model, f"{path} has no {WIDTHS[0]}. {AGAIN}")


def _check_index(model: str, folder: Path, path: Path, index: Any) -> None:
    """Check the files of weights that an index names."""
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict):
        raise ModelError(model, f"{path} is no index of weights. {AGAIN}")
    for shard in sorted(set(map(str, shards.values()))):
        if not (path.parent / shard).is_file():
            raise ModelError(model, f"{path.parent} lacks {shard}, which {path.name} names. {AGAIN}")
        _check_weights(model, folder, path.parent / shard)


def _check_weights(model: str, folder: Path, path: Path) -> None:
    """Read a file of weights through, and compare its length with its header, if it has one."""
    with _opened(model, folder, path) as file:
        start = file.read(HEADER_LENGTH.size)
        expected = 0
        if path.suffix == ".safetensors":
            try:
                (header_bytes,) = HEADER_LENGTH.unpack(start)
                header = json.loads(file.read(min(header_bytes, path.stat().st_size)))
                tensors = [one for name, one in header.items() if name != "__metadata__"]
                expected = max((one["data_offsets"][1] for one in tensors), default=0)
            except (struct.error, ValueError, LookupError, TypeError, AttributeError, RecursionError):
                raise ModelError(
                    model, f"{path} is damaged: it has no header of weights. {AGAIN}"
                ) from None
        length = 0
        while block := file.read(BLOCK_BYTES):
            length += len(block)
    if path.suffix == ".safetensors" and length != expected:
        raise ModelError(
            model, f"{path} has {length:,} bytes of weights, and its header says {expected:,}. {AGAIN}"
        )


def _json(model: str, folder: Path, path: Path) -> Any:
    with _opened(model, folder, path) as file:
        try:
            return json.loads(file.read())
        except (ValueError, RecursionError):
            raise ModelError(model, f"{path} is not JSON: it is damaged. {AGAIN}") from None


@contextmanager
def _opened(model: str, folder: Path, path: Path) -> Iterator[Any]:
    with _readable(model, folder):
        if not path.is_file():  # opening a pipe would wait for its writer
            raise ModelError(model, f"{path} is not a plain file. {AGAIN}")
        with path.open("rb") as file:
            if file.peek(len(POINTER)).startswith(POINTER):
                raise ModelError(
                    model, f"{path} is a pointer of Git LFS and not the file: run `git lfs pull` there"
                )
            yield file


@contextmanager
def _readable(model: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ModelError(
            model,
            f"{error.filename or folder} cannot be read: {error.strerror or error}. May this user read "
            "it, and is its storage there?",
        ) from error
