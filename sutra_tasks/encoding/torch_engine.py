"""The engine on torch: a sentence-transformers model, fed token ids.

Pooling, projection and the model's own normalisation are sentence-transformers'. Tokenising is done
apart from it, in the task's thread, so that it overlaps computing and a batch can be planned in
tokens; a probe at load time holds the ids against what sentence-transformers would have fed itself.
"""

from __future__ import annotations

import base64
import hashlib
import json
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Encoding, Tokenizer

from sutra_tasks.documents.chunking import Offsets
from sutra_tasks.encoding.attention import forbid_hub_kernels, probe_batches
from sutra_tasks.encoding.batching import is_out_of_memory
from sutra_tasks.encoding.encoder import Card, TokenizedText
from sutra_tasks.encoding.models import locate
from sutra_tasks.encoding.passes import Passes
from sutra_tasks.errors import CorruptMessageError, ModelError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sutra_tasks.vectors import Floats

__all__ = ["TorchEncoder"]

PROBES = ("a", "Two words. And a second sentence, with a few more.")


@dataclass(frozen=True, slots=True, eq=False)
class _Row:
    """What the model sees of a text; pooling leaves out the first ``prompt_tokens``.

    In a window its own tokens begin at ``first``, behind special tokens and prompt.
    """

    ids: NDArray[np.int32]
    prompt_tokens: int
    first: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class _Text:
    """A whole text, its prompt in front; as a row it is what the model sees."""

    ids: NDArray[np.int32]
    prompt_tokens: int
    encoding: Encoding
    prompt_chars: int


