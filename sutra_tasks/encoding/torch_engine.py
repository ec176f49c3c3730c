"""The engine on torch: a sentence-transformers model, fed token ids.

Pooling, projection and the model's own normalisation are sentence-transformers'. Tokenising is done
apart from it, in the task's thread, so that it overlaps computing and a batch can be planned in
tokens; a probe at load time holds the ids against what sentence-transformers would have fed itself.
"""

from __future__ import annotations

import hashlib
import json
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer

from sutra_tasks.encoding.batching import is_out_of_memory
from sutra_tasks.encoding.encoder import Card, TokenizedText
from sutra_tasks.encoding.models import locate
from sutra_tasks.errors import ModelError

if TYPE_CHECKING:
    from sutra_tasks.vectors import Floats

__all__ = ["TorchEncoder", "dtype_for"]

PROBES = ("a", "Two words. And a second sentence, with a few more.")


def dtype_for(device: str, capability: tuple[int, int] | None) -> torch.dtype:
    """Choose the precision: half on a GPU that computes it, float32 elsewhere.

    bfloat16 needs compute capability 8.0; below it float16. On CPU float32: the vectors then agree
    with sentence-transformers to 0.99999, which bfloat16 does not reach.
    """
    if device.startswith("cuda") and capability is not None:
        return torch.bfloat16 if capability >= (8, 0) else torch.float16
    return torch.float32


class TorchEncoder:
    """One sentence-transformers model on one torch device."""

    def __init__(
        self, model: str, *, device: str = "cpu", threads: int = 1, memory_share: float = 1.0
    ) -> None:
        torch.set_num_threads(threads)
        self._model = _load(model)
        self._device = torch.device(device)
        self._tokenizer, self._pad_id, self._pad_left = _thread_safe_tokenizer(model, self._model)
        width = self._model.get_embedding_dimension()
        if width is None:
            raise ModelError(model, "does not say how wide its vectors are")
        prompts = {name: text or "" for name, text in self._model.prompts.items()}
        self.card = Card(
            model=model,
            space=f"{_fingerprint(self._model, self._tokenizer, prompts)}:{width}",
            width=width,
            window=_window(self._model),
            prompts=prompts,
        )
        self._excludes_prompt = any(
            getattr(module, "include_prompt", True) is False for module in self._model
        )
        self._inputs = set(self._model.tokenizer.model_input_names)
        self._refuse_other_ids(model)
        capability = (
            torch.cuda.get_device_capability(self._device) if device.startswith("cuda") else None
        )
        if capability is not None and memory_share < 1:
            torch.cuda.set_per_process_memory_fraction(memory_share, self._device)
        self._model.to(self._device, dtype_for(device, capability)).eval()

    def tokenize(self, texts: Sequence[str], prompt: str | None) -> list[TokenizedText]:
        """Return token ids, cut at the window as sentence-transformers cuts them."""
        prefix = self.card.prompts[prompt] if prompt else ""
        # encode_batch is thread-safe on a tokenizer nobody reconfigures, and releases the GIL.
        encoded = self._tokenizer.encode_batch([prefix + text for text in texts] if prefix else texts)
        prompt_tokens = self._prompt_tokens(prefix) if prefix and self._excludes_prompt else 0
        return [
            TokenizedText(len(item.ids), bool(item.overflowing), (item.ids, prompt_tokens))
            for item in encoded
        ]

    def encode(self, batch: Sequence[TokenizedText]) -> Floats:
        """Run the model; rows come back in the order of ``batch``."""
        rows = np.empty((len(batch), self.card.width), dtype=np.float32)
        # One pass, but where pooling leaves the prompt out: it takes one prompt length a pass.
        for prompt_tokens in {text.content[1] for text in batch}:
            where = [row for row, text in enumerate(batch) if text.content[1] == prompt_tokens]
            try:
                rows[where] = self._forward([batch[row] for row in where], prompt_tokens)
            except Exception as error:
                if is_out_of_memory(error):
                    _free_memory(error)
                raise
        return rows

    def _forward(self, batch: Sequence[TokenizedText], prompt_tokens: int) -> Floats:
        with torch.inference_mode():
            features: dict[str, Any] = {
                name: tensor.to(self._device) for name, tensor in self._features(batch).items()
            }
            if prompt_tokens:
                features["prompt_length"] = prompt_tokens
            pooled: Floats = self._model(features)["sentence_embedding"].float().cpu().numpy()
        return pooled

    def _features(self, batch: Sequence[TokenizedText]) -> dict[str, Any]:
        lengths = np.array([text.tokens for text in batch])
        longest = int(lengths.max())
        ids = np.full((len(batch), longest), self._pad_id, dtype=np.int64)
        mask = np.zeros((len(batch), longest), dtype=np.int64)
        for row, text in enumerate(batch):
            where = slice(longest - text.tokens, longest) if self._pad_left else slice(text.tokens)
            ids[row, where] = text.content[0]
            mask[row, where] = 1
        features = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        if "token_type_ids" in self._inputs:
            features["token_type_ids"] = torch.zeros_like(features["input_ids"])
        return features

    def _prompt_tokens(self, prefix: str) -> int:
        # As sentence-transformers counts them: without the closing special token.
        return len(self._tokenizer.encode(prefix).ids) - 1

    def _refuse_other_ids(self, model: str) -> None:
        """Check that our features are those sentence-transformers would have made."""
        ours = self._features(self.tokenize(PROBES, None))
        theirs = self._model.preprocess(list(PROBES))
        for name, tensor in ours.items():
            other = theirs.get(name)
            if other is None or not torch.equal(tensor, other):
                raise ModelError(model, f"its {name} differ from sentence-transformers' own")


