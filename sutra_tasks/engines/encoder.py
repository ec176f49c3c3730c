"""The protocol of engines, the description of a model, and the form of a text that engines compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from sutra_tasks.errors import InvalidOptionError

if TYPE_CHECKING:
    from sutra_tasks.engines.offsets import Offsets
    from sutra_tasks.vectors import Floats

__all__ = [
    "Encoder",
    "ModelInfo",
    "TokenizedText",
    "check_options",
    "cut_to_window",
    "gives_space",
    "kept_span",
]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Describes the model that an engine has loaded.

    Attributes:
        model: its name as it was asked for.
        space: name of its embedding space: everything that decides what a vector means.
        width: dimensions of its vectors.
        window: tokens of a text that it computes, special tokens and prompt included.
        prompts: its named prompts and their texts.
        default_prompt: the name of the prompt of calls that name none; None: they have no prompt.
        keeps_end: whether the first tokens of a text that is cut at the window are left out, not its
            last.
        weight_bytes: approximate size of its weights in memory; 0 if it has none.
        is_static: whether a vector is the mean of its tokens' vectors: then batches have no padding, and
            long texts need no chunks.
        pools_mean: whether it takes the mean of its tokens' states, as late chunking requires.
    """

    model: str
    space: str
    width: int
    window: int
    prompts: Mapping[str, str]
    default_prompt: str | None = None
    keeps_end: bool = False
    weight_bytes: int = 0
    is_static: bool = False
    pools_mean: bool = False


@dataclass(frozen=True, slots=True, repr=False)
class TokenizedText:
    """A text, or a window of a text, in the form that its engine computes.

    Attributes:
        tokens: number of its tokens, special tokens and prompt included.
        content: the engine's own form of it.
    """

    tokens: int
    content: Any


class Encoder(Protocol):
    """One model on one device.

    One thread calls ``encode`` and ``pool``; any number of threads call the other methods.
    """

    info: ModelInfo

    def tokenize(self, texts: Sequence[str], prompt: str | None) -> list[TokenizedText]:
        """Return texts as tokens; long texts are not cut.

        Args:
            texts: any number.
            prompt: the name of a prompt; None: the model's default prompt; "": none.
        """

    def offsets(self, text: TokenizedText) -> Offsets:
        """Return where a whole text's tokens are in the text, without prompt and special tokens."""

    def windows(
        self, text: TokenizedText, offsets: Offsets, spans: Sequence[tuple[int, int]]
    ) -> list[TokenizedText]:
        """Return windows of a whole text, each with the special tokens and the prompt of the whole.

        Args:
            text: the whole text.
            offsets: returned by :meth:`offsets`.
            spans: for each window its first token, and the token after its last one.
        """

    def encode(self, batch: Sequence[TokenizedText]) -> Floats:
        """Return the model's vectors: float32, shape (len(batch), width).

        No text of ``batch`` has more tokens than the model's window.
        """

    def pool(self, text: TokenizedText, spans: Sequence[tuple[int, int]]) -> Floats:
        """Return float32 vectors of spans of a window, shape (len(spans), width), from one pass.

        Each vector is pooled from the states of the span's tokens, computed with attention to the whole
        window: late chunking (Günther and others, 2024, arXiv:2409.04701). Called only if
        ``info.pools_mean``.

        Args:
            text: a window.
            spans: the first token of each span and the token after its last one, counted without special
                tokens and prompt.
        """

    def pack(self, batch: Sequence[TokenizedText]) -> dict[str, Any]:
        """Return ``batch`` as JSON, for another worker of the same embedding space."""

    def unpack(self, packed: Mapping[str, Any]) -> list[TokenizedText]:
        """Return the texts that :meth:`pack` packed.

        Raises:
            CorruptMessageError: they were not packed by this engine, or not for this model.
        """


def check_options(info: ModelInfo, prompt: str | None, dimensions: int | None) -> None:
    """Raise an error if a model cannot follow a call's options.

    Raises:
        InvalidOptionError: the prompt is unknown, or the model has fewer dimensions.
    """
    if prompt and prompt not in info.prompts:
        known = ", ".join(sorted(info.prompts)) or "none: this model has no prompts"
        raise InvalidOptionError("prompt", repr(prompt[:50]), f"one of {known}")
    if dimensions is not None and dimensions > info.width:
        raise InvalidOptionError("dimensions", str(dimensions), f"{info.width} or fewer")


def gives_space(info: ModelInfo, space: str, dimensions: int | None) -> bool:
    """Return whether a model's vectors, cut to ``dimensions``, are of an embedding space."""
    name, _, _ = info.space.rpartition(":")
    return space == f"{name}:{dimensions or info.width}"


def cut_to_window(encoder: Encoder, text: TokenizedText) -> TokenizedText:
    """Return a whole text as far as the model computes it: all of it, or as many tokens as it takes."""
    if text.tokens <= encoder.info.window:
        return text
    offsets = encoder.offsets(text)
    return encoder.windows(text, offsets, [kept_span(encoder.info, text.tokens, len(offsets))])[0]


def kept_span(info: ModelInfo, tokens: int, own: int) -> tuple[int, int]:
    """Return the first token that is kept of a text that is too long, and the token after the last one.

    Args:
        info: of the model.
        tokens: of the text, special tokens and prompt included; more than the window.
        own: tokens of the text without those.
    """
    most = info.window - (tokens - own)
    return (own - most, own) if info.keeps_end else (0, most)
