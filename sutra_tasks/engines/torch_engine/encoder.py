"""The engine for sentence-transformers models on torch.

Pooling, projection and normalisation are sentence-transformers'. Texts are tokenised before, in the
task's thread, so that tokenising overlaps computing, and batches are planned in tokens. When a model is
loaded, the token ids are compared with those that sentence-transformers would compute.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from sentence_transformers.sentence_transformer.modules import Pooling

from sutra_tasks.engines.encoder import ModelInfo, TokenizedText
from sutra_tasks.engines.model_folder import locate
from sutra_tasks.engines.out_of_memory import is_out_of_memory
from sutra_tasks.engines.tokenizing.tokenizing_encoder import TokenizingEncoder
from sutra_tasks.engines.torch_engine.facts import fingerprint, pools_mean, width_of
from sutra_tasks.engines.torch_engine.forward_pass import ForwardPass
from sutra_tasks.engines.torch_engine.introspection import probe_batches, transformer_of
from sutra_tasks.engines.torch_engine.modules import in_a_line, load_modules, thread_safe_tokenizer
from sutra_tasks.engines.torch_engine.window import window_of
from sutra_tasks.errors import ModelError

if TYPE_CHECKING:
    from sutra_tasks.vectors import Floats

__all__ = ["TorchEncoder", "split_by_tokens"]

CPU_TOKENS: Final = 1024
"""Padded tokens in one forward pass on a CPU: more need more memory, and are not faster."""

PROBES: Final = ("a", "Two words. And a second sentence, with a few more.")


class TorchEncoder(TokenizingEncoder):
    """One sentence-transformers model on one torch device."""

    def __init__(
        self,
        model: str,
        *,
        folder: str | None = None,
        device: str = "cpu",
        threads: int = 1,
        memory_share: float = 1.0,
        attention: str = "auto",
        dtype: str = "auto",
    ) -> None:
        torch.set_num_threads(threads)
        self._model = load_modules(model, folder or locate(model))
        theirs = self._model.tokenizer
        self._pad_id = int(theirs.pad_token_id)
        tokenizer = thread_safe_tokenizer(model, theirs)
        width = width_of(model, self._model)
        prompts = {name: text or "" for name, text in self._model.prompts.items()}
        default_prompt = self._model.default_prompt_name
        self.info = ModelInfo(
            model=model,
            space=f"{fingerprint(self._model, tokenizer, prompts, default_prompt)}:{width}",
            width=width,
            window=window_of(self._model),
            prompts=prompts,
            default_prompt=default_prompt,
            keeps_end=theirs.truncation_side == "left",
            pools_mean=pools_mean(self._model),
        )
        pools_all = all(getattr(module, "include_prompt", True) for module in self._model)
        try:
            super().__init__(
                tokenizer,
                prompts,
                self.info.window,
                pools_prompt=pools_all,
                default_prompt=default_prompt,
            )
        except ValueError as error:
            raise ModelError(model, str(error)) from None
        (shortest,) = self.tokenize(["a"], None)
        if shortest.tokens > self.info.window:
            raise ModelError(
                model,
                f"its window of {self.info.window} tokens holds no word beside {shortest.tokens - 1} "
                "tokens that are special or of its default prompt",
            )
        self._inputs = set(theirs.model_input_names)
        self._refuse_unknown_ids(model)
        self._refuse_other_ids(model)
        if device.startswith("cuda") and memory_share < 1:
            torch.cuda.set_per_process_memory_fraction(memory_share, torch.device(device))
        self._forward_pass = ForwardPass(
            model,
            self._model,
            torch.device(device),
            [self._features(batch) for batch in probe_batches(self)],
            attention=attention,
            dtype=dtype,
        )
        self.attention = self._forward_pass.choice
        # In the precision that was chosen, which may not be that of the files.
        weights = sum(weight.numel() * weight.element_size() for weight in self._model.parameters())
        self.info = replace(self.info, weight_bytes=weights)
        self._on_cpu = device == "cpu"
        self._of_nothing = self._vector_of_nothing(shortest)

    def pool(self, text: TokenizedText, spans: Sequence[tuple[int, int]]) -> Floats:
        """Run the transformer once, and the modules after it for each span."""
        with _freed_when_full():
            return self._pool(text, spans)

    def _pool(self, text: TokenizedText, spans: Sequence[tuple[int, int]]) -> Floats:
        states = self._forward_pass(self._features([text]))["token_embeddings"][0]
        first = text.content.first
        parts = [states[first + start : first + stop] for start, stop in spans]
        lengths = torch.tensor([len(part) for part in parts], device=states.device)
        padded = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
        places = torch.arange(padded.shape[1], device=states.device)
        features: dict[str, Any] = {
            "token_embeddings": padded,
            "attention_mask": (places < lengths[:, None]).to(torch.int64),
        }
        return self._rows(self._forward_pass.pool(features))

    def encode(self, batch: Sequence[TokenizedText]) -> Floats:
        """Run the model; rows come back in the order of ``batch``."""
        rows = np.empty((len(batch), self.info.width), dtype=np.float32)
        rows[[at for at, text in enumerate(batch) if not text.tokens]] = self._of_nothing
        # Where pooling leaves out the prompt, one forward pass takes only one length of prompt.
        for prompt_tokens in {text.content.prompt_tokens for text in batch}:
            where = [
                at
                for at, text in enumerate(batch)
                if text.tokens and text.content.prompt_tokens == prompt_tokens
            ]
            where.sort(key=lambda at: batch[at].tokens)
            lengths = [batch[at].tokens for at in where]
            for part in split_by_tokens(lengths, CPU_TOKENS) if self._on_cpu else [range(len(where))]:
                indices = where[part.start : part.stop]
                with _freed_when_full():
                    rows[indices] = self._forward([batch[at] for at in indices], prompt_tokens)
        return rows

    def _forward(self, batch: Sequence[TokenizedText], prompt_tokens: int) -> Floats:
        features = self._features(batch)
        if prompt_tokens:
            features["prompt_length"] = prompt_tokens
        return self._rows(self._forward_pass(features))

    def _rows(self, outputs: dict[str, Any]) -> Floats:
        rows: Floats = outputs["sentence_embedding"].float().cpu().numpy()
        return rows[:, : self.info.width]

    def _features(self, batch: Sequence[TokenizedText]) -> dict[str, Any]:
        lengths = np.array([text.tokens for text in batch])
        longest = int(lengths.max())
        ids = np.full((len(batch), longest), self._pad_id, dtype=np.int64)
        mask = np.zeros((len(batch), longest), dtype=np.int64)
        # On the right, also where the tokenizer pads on the left: there some models count positions from
        # the padding, so that a vector would depend on its batch. Pooling goes by the mask.
        for row, text in enumerate(batch):
            ids[row, : text.tokens] = text.content.ids
            mask[row, : text.tokens] = 1
        features = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        if "token_type_ids" in self._inputs:
            features["token_type_ids"] = torch.zeros_like(features["input_ids"])
        return features

    def _vector_of_nothing(self, text: TokenizedText) -> Floats:
        """Return the vector of a text without a token, on which no transformer runs: shape (1, width).

        Args:
            text: any; its states have the shape and the precision of states.
        """
        outputs = self._forward_pass(self._features([text]))
        self._check_width(outputs["sentence_embedding"].shape[-1])
        states = outputs.get("token_embeddings")
        if states is None or not any(isinstance(module, Pooling) for module in self._model):
            return np.zeros((1, self.info.width), dtype=np.float32)
        mask = torch.zeros((1, 1), dtype=torch.int64, device=states.device)
        pooled = self._forward_pass.pool(
            {"token_embeddings": torch.zeros_like(states[:1, :1]), "attention_mask": mask}
        )
        return np.nan_to_num(self._rows(pooled), nan=0.0, posinf=0.0, neginf=0.0)

    def _refuse_unknown_ids(self, model: str) -> None:
        """Raise a ModelError if words of the tokenizer have no embedding: on a GPU they would end it."""
        inner = transformer_of(self._model)
        table: Any = inner.get_input_embeddings() if inner is not None else None
        rows = getattr(table, "num_embeddings", None)
        last = max(self._tokenizer.get_vocab(with_added_tokens=False).values())
        if rows is not None and last >= rows:
            raise ModelError(
                model,
                f"its tokenizer gives ids up to {last}, and it has {rows} embeddings of tokens. Is the "
                "tokenizer of another model?",
            )

    def _check_width(self, found: int) -> None:
        """Raise a ModelError if the model's vectors are not as wide as its modules say."""
        with self._model.truncate_embeddings(None):
            said = self._model.get_embedding_dimension()
        if found != said:
            raise ModelError(
                self.info.model,
                f"its modules say that its vectors have {said} numbers, and they have {found}. Is the "
                "config.json of its Pooling or Dense of another model?",
            )

    def _refuse_other_ids(self, model: str) -> None:
        """Raise a ModelError if sentence-transformers would compute other token ids."""
        for text in PROBES:
            (whole,) = self.tokenize([text], "")
            if whole.tokens > self.info.window:
                continue
            ours = self._features([whole])
            try:
                theirs = self._model.preprocess([text])
            except Exception as error:
                reason = f"sentence-transformers cannot tokenize with it: {in_a_line(error)}"
                raise ModelError(model, reason) from error
            for name, tensor in ours.items():
                other = theirs.get(name)
                if other is None or not torch.equal(tensor, other):
                    raise ModelError(model, f"its {name} differ from sentence-transformers' own")


def split_by_tokens(lengths: Sequence[int], most_tokens: int) -> list[range]:
    """Split texts of ascending length into passes of up to ``most_tokens``, padding included."""
    passes, start = [], 0
    for at, length in enumerate(lengths):
        if at > start and (at + 1 - start) * length > most_tokens:
            passes.append(range(start, at))
            start = at
    return [*passes, range(start, len(lengths))]


@contextmanager
def _freed_when_full() -> Iterator[None]:
    """Free the memory of a forward pass that ran out of memory."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            # The traceback's frames refer to its tensors, which must be unused to leave torch's cache.
            traceback.clear_frames(error.__traceback__)
            torch.cuda.empty_cache()
        raise