def _free_memory(error: Exception) -> None:
    """Give back what a pass that failed has allocated, and what torch keeps for the next."""
    # Its tensors live in the frames of the traceback, and the cache gives back only what is unused.
    traceback.clear_frames(error.__traceback__)
    torch.cuda.empty_cache()


def _load(model: str) -> SentenceTransformer:
    try:
        return SentenceTransformer(locate(model), device="cpu", trust_remote_code=False)
    except (OSError, ValueError, RuntimeError) as error:
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(
            model,
            f"cannot be loaded: {first_line} Give a folder, a name sentence-transformers knows, "
            "or leave SUTRA_MODEL unset for the packaged all-MiniLM-L6-v2.",
        ) from error


def _window(model: SentenceTransformer) -> int:
    return int(model.max_seq_length or model.tokenizer.model_max_length)


def _thread_safe_tokenizer(name: str, model: SentenceTransformer) -> tuple[Tokenizer, int, bool]:
    """Copy the tokenizer: transformers reconfigures its own at every call, and threads would meet."""
    theirs = model.tokenizer
    if not getattr(theirs, "is_fast", False):
        raise ModelError(name, "has no fast tokenizer (tokenizer.json)")
    ours = Tokenizer.from_str(theirs.backend_tokenizer.to_str())
    ours.no_padding()
    ours.enable_truncation(_window(model), strategy="longest_first")
    return ours, int(theirs.pad_token_id or 0), theirs.padding_side == "left"


def _fingerprint(model: SentenceTransformer, tokenizer: Tokenizer, prompts: dict[str, str]) -> str:
    """Hash what decides a vector's meaning: weights, tokenizer, modules and prompts.

    Taken from the loaded model before any change of precision, so a folder, a cache and a package
    with the same model name the same space.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).contiguous().view(torch.uint8).numpy().data)
    digest.update(tokenizer.to_str().encode())
    for module in model:
        describe: Any = getattr(module, "get_config_dict", dict)
        described = json.dumps(describe(), sort_keys=True, default=str)
        digest.update(f"{type(module).__name__}:{described}".encode())
    digest.update(json.dumps(prompts, sort_keys=True).encode())
    return digest.hexdigest()[:16]
