"""What the server delivers to a device: entries, open texts, and the results of commits.

An open text is a text that is still being written. Its pieces leave the stream as soon as a device reads
them, and wait under keys of their own: ``pieces:<key>`` is a list of pieces, and ``text:<key>`` a hash:

=================  ================================================================================
``buffer``         what was joined of the pieces and is not done: UTF-8
``bytes``          bytes in the buffer and in the pieces
``need``           bytes from which on the text may be taken
``pieces``         the number that the next piece must have, if pieces are numbered
``ends``           last pieces in the list: a key may be used for one text after the other
``ended``          1: the buffer goes up to the end of the text
``flush``          ``idle`` or ``abandoned``: to be embedded as it is
``fresh``          1: it grew since it was flushed
``source``         its id, or the id of its first entry; ``prompt``: its prompt
``entry``          the id of its first entry
``at``             when its last piece in the buffer arrived, ms
``position``       where the next chunk begins, in characters; ``number``: chunks so far;
                   ``covered``: behind the last character of the chunk before
``token``          names the newest take; only that one may commit
``attempts``       takes since the last commit
=================  ================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from sutra_tasks.streaming.chunker import Ending, TextProgress

__all__ = [
    "ClaimedEntries",
    "CommitResult",
    "OpenText",
    "RawEntry",
    "ReadEntries",
    "TakenTexts",
    "TextAfter",
]

RawEntry = tuple[bytes, list[bytes]]
"""An entry's id, and its names and values one after the other."""

TextAfter = Literal["open", "idle", "ended"]
"""What a text is after a commit: open, open and flushed because it was idle, or over."""


@dataclass(frozen=True, slots=True, repr=False)
class ReadEntries:
    """The answer to a read.

    Attributes:
        entries: the entries that this consumer has now.
        takeable_texts: how many texts can be taken.
        last: the id behind which the next entry will stand; None if there were entries, or if the
            stream cannot be waited for.
    """

    entries: Sequence[RawEntry]
    takeable_texts: int
    last: bytes | None


@dataclass(frozen=True, slots=True, repr=False)
class ClaimedEntries:
    """Entries of a consumer that fell silent, and how often they were delivered before."""

    deliveries: int
    entries: Sequence[RawEntry]


@dataclass(frozen=True, slots=True, repr=False)
class OpenText:
    """A text that is being written, as it was taken for a while.

    Attributes:
        key: its key.
        token: proves at the commit that no other device has taken the text since.
        attempts: how often it was taken since its last commit, this time included.
        ending: how it ends; None: it may go on, or ``buffer`` is not all there is of it.
        buffer: UTF-8 from ``progress.position`` on.
        source: its id.
        prompt: its prompt.
        progress: how much of it is in chunks.
        arrived_ms: when it last grew, milliseconds since 1970.
        entry: id of its first entry; empty if an older release began it.
    """

    key: bytes
    token: bytes
    attempts: int
    ending: Ending | None
    buffer: bytes
    source: str
    prompt: str | None
    progress: TextProgress
    arrived_ms: int
    entry: str = ""


@dataclass(frozen=True, slots=True, repr=False)
class TakenTexts:
    """The open texts that a device took, and those that cannot be taken: their keys and the reasons."""

    texts: Sequence[OpenText]
    damaged: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class CommitResult:
    """The server's answer to a commit.

    Attributes:
        at_ms: the server's time, milliseconds since 1970.
        entries: how many entries or texts this commit answered; an earlier commit answered the others.
    """

    at_ms: float
    entries: int
