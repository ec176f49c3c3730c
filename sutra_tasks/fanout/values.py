"""A document as it is begun, and what is read of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sutra_tasks.chunking.answer import AnswerLayout
    from sutra_tasks.client.call import Call
    from sutra_tasks.fanout.sender import PartSizes

__all__ = ["EndedDocument", "MissingParts", "NewDocument", "PartRows"]


@dataclass(frozen=True, slots=True, repr=False)
class NewDocument:
    """A call that is fanned out.

    Attributes:
        call: what was asked; its texts are not stored.
        layout: of the call's rows.
        model: the model's name.
        space: the embedding space of the rows.
        parts: the packed rows of each part.
        tokens: the tokens of each row of each part.
        devices: the device of each part; None: the router chooses it when the part's turn has come.
    """

    call: Call
    layout: AnswerLayout
    model: str
    space: str
    parts: Sequence[Mapping[str, Any]]
    tokens: Sequence[Sequence[int]]
    devices: Sequence[str | None]

    @property
    def sizes(self) -> PartSizes:
        """Rows and tokens of each part."""
        return [(len(tokens), sum(tokens)) for tokens in self.tokens]


@dataclass(frozen=True, slots=True, repr=False)
class PartRows:
    """One part to be computed.

    Attributes:
        rows: its packed rows.
        positions: for each row the position of its text in the call.
        model: the model's name.
        space: the embedding space of the rows.
    """

    rows: Mapping[str, Any]
    positions: Sequence[int]
    model: str
    space: str


@dataclass(frozen=True, slots=True, repr=False)
class MissingParts:
    """What a document lacks.

    Attributes:
        body: the message of its body.
        sizes: of all its parts.
        parts: the numbers of those without a result.
        given_up: whether it has an error, so that no part is computed any more.
    """

    body: bytes
    sizes: PartSizes
    parts: Sequence[int]
    given_up: bool


@dataclass(frozen=True, slots=True, repr=False)
class EndedDocument:
    """A document that is complete or given up.

    Attributes:
        call: what was asked, without texts.
        layout: of the call's rows.
        model: the model's name.
        space: the embedding space of the rows.
        results: of the parts, in order; none if there is an error.
        error: why there is no answer.
    """

    call: Call
    layout: AnswerLayout
    model: str
    space: str
    results: Sequence[Mapping[str, Any]]
    error: Exception | None
