"""Describes a device and a loaded model, by which an attention implementation is chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from transformers import PreTrainedModel
from transformers.integrations import hub_kernels
from transformers.utils.import_utils import is_flash_attn_2_available

from sutra_tasks.engines.attention import Implementation, ModelTraits
from sutra_tasks.engines.capability import Hardware

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from sutra_tasks.engines.encoder import Encoder, TokenizedText

__all__ = ["describe", "forbid_hub_kernels", "probe_batches", "traits_of", "transformer_of"]

PROBE_TOKENS: Final = 256
PROBE_TEXT: Final = " ".join(
    f"In {1890 + n} the committee, not without doubts, granted licence no. {n * 37} for {what}; "
    f"its members asked why the {what} cost {n}.50 and left early."
    for n, what in enumerate(
        (
            "a bicycle",
            "quantum sensors",
            "café tables",
            "an orchestra",
            "steel",
            "lighthouses",
            "Ω-3 oil",
        )
    )
)


def forbid_hub_kernels() -> None:
    """Keep transformers from downloading kernels, which it can if ``kernels`` is installed."""
    # Not by the variable USE_HUB_KERNELS, which transformers read when it was imported.
    vars(hub_kernels)["_kernels_enabled"] = False


def describe(device: torch.device) -> Hardware:
    """Return torch's description of a device."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return Hardware(
            kind="cuda",
            hip=torch.version.hip,
            capability=torch.cuda.get_device_capability(device),
            architecture=getattr(properties, "gcnArchName", "").partition(":")[0],
            built_for=tuple(torch.cuda.get_arch_list()),
            # transformers' own check: if it fails, using the package would download a kernel instead.
            flash_attn=is_flash_attn_2_available(),
        )
    if device.type == "mps":
        return Hardware(kind="mps")
    native = (getattr(torch.cpu, f"_is_{one}_supported", bool) for one in ("avx512_bf16", "amx_tile"))
    return Hardware(cpu_bf16=any(supported() for supported in native))


def traits_of(model: SentenceTransformer) -> ModelTraits:
    """Return the properties of a model that decide which implementations can compute it."""
    inner = transformer_of(model)
    if inner is None:
        return ModelTraits(head_size=0, flash=False, sdpa=False)
    config: Any = inner.config.get_text_config()
    named = (getattr(config, name, None) for name in ("head_dim", "d_kv"))
    # For some models transformers would download another flash attention.
    compatible = getattr(inner, "_compatible_flash_implementations", None)
    return ModelTraits(
        head_size=next(filter(None, named), None) or config.hidden_size // config.num_attention_heads,
        flash=getattr(inner, "_supports_flash_attn", False)
        and (compatible is None or Implementation.FLASH_2 in compatible),
        sdpa=getattr(inner, "_supports_sdpa", False),
        position_bias=any(hasattr(module, "relative_attention_bias") for module in inner.modules()),
    )


def probe_batches(encoder: Encoder) -> tuple[list[TokenizedText], ...]:
    """Return two batches: a long text with a short one, and four of the same length."""
    (whole,) = encoder.tokenize([PROBE_TEXT], None)
    offsets = encoder.offsets(whole)
    most = min(encoder.info.window - (whole.tokens - len(offsets)), PROBE_TOKENS, len(offsets))
    step = max(1, min(PROBE_TOKENS // 4, most, len(offsets) // 4))
    spans = [(0, most), (most // 2, most // 2 + 1)]
    equal = [(start, start + step) for start in range(0, 4 * step, step)]
    return encoder.windows(whole, offsets, spans), encoder.windows(whole, offsets, equal)


def transformer_of(model: SentenceTransformer) -> PreTrainedModel | None:
    """Return the transformer in a model; None if it has none, as static embeddings."""
    return next((one for one in model.modules() if isinstance(one, PreTrainedModel)), None)