class TorchEncoder:
    """One sentence-transformers model on one torch device."""

    def __init__(
        self,
        model: str,
        *,
        device: str = "cpu",
        threads: int = 1,
        memory_share: float = 1.0,
        attention: str = "auto",
        dtype: str = "auto",
    ) -> None:
        torch.set_num_threads(threads)
        self._model = _load(model)
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
        special = self._tokenizer.encode(PROBES[0]).special_tokens_mask
        self._specials_before = special.index(0)
        self._specials_after = special[::-1].index(0)
        self._vocabulary = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self._refuse_other_ids(model)
        if device.startswith("cuda") and memory_share < 1:
            torch.cuda.set_per_process_memory_fraction(memory_share, torch.device(device))
        self._passes = Passes(
            model,
            self._model,
            torch.device(device),
            [self._features(batch) for batch in probe_batches(self)],
            attention=attention,
            dtype=dtype,
        )
        self.attention = self._passes.choice

    def tokenize(self, texts: Sequence[str], prompt: str | None) -> list[TokenizedText]:
        """Return the token ids of whole texts, as sentence-transformers makes them."""
        prefix = self.card.prompts[prompt] if prompt else ""
        # encode_batch is thread-safe on a tokenizer nobody reconfigures, and releases the GIL.
        encoded = self._tokenizer.encode_batch([prefix + text for text in texts] if prefix else texts)
        prompt_tokens = self._prompt_tokens(prefix) if prefix and self._excludes_prompt else 0
        return [
            TokenizedText(
                len(item), _Text(np.array(item.ids, np.int32), prompt_tokens, item, len(prefix))
            )
            for item in encoded
        ]

    def offsets(self, text: TokenizedText) -> Offsets:
        """Return where the tokens of a whole text stand in it."""
        whole: _Text = text.content
        first, end = self._first_token(whole), text.tokens - self._specials_after
        spans = np.array(whole.encoding.offsets, dtype=np.int64)[first:end]
        # A token may begin with the prompt's last characters.
        starts, ends = np.maximum(spans - whole.prompt_chars, 0).reshape(-1, 2).T
        return Offsets(starts, ends)

    def windows(
        self, text: TokenizedText, offsets: Offsets, spans: Sequence[tuple[int, int]]
    ) -> list[TokenizedText]:
        """Return windows over the ids of a whole text, each with its special tokens and prompt."""
        whole: _Text = text.content
        first = self._first_token(whole)
        before, after = whole.ids[:first], whole.ids[first + len(offsets) :]
        rows = []
        for start, stop in spans:
            ids = np.concatenate([before, whole.ids[first + start : first + stop], after])
            rows.append(TokenizedText(len(ids), _Row(ids, whole.prompt_tokens, first)))
        return rows

    def pool(self, text: TokenizedText, spans: Sequence[tuple[int, int]]) -> Floats:
        """Run the transformer once, and pooling with all that follows for each span."""
        states = self._passes(self._features([text]))["token_embeddings"][0].float()
        first = text.content.first
        parts = [states[first + start : first + stop] for start, stop in spans]
        lengths = torch.tensor([len(part) for part in parts], device=states.device)
        padded = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
        places = torch.arange(padded.shape[1], device=states.device)
        features: dict[str, Any] = {
            "token_embeddings": padded,
            "attention_mask": (places < lengths[:, None]).to(torch.int64),
        }
        with torch.inference_mode():
            for module in list(self._model)[1:]:
                features = module(features)
        pooled: Floats = features["sentence_embedding"].float().cpu().numpy()
        return pooled

    def check_pool(self) -> None:
        """Refuse a model that does not take the mean of its tokens' states.

        Raises:
            ModelError: it does something else.
        """
        modes = [getattr(module, "pooling_mode", None) for module in list(self._model)[1:]]
        if [mode for mode in modes if mode is not None] != ["mean"]:
            raise ModelError(
                self.card.model, "SUTRA_CHUNKING=late needs a model that takes the mean of its tokens"
            )

    def pack(self, batch: Sequence[TokenizedText]) -> dict[str, Any]:
        """Return the ids as base64 of little-endian int32, one row after the other."""
        ids = np.concatenate([text.content.ids for text in batch]).astype("<i4")
        return {
            "tokens": [text.tokens for text in batch],
            "prompt_tokens": [text.content.prompt_tokens for text in batch],
            "ids": base64.b64encode(ids.tobytes()).decode("ascii"),
        }

    def unpack(self, packed: Mapping[str, Any]) -> list[TokenizedText]:
        """Return what was packed.

        Raises:
            CorruptMessageError: it is something else, or holds ids this model does not have.
        """
        try:
            ids = np.frombuffer(base64.b64decode(packed["ids"], validate=True), dtype="<i4")
            stops = np.cumsum(packed["tokens"])
            rows = [
                TokenizedText(len(part), _Row(part, int(prompt_tokens)))
                for part, prompt_tokens in zip(
                    np.split(ids, stops[:-1]), packed["prompt_tokens"], strict=True
                )
            ]
            known = len(ids) == stops[-1] and ids.min() >= 0 and ids.max() < self._vocabulary
            fit = all(0 < row.tokens <= self.card.window for row in rows)
        except (KeyError, IndexError, TypeError, ValueError):
            raise CorruptMessageError("the token ids of a part") from None
        if not (known and fit):
            raise CorruptMessageError("the token ids of a part")
        return rows

    def encode(self, batch: Sequence[TokenizedText]) -> Floats:
        """Run the model; rows come back in the order of ``batch``."""
        rows = np.empty((len(batch), self.card.width), dtype=np.float32)
        # One pass, but where pooling leaves the prompt out: it takes one prompt length a pass.
        for prompt_tokens in {text.content.prompt_tokens for text in batch}:
            where = [
                row for row, text in enumerate(batch) if text.content.prompt_tokens == prompt_tokens
            ]
            try:
                rows[where] = self._forward([batch[row] for row in where], prompt_tokens)
            except Exception as error:
                if is_out_of_memory(error):
                    _free_memory(error)
                raise
        return rows

    def _forward(self, batch: Sequence[TokenizedText], prompt_tokens: int) -> Floats:
        features = self._features(batch)
        if prompt_tokens:
            features["prompt_length"] = prompt_tokens
        pooled: Floats = self._passes(features)["sentence_embedding"].float().cpu().numpy()
        return pooled

    def _features(self, batch: Sequence[TokenizedText]) -> dict[str, Any]:
        lengths = np.array([text.tokens for text in batch])
        longest = int(lengths.max())
        ids = np.full((len(batch), longest), self._pad_id, dtype=np.int64)
        mask = np.zeros((len(batch), longest), dtype=np.int64)
        for row, text in enumerate(batch):
            where = slice(longest - text.tokens, longest) if self._pad_left else slice(text.tokens)
            ids[row, where] = text.content.ids
            mask[row, where] = 1
        features = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        if "token_type_ids" in self._inputs:
            features["token_type_ids"] = torch.zeros_like(features["input_ids"])
        return features

    def _prompt_tokens(self, prefix: str) -> int:
        # As sentence-transformers counts them: without the closing special token.
        return len(self._tokenizer.encode(prefix).ids) - 1

    def _first_token(self, whole: _Text) -> int:
        """Return where a text's own tokens begin, behind special tokens and prompt."""
        at = self._specials_before
        while whole.prompt_chars:
            span = whole.encoding.token_to_chars(at)
            if span is None or span[1] > whole.prompt_chars:
                break
            at += 1
        return at

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
    forbid_hub_kernels()
    try:
        return SentenceTransformer(
            locate(model),
            device="cpu",
            trust_remote_code=False,
            # What a probe holds all others against; a model's own wish might download a kernel.
            model_kwargs={"attn_implementation": "eager"},
        )
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
    ours.no_truncation()
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
