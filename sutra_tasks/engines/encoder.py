"""What an engine is to the rest of the package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from sutra_tasks.errors import InvalidOptionError

if TYPE_CHECKING:
    from sutra_tasks.engines.offsets import Offsets
    from sutra_tasks.vectors import Floats

__all__ = ["Encoder", "ModelInfo", "TokenizedText", "check_options", "cut_to_window", "gives_space"]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What an engine serves.

    Attributes:
        model: the model's name as it was asked for.
        space: name of the embedding space: everything that decides what a vector means.
        width: dimensions of its vectors.
        window: tokens of a text it sees, special tokens and prompt included.
        prompts: the named prompts and their text.
        weight_bytes: of its weights in memory, about; 0 if it has none.
        is_static: whether a vector is the mean of its tokens' vectors: batches have no padding then, and
            long texts need no chunks.
    """

    model: str
    space: str
    width: int
    window: int
    prompts: Mapping[str, str]
    weight_bytes: int = 0
    is_static: bool = False


@dataclass(frozen=True, slots=True, repr=False)
class TokenizedText:
    """A text, or a window of one, ready for an engine.

    Attributes:
        tokens: how many it has, special tokens and prompt included.
        content: the engine's own form of it.
    """

    tokens: int
    content: Any


class Encoder(Protocol):
    """One model on one device.

    ``encode`` is called from one thread only, everything else from many at once.
    """

    info: ModelInfo

    def tokenize(self, texts: Sequence[str], prompt: str | None) -> list[TokenizedText]:
        """Prepare texts under a named prompt; they are whole, however long."""

    def offsets(self, text: TokenizedText) -> Offsets:
        """Return where the tokens of a whole text stand in it, prompt and special tokens left out."""

    def windows(
        self, text: TokenizedText, offsets: Offsets, spans: Sequence[tuple[int, int]]
    ) -> list[TokenizedText]:
        """Return the tokens of a whole text from each start to before each end, by its ``offsets``.

        Each window gets the special tokens and the prompt of the whole.
        """

    def encode(self, batch: Sequence[TokenizedText]) -> Floats:
        """Return float32 rows of shape (len(batch), width), as the model gives them.

        No text of ``batch`` has more tokens than the model's window.
        """

    def pool(self, text: TokenizedText, spans: Sequence[tuple[int, int]]) -> Floats:
        """Return float32 rows of shape (len(spans), width) from one pass over a text.

        Each is pooled from the states of its tokens, which have seen all others: late chunking
        (Günther and others, 2024, arXiv:2409.04701). On the thread of ``encode``.

        Args:
            text: a window.
            spans: first and behind the last token of each, special tokens and prompt not counted.
        """

    def check_pool(self) -> None:
        """Refuse a model for which :meth:`pool` means nothing.

        Raises:
            ModelError: it does not take the mean of its tokens' states.
        """

    def pack(self, batch: Sequence[TokenizedText]) -> dict[str, Any]:
        """Return ``batch`` as JSON, for another worker of the same embedding space."""

    def unpack(self, packed: Mapping[str, Any]) -> list[TokenizedText]:
        """Return what was packed.

        Raises:
            CorruptMessageError: it was not packed by this engine, or not for this model.
        """


def check_options(info: ModelInfo, prompt: str | None, dimensions: int | None) -> None:
    """Refuse what this model cannot give.

    Raises:
        InvalidOptionError: an unknown prompt, or more dimensions than the model has.
    """
    if prompt is not None and prompt not in info.prompts:
        known = ", ".join(sorted(info.prompts)) or "none: this model has no prompts"
        raise InvalidOptionError("prompt", repr(prompt[:50]), f"one of {known}")
    if dimensions is not None and dimensions > info.width:
        raise InvalidOptionError("dimensions", str(dimensions), f"{info.width} or fewer")


def gives_space(info: ModelInfo, space: str, dimensions: int | None) -> bool:
    """Say whether this model's vectors, cut to ``dimensions``, are of a space that a caller pins."""
    name, _, _ = info.space.rpartition(":")
    return space == f"{name}:{dimensions or info.width}"


def cut_to_window(encoder: Encoder, text: TokenizedText) -> TokenizedText:
    """Return what the model sees of a whole text: all of it, or its first tokens."""
    if text.tokens <= encoder.info.window:
        return text
    offsets = encoder.offsets(text)
    room = encoder.info.window - (text.tokens - len(offsets))
    return encoder.windows(text, offsets, [(0, room)])[0]
