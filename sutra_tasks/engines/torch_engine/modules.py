"""Loads the modules of a sentence-transformers model; refuses those that would give other vectors."""

from __future__ import annotations

import threading
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, Final

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Router, Transformer
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, modeling_utils

from sutra_tasks.engines.torch_engine.introspection import forbid_hub_kernels
from sutra_tasks.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["in_a_line", "load_modules", "thread_safe_tokenizer"]

UNUSED_WEIGHTS: Final = "pooler."
"""Part of the names of weights that many folders lack, and that no module here uses."""
SHOWN_WEIGHTS: Final = 3
REASON_CHARS: Final = 300

_noted = threading.local()
"""What transformers reported about the weights of the model that a thread loads."""


def load_modules(name: str, folder: str) -> SentenceTransformer:
    """Return a model in the CPU's memory, with plain attention, whose tokenizer can pad.

    Args:
        name: of the model, for errors.
        folder: its files, or a name that sentence-transformers finds.

    Raises:
        ModelError: it cannot be loaded, or this engine would not give sentence-transformers' vectors.
    """
    forbid_hub_kernels()
    _note_missing_weights()
    _noted.missing, _noted.mismatched = set(), set()
    try:
        model = SentenceTransformer(
            folder,
            device="cpu",
            trust_remote_code=False,
            # The reference of all probes; the model's own setting could download a kernel.
            model_kwargs={"attn_implementation": "eager"},
        )
    except Exception as error:
        raise ModelError(name, _why_not_loaded(folder, error)) from error
    missing = sorted(_noted.missing)
    if missing:
        more = f" and {len(missing) - SHOWN_WEIGHTS} more" if len(missing) > SHOWN_WEIGHTS else ""
        raise ModelError(
            name,
            f"its files lack the weights {', '.join(missing[:SHOWN_WEIGHTS])}{more}, which would be "
            "random. Copy the model's folder again, whole.",
        )
    _check_modules(name, model)
    _let_pad(model.tokenizer)
    return model


def thread_safe_tokenizer(name: str, theirs: Any) -> Tokenizer:
    """Return a copy of the tokenizer: transformers reconfigures its own at every call.

    Raises:
        ModelError: it is written in Python, so that there is nothing to copy.
    """
    if not getattr(theirs, "is_fast", False):
        raise ModelError(
            name,
            f"its tokenizer, {type(theirs).__name__}, has no fast version (tokenizer.json), which "
            "workers need. Take a model that has one, or convert the tokenizer with transformers.",
        )
    ours = Tokenizer.from_str(theirs.backend_tokenizer.to_str())
    ours.no_padding()
    ours.no_truncation()
    return ours


def in_a_line(error: Exception) -> str:
    """Return the words of an error in one line, cut where they go on for long."""
    return shorten(str(error), REASON_CHARS, placeholder=" ...") or type(error).__name__


def _why_not_loaded(folder: str, error: Exception) -> str:
    if _noted.mismatched:
        names = ", ".join(sorted(_noted.mismatched)[:SHOWN_WEIGHTS])
        return f"its weights {names} have other shapes than config.json says. Are both of one model?"
    if "trust_remote_code" in str(error):
        return (
            "needs code of its own (trust_remote_code), which workers never run. Take a model whose "
            "modules and architecture are in sentence-transformers and transformers."
        )
    kind = "" if isinstance(error, OSError | ValueError | RuntimeError) else f"{type(error).__name__}: "
    remedy = (
        "Is the folder whole, and do these releases of sentence-transformers and transformers know it?"
        if Path(folder).is_dir()
        else "Give a folder, a name of the hub, or leave SUTRA_MODEL unset for the packaged MiniLM."
    )
    return f"cannot be loaded: {kind}{in_a_line(error)} {remedy}"


def _check_modules(name: str, model: SentenceTransformer) -> None:
    """Raise a ModelError for modules to which token ids alone are no sufficient input."""
    modules: list[Any] = list(model)
    if not modules:
        raise ModelError(name, "has no modules: its modules.json is empty")
    if any(isinstance(module, Router) for module in modules):
        raise ModelError(
            name,
            "routes queries and documents through different modules (Router), which workers do not. "
            "Save each route as a model of its own, and name both in SUTRA_MODELS.",
        )
    first = modules[0]
    if not isinstance(first, Transformer) or not isinstance(first.tokenizer, PreTrainedTokenizerBase):
        raise ModelError(
            name,
            f"begins with {type(first).__name__}, and workers compute texts with a Transformer or, "
            "from a folder, with a StaticEmbedding.",
        )
    if "message" in first.modality_config:
        raise ModelError(
            name,
            "wraps texts into its chat template, which workers do not. Save it with sentence-"
            "transformers with a Transformer of the modality text only, and a Pooling.",
        )
    if first.module_output_name != "sentence_embedding" and not any(
        isinstance(module, Pooling) for module in modules
    ):
        raise ModelError(
            name,
            "has no Pooling among its modules, so it gives vectors of tokens and none of a text. Is "
            "a part of its modules.json missing?",
        )


def _let_pad(tokenizer: Any) -> None:
    """Give a tokenizer without a padding token another one: which one is of no importance, it is masked.

    Without any, sentence-transformers cannot embed at all.
    """
    if tokenizer.pad_token_id is None:
        known = (tokenizer.eos_token, tokenizer.unk_token, tokenizer.convert_ids_to_tokens(0))
        tokenizer.pad_token = next(token for token in known if token is not None)


def _note_missing_weights() -> None:
    """Have transformers' report on loaded weights noted: it only logs that some are random."""
    report: Callable[..., None] | None = getattr(modeling_utils, "log_state_dict_report", None)
    if report is None or hasattr(report, "noted_by_sutra"):
        return

    def noting(*args: Any, **facts: Any) -> None:
        info, model = facts.get("loading_info"), facts.get("model")
        if model is not None and hasattr(_noted, "missing"):  # else another library loads it
            weights = {name for name, _ in model.named_parameters() if UNUSED_WEIGHTS not in name}
            _noted.missing |= weights.intersection(getattr(info, "missing_keys", ()))
            _noted.mismatched |= {name for name, *_ in getattr(info, "mismatched_keys", ())}
        report(*args, **facts)

    vars(noting)["noted_by_sutra"] = True
    vars(modeling_utils)["log_state_dict_report"] = noting
