"""Runs a model's forward pass, with the fastest attention and precision that give the right vectors.

Before the worker takes work, each candidate is probed: it computes batches with and without padding,
with exactly its own kernel, and its vectors are compared with those of plain attention in float32.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import dropwhile
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from sentence_transformers.sentence_transformer.modules import Pooling
from torch.nn.attention import SDPBackend

from sutra_tasks.engines.attention import (
    AttentionCandidate,
    Implementation,
    NoFaithfulAttention,
    attention_candidates,
    first_faithful,
    implementation_for_padding,
)
from sutra_tasks.engines.golden import lowest_cosine
from sutra_tasks.engines.out_of_memory import is_out_of_memory
from sutra_tasks.engines.torch_engine.introspection import describe, traits_of, transformer_of
from sutra_tasks.engines.torch_engine.sdpa_kernels import SDPA_KERNELS
from sutra_tasks.errors import ModelError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from sutra_tasks.vectors import Floats

__all__ = ["ForwardPass"]

KERNELS: Final = {
    Implementation.SDPA_FLASH: SDPBackend.FLASH_ATTENTION,
    Implementation.SDPA_EFFICIENT: SDPBackend.EFFICIENT_ATTENTION,
    Implementation.CPU_FLASH: SDPBackend.FLASH_ATTENTION,
}
TRANSFORMERS_NAMES: Final = {Implementation.FLASH_2: "flash_attention_2", Implementation.PLAIN: "eager"}
"""The names in transformers; all other implementations are its ``sdpa``."""

LEAST_SPEED_UP: Final = 1.1
"""Speed over float32 that a precision on trial needs."""
TIMINGS: Final = 3
MOST_TRIAL_S: Final = 1.0


class ForwardPass:
    """A model on a device, ready to run.

    Attributes:
        choice: the attention implementation and the precision.
    """

    def __init__(
        self,
        name: str,
        model: SentenceTransformer,
        device: torch.device,
        probes: Sequence[Mapping[str, Any]],
        *,
        attention: str = "auto",
        dtype: str = "auto",
    ) -> None:
        """Choose attention and precision, and move ``model`` to ``device`` with them.

        Args:
            name: of the model, for errors.
            model: as it was loaded, on the CPU, with plain attention.
            device: runs the model.
            probes: features of batches, with padding and without; the last one is timed.
            attention: ``SUTRA_ATTENTION``.
            dtype: ``SUTRA_DTYPE``.

        Raises:
            ModelError: no candidate gives the vectors of plain attention in float32.
        """
        self._model, self._device = model.eval(), device
        self._weights: _Weights | None = _Weights(model)
        candidates = attention_candidates(
            describe(device), traits_of(model), attention=attention, dtype=dtype
        )
        try:
            expected = self._plain(probes, candidates[0].dtype)
            self._chosen, self.choice = first_faithful(
                candidates, lambda one: self._fault(one, probes, expected)
            )
        except NoFaithfulAttention as error:
            raise ModelError(name, f"does not run faithfully on {device}: {error}") from None
        except Exception as error:
            raise ModelError(name, f"does not run on {device}: {_first_line(error)}") from error
        self._weights = None  # frees the weights as they were loaded
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def __call__(self, features: Mapping[str, Any]) -> dict[str, Any]:
        """Return sentence-transformers' output for features; vectors are in ``sentence_embedding``.

        Without padding, ``token_embeddings`` has all texts in one row, which ``cu_seq_lens_q`` splits.
        """
        chosen = self._chosen.implementation
        # Plain SDPA as the last resort: a batch that the other kernels refuse is slow, but computed.
        return self._run(
            features,
            KERNELS.get(chosen),
            KERNELS.get(implementation_for_padding(chosen)),
            SDPBackend.MATH,
        )

    def pool(self, features: Mapping[str, Any]) -> dict[str, Any]:
        """Return the output of the pooling and of all modules behind it, given states of tokens."""
        with torch.inference_mode(), self._precision():
            found = dict(features)
            # Not the modules before: the states have passed them.
            for module in dropwhile(lambda one: not isinstance(one, Pooling), self._model):
                found = module(found)
        return found

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(
            self._device.type, self._dtype, enabled=self._autocast, cache_enabled=False
        )

    def _plain(self, probes: Sequence[Mapping[str, Any]], dtype: str) -> list[Floats]:
        try:
            self._apply(AttentionCandidate(Implementation.PLAIN, "float32"))
            return [_rows(self._run(features)) for features in probes]
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # The model may fit into its GPU only in half precision.
        self._apply(AttentionCandidate(Implementation.PLAIN, dtype))
        return [_rows(self._run(features)) for features in probes]

    def _fault(
        self,
        candidate: AttentionCandidate,
        probes: Sequence[Mapping[str, Any]],
        expected: Sequence[Floats],
    ) -> str | None:
        try:
            self._apply(candidate)
            with warnings.catch_warnings():  # torch warns why a kernel cannot run
                warnings.simplefilter("ignore")
                rows = [_rows(self._run(features, _kernel(candidate, features))) for features in probes]
        except Exception as error:  # noqa: BLE001 - whatever a kernel raises, the next may work
            return _first_line(error)
        cosine = min(map(lowest_cosine, rows, expected))
        if not cosine >= candidate.least_cosine:
            return f"cosine {cosine:.5f} to plain float32, less than {candidate.least_cosine}"
        return self._too_slow(candidate, probes[-1]) if candidate.on_trial else None

    def _too_slow(self, candidate: AttentionCandidate, probe: Mapping[str, Any]) -> str | None:
        in_float32 = AttentionCandidate(candidate.implementation, "float32")
        took_s: dict[str, list[float]] = {"float32": [], candidate.dtype: []}
        faster, turns, began_at = 0.0, 0, time.perf_counter()
        while turns < TIMINGS or time.perf_counter() - began_at < MOST_TRIAL_S:
            turns += 1
            for one in (in_float32, candidate):  # by turns, because other work may slow the machine
                self._apply(one)
                began = time.perf_counter()
                self._run(probe)
                took_s[one.dtype].append(time.perf_counter() - began)
            faster = min(took_s["float32"]) / min(took_s[candidate.dtype])
            if turns >= TIMINGS and faster >= LEAST_SPEED_UP:  # else other work may have slowed it
                return None
        return f"{faster:.2f} times as fast as float32"

    def _apply(self, candidate: AttentionCandidate) -> None:
        """Give the model a candidate's precision and attention."""
        assert self._weights is not None
        # On a CPU only linear modules: the others cost little in float32, and are more accurate.
        self._autocast = self._device.type == "cpu" and candidate.dtype != "float32"
        self._dtype: torch.dtype = getattr(torch, candidate.dtype)
        self._weights.put(self._device, self._dtype, linear_only=self._autocast)
        inner = transformer_of(self._model)
        name = TRANSFORMERS_NAMES.get(candidate.implementation, "sdpa")
        if inner is not None:
            inner.set_attn_implementation(name)
            if inner.config._attn_implementation != name:  # noqa: SLF001 - no public attribute
                raise ValueError(f"the model stays with {inner.config._attn_implementation} attention")  # noqa: SLF001
        first: Any = self._model[0]
        if getattr(first, "unpad_inputs", False) is not False:  # False: not supported by this model
            first.unpad_inputs = None  # derived again from its attention
        self._unpads = bool(getattr(first, "can_flatten_inputs", False))

    def _run(self, features: Mapping[str, Any], *kernels: SDPBackend | None) -> dict[str, Any]:
        """Run the model once, with the first of some SDPA kernels that supports the batch."""
        only = SDPA_KERNELS.only(kernel for kernel in kernels if kernel is not None)
        with torch.inference_mode(), only, self._precision():
            given = self._unpadded(features) if self._unpads else features
            outputs: dict[str, Any] = self._model(
                {
                    name: value.to(self._device) if isinstance(value, torch.Tensor) else value
                    for name, value in given.items()
                }
            )
        return outputs

    def _unpadded(self, features: Mapping[str, Any]) -> dict[str, Any]:
        """Return features in one row without padding, as sentence-transformers builds them."""
        first: Any = self._model[0]
        texts = zip(features["input_ids"], features["attention_mask"].bool(), strict=True)
        flat = dict(first.data_collator([{"input_ids": ids[ours]} for ids, ours in texts]))
        del flat["labels"]
        flat["position_ids"] = flat["position_ids"] + getattr(first, "_flatten_position_offset", 0)
        return {name: value for name, value in features.items() if name == "prompt_length"} | flat


class _Weights:
    """A model's weights as they were loaded, from which any precision can be restored."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        linear = {
            id(tensor)
            for module in model.modules()
            if isinstance(module, torch.nn.Linear)
            for tensor in module.parameters(recurse=False)
        }
        # Without buffers that checkpoints leave out: rotary frequencies must stay in float32.
        self._loaded = [
            (tensor, tensor.data, id(tensor) in linear)
            for tensor in model.state_dict(keep_vars=True).values()
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
        ]

    def put(self, device: torch.device, dtype: torch.dtype, *, linear_only: bool) -> None:
        for tensor, loaded, is_linear in self._loaded:
            tensor.data = loaded.to(device, dtype if is_linear or not linear_only else torch.float32)
        self._model.to(device)


def _kernel(candidate: AttentionCandidate, features: Mapping[str, Any]) -> SDPBackend | None:
    padded = not bool(features["attention_mask"].all())
    return KERNELS.get(
        implementation_for_padding(candidate.implementation) if padded else candidate.implementation
    )


def _rows(outputs: Mapping[str, Any]) -> Floats:
    rows: Floats = outputs["sentence_embedding"].float().cpu().numpy()
    return np.atleast_2d(rows)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
