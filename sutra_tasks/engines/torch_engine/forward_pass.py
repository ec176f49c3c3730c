"""A model's passes: on one device, in the first precision and by the first attention that hold.

A probe holds each way against plain attention in float32 before the worker takes work: batches with and
without padding, through exactly the kernel that the way names.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
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
IMPLEMENTATIONS: Final = {Implementation.FLASH_2: "flash_attention_2", Implementation.PLAIN: "eager"}
"""As transformers names them; all other paths are its sdpa."""

LEAST_SPEED_UP: Final = 1.1
TIMINGS: Final = 3
MOST_TRIAL_S: Final = 1.0


class ForwardPass:
    """Runs a model's passes: on its device, in the precision and by the attention that proved itself."""

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
        """Settle how to run ``model``, and leave it so on ``device``.

        Args:
            name: of the model, for errors.
            model: as it was loaded, on the CPU, with plain attention.
            device: where to run it.
            probes: features of batches, with padding and without; the last one is timed.
            attention: ``SUTRA_ATTENTION``.
            dtype: ``SUTRA_DTYPE``.

        Raises:
            ModelError: no way gives the vectors that plain attention gives in float32.
        """
        self._model, self._device = model.eval(), device
        self._weights: _Weights | None = _Weights(model)
        ways = attention_candidates(describe(device), traits_of(model), attention=attention, dtype=dtype)
        try:
            expected = self._plain(probes, ways[0].dtype)
            self._way, self.choice = first_faithful(ways, lambda way: self._prove(way, probes, expected))
        except NoFaithfulAttention as error:
            raise ModelError(name, f"does not run faithfully on {device}: {error}") from None
        except Exception as error:
            raise ModelError(name, f"does not run on {device}: {_first_line(error)}") from error
        self._weights = None  # what was loaded is no longer needed
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def __call__(self, features: Mapping[str, Any]) -> dict[str, Any]:
        """Return what sentence-transformers computes from features, as ``sentence_embedding``.

        Where inputs go unpadded, ``token_embeddings`` come in one row, split at ``cu_seq_lens_q``.
        """
        path = self._way.path
        # Plain SDPA is the last resort: a batch that its kernels refuse is slow, and no failure.
        return self._run(
            features, KERNELS.get(path), KERNELS.get(implementation_for_padding(path)), SDPBackend.MATH
        )

    def pool(self, features: Mapping[str, Any]) -> dict[str, Any]:
        """Return what follows on the transformer, given the states of tokens it made."""
        with torch.inference_mode(), self._precision():
            found = dict(features)
            for module in list(self._model)[1:]:
                found = module(found)
        return found

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(
            self._device.type, self._dtype, enabled=self._autocast, cache_enabled=False
        )

    def _plain(self, probes: Sequence[Mapping[str, Any]], dtype: str) -> list[Floats]:
        try:
            self._take(AttentionCandidate(Implementation.PLAIN, "float32"))
            return [_rows(self._run(features)) for features in probes]
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # A model may fit its GPU in half precision only.
        self._take(AttentionCandidate(Implementation.PLAIN, dtype))
        return [_rows(self._run(features)) for features in probes]

    def _prove(
        self, way: AttentionCandidate, probes: Sequence[Mapping[str, Any]], expected: Sequence[Floats]
    ) -> str | None:
        try:
            self._take(way)
            with warnings.catch_warnings():  # by these torch says why a kernel cannot run
                warnings.simplefilter("ignore")
                rows = [_rows(self._run(features, _kernel(way, features))) for features in probes]
        except Exception as error:  # noqa: BLE001 - whatever a kernel raises, the next may work
            return _first_line(error)
        cosine = min(map(lowest_cosine, rows, expected))
        if not cosine >= way.least_cosine:
            return f"cosine {cosine:.5f} to plain float32, less than {way.least_cosine}"
        return self._too_slow(way, probes[-1]) if way.on_trial else None

    def _too_slow(self, way: AttentionCandidate, probe: Mapping[str, Any]) -> str | None:
        in_float32 = AttentionCandidate(way.path, "float32")
        took_s: dict[str, list[float]] = {"float32": [], way.dtype: []}
        faster, turns, began_at = 0.0, 0, time.perf_counter()
        while turns < TIMINGS or time.perf_counter() - began_at < MOST_TRIAL_S:
            turns += 1
            for one in (in_float32, way):  # by turns: others may be busy on this machine
                self._take(one)
                began = time.perf_counter()
                self._run(probe)
                took_s[one.dtype].append(time.perf_counter() - began)
            faster = min(took_s["float32"]) / min(took_s[way.dtype])
            if turns >= TIMINGS and faster >= LEAST_SPEED_UP:  # else others may have been in the way
                return None
        return f"{faster:.2f} times as fast as float32"

    def _take(self, way: AttentionCandidate) -> None:
        """Put the model into a way's precision and attention."""
        assert self._weights is not None
        # On a CPU only what multiplies: the rest costs little in float32, and keeps the vectors closer.
        self._autocast = self._device.type == "cpu" and way.dtype != "float32"
        self._dtype: torch.dtype = getattr(torch, way.dtype)
        self._weights.put(self._device, self._dtype, linear_only=self._autocast)
        inner, wanted = transformer_of(self._model), IMPLEMENTATIONS.get(way.path, "sdpa")
        if inner is not None:
            inner.set_attn_implementation(wanted)
            if inner.config._attn_implementation != wanted:  # noqa: SLF001 - no other way to ask
                raise ValueError(f"the model stays with {inner.config._attn_implementation} attention")  # noqa: SLF001
        first: Any = self._model[0]
        if getattr(first, "unpad_inputs", False) is not False:  # False: not with this model
            first.unpad_inputs = None  # looks at its attention anew
        self._unpads = bool(getattr(first, "can_flatten_inputs", False))

    def _run(self, features: Mapping[str, Any], *kernels: SDPBackend | None) -> dict[str, Any]:
        """Run one pass, through the first of some SDPA kernels that takes it."""
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
        """Return features in one row without padding, as sentence-transformers makes them."""
        first: Any = self._model[0]
        texts = zip(features["input_ids"], features["attention_mask"].bool(), strict=True)
        flat = dict(first.data_collator([{"input_ids": ids[ours]} for ids, ours in texts]))
        del flat["labels"]
        flat["position_ids"] = flat["position_ids"] + getattr(first, "_flatten_position_offset", 0)
        return {name: value for name, value in features.items() if name == "prompt_length"} | flat


class _Weights:
    """A model's weights as they were loaded; the model can have them in any precision, any time."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        linear = {
            id(tensor)
            for module in model.modules()
            if isinstance(module, torch.nn.Linear)
            for tensor in module.parameters(recurse=False)
        }
        # Without buffers that no checkpoint holds: rotary frequencies must stay in float32.
        self._loaded = [
            (tensor, tensor.data, id(tensor) in linear)
            for tensor in model.state_dict(keep_vars=True).values()
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
        ]

    def put(self, device: torch.device, dtype: torch.dtype, *, linear_only: bool) -> None:
        for tensor, loaded, is_linear in self._loaded:
            tensor.data = loaded.to(device, dtype if is_linear or not linear_only else torch.float32)
        self._model.to(device)


def _kernel(way: AttentionCandidate, features: Mapping[str, Any]) -> SDPBackend | None:
    padded = not bool(features["attention_mask"].all())
    return KERNELS.get(implementation_for_padding(way.path) if padded else way.path)


def _rows(outputs: Mapping[str, Any]) -> Floats:
    rows: Floats = outputs["sentence_embedding"].float().cpu().numpy()
    return np.atleast_2d(rows)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
