"""What an engine is to the rest of the package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from sutra_tasks.errors import InvalidOptionError

if TYPE_CHECKING:
    from sutra_tasks.vectors import Floats

__all__ = ["Card", "Encoder", "TokenizedText", "check_options"]


@dataclass(frozen=True, slots=True)
class Card:
    """What an engine serves.

    Attributes:
        model: the model's name as it was asked for.
        space: name of the embedding space: everything that decides what a vector means.
        width: dimensions of its vectors.
        window: tokens of a text it sees, special tokens and prompt included.
        prompts: the named prompts and their text.
    """

    model: str
    space: str
    width: int
    window: int
    prompts: Mapping[str, str]


@dataclass(frozen=True, slots=True, repr=False)
class TokenizedText:
    """One text, ready for an engine; ``content`` is the engine's own form of it."""

    tokens: int
    truncated: bool
    content: Any


class Encoder(Protocol):
    """One model on one device.

    ``tokenize`` is called from many threads at once; ``encode`` only from one.
    """

    card: Card

    def tokenize(self, texts: Sequence[str], prompt: str | None) -> list[TokenizedText]:
        """Prepare texts under a named prompt, cutting each at the window."""

    def encode(self, batch: Sequence[TokenizedText]) -> Floats:
        """Return float32 rows of shape (len(batch), width), as the model gives them."""


def check_options(card: Card, prompt: str | None, dimensions: int | None) -> None:
    """Refuse what this model cannot give.

    Raises:
        InvalidOptionError: an unknown prompt, or more dimensions than the model has.
    """
    if prompt is not None and prompt not in card.prompts:
        known = ", ".join(sorted(card.prompts)) or "none: this model has no prompts"
        raise InvalidOptionError("prompt", repr(prompt[:50]), f"one of {known}")
    if dimensions is not None and dimensions > card.width:
        raise InvalidOptionError("dimensions", str(dimensions), f"{card.width} or fewer")
