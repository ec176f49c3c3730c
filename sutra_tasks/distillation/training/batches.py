"""Tokenises the texts of a training run once, and orders them into reproducible batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from sutra_tasks.distillation.names import fingerprint
from sutra_tasks.engines.torch_engine.window import window_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from sutra_tasks.distillation.config import DistillationConfig
    from sutra_tasks.vectors import Floats

__all__ = ["StudentTokenizer", "TrainingData", "epoch_order"]

BUCKET_BATCHES: Final = 50
"""Batches whose texts are sorted by length together: little padding, but batches still mix."""

Ids = NDArray[np.int32]


@dataclass(frozen=True, slots=True, repr=False)
class TrainingData:
    """The texts to learn from and to measure on, with the teacher's projected vectors as targets.

    Attributes:
        texts: to learn from.
        targets: unit rows, shape (texts, width).
        held_out: to measure on.
        held_out_targets: unit rows, shape (held out, width).
        pairs: labelled (query, answer) pairs for the task loss.
    """

    texts: Sequence[str]
    targets: Floats
    held_out: Sequence[str]
    held_out_targets: Floats
    pairs: Sequence[tuple[str, str]]

    def __post_init__(self) -> None:
        if not self.texts or not self.held_out:
            raise ValueError("no texts to learn from, or none to measure on")
        if len(self.texts) != len(self.targets) or len(self.held_out) != len(self.held_out_targets):
            raise ValueError("not one target a text")

    def fingerprint(self, config: DistillationConfig) -> str:
        """Return a digest of recipe and texts; not of the targets, which CPUs round differently."""
        return fingerprint([config.to_json(), list(self.texts), list(self.held_out), list(self.pairs)])


def epoch_order(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the batches of one epoch: every text once, texts of similar length together.

    The same arguments give the same batches, in any process.

    Args:
        lengths: tokens of each text.
        batch_size: texts in a batch; the last may have fewer.
        seed: of the run.
        epoch: counted from 0; each epoch has another order.
    """
    rng = np.random.default_rng([seed, epoch])
    shuffled, known = rng.permutation(len(lengths)), np.asarray(lengths)
    batches = []
    bucket = batch_size * BUCKET_BATCHES
    for start in range(0, len(shuffled), bucket):
        part = shuffled[start : start + bucket]
        part = part[np.argsort(known[part], kind="stable")]
        batches += [part[at : at + batch_size].tolist() for at in range(0, len(part), batch_size)]
    return [batches[at] for at in rng.permutation(len(batches))]


class StudentTokenizer:
    """Turns texts into token ids, and batches of ids into the input of the student's first module."""

    def __init__(self, student: SentenceTransformer, *, prompted: bool = True) -> None:
        """Read as the student will be served.

        Args:
            student: the model.
            prompted: whether texts get its default prompt.
        """
        self._is_static = isinstance(student[0], StaticEmbedding)
        self._tokenizer: Any = student.tokenizer
        self._window = None if self._is_static else window_of(student)
        name = student.default_prompt_name if prompted else None
        self._prompt = student.prompts.get(name or "") or ""
        pools_prompt = all(getattr(module, "include_prompt", True) for module in student)
        self._left_out = 0 if pools_prompt or not self._prompt else self._prompt_tokens()
        self._device = student.device

    def ids(self, texts: Sequence[str]) -> list[Ids]:
        """Return each text's token ids under the student's default prompt, cut to its window.

        Special tokens are included.
        """
        texts = [self._prompt + text for text in texts]
        if self._is_static:
            encoded = self._tokenizer.encode_batch(texts, add_special_tokens=False)
            return [np.array(one.ids, dtype=np.int32) for one in encoded]
        if not texts:
            return []
        found = self._tokenizer(
            texts,
            truncation=True,
            max_length=self._window,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        return [np.array(one, dtype=np.int32) for one in found["input_ids"]]

    def features(self, batch: Sequence[Ids]) -> dict[str, Any]:
        """Return the input of the student's first module, on its device."""
        found: dict[str, Any] = {
            name: tensor.to(self._device) for name, tensor in self._tensors(batch).items()
        }
        return found | ({"prompt_length": self._left_out} if self._left_out else {})

    def _prompt_tokens(self) -> int:
        """Return how many first tokens pooling leaves out, as sentence-transformers counts them."""
        ids = self._tokenizer(self._prompt)["input_ids"]
        return len(ids) - (ids[-1] in self._tokenizer.all_special_ids)

    def _tensors(self, batch: Sequence[Ids]) -> dict[str, torch.Tensor]:
        lengths = np.array([len(ids) for ids in batch])
        if self._is_static:
            offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]])
            flat = np.concatenate(batch).astype(np.int64)
            return {"input_ids": torch.from_numpy(flat), "offsets": torch.from_numpy(offsets)}
        longest = int(lengths.max())
        rows = np.full((len(batch), longest), self._tokenizer.pad_token_id or 0, dtype=np.int64)
        mask = np.zeros_like(rows)
        for row, ids in enumerate(batch):  # padded as the engine pads that serves the student
            rows[row, : len(ids)], mask[row, : len(ids)] = ids, 1
        found = {"input_ids": torch.from_numpy(rows), "attention_mask": torch.from_numpy(mask)}
        if "token_type_ids" in self._tokenizer.model_input_names:
            found["token_type_ids"] = torch.zeros_like(found["input_ids"])
        return found
