"""Many texts as a caller gives them: any iterable, divided into messages, and numbered as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from sutra_tasks.client.call import checked_bytes
from sutra_tasks.errors import EncodingError, InvalidInputError, InvalidTextError

if TYPE_CHECKING:
    from sutra_tasks.settings import Settings

__all__ = ["Texts", "divided", "iterator_of", "numbered"]


class Texts(NamedTuple):
    """The texts of one message.

    Attributes:
        start: position of the first one among all texts of the caller.
        texts: one or more.
    """

    start: int
    texts: list[str]


def iterator_of(texts: Any, function: str) -> Iterator[Any]:
    """Return an iterator over the texts that a caller gave.

    Args:
        texts: anything; each text is checked later, when it is read.
        function: that was called.

    Raises:
        InvalidInputError: it is one text, or nothing that gives one text after the other.
    """
    kind = type(texts).__name__
    if isinstance(texts, str | bytes | bytearray | memoryview):
        raise InvalidInputError(
            f"{function} takes an iterable of texts, not one {kind}: for one text write [text]"
        )
    if isinstance(texts, Mapping) or getattr(texts, "ndim", 1) != 1:
        raise InvalidInputError(
            f"{function} takes an iterable of texts, not a {kind} with several columns: give one "
            "of them, such as table['text'] or mapping.values()"
        )
    try:
        return iter(texts)
    except TypeError:
        raise InvalidInputError(f"{function} takes an iterable of texts, not {kind}") from None


def divided(texts: Iterator[Any], most_texts: int, limits: Settings) -> Iterator[Texts | Exception]:
    """Divide texts into messages that may be sent, and read each text only for its own message.

    Args:
        texts: as :func:`iterator_of` returns them.
        most_texts: in one message.
        limits: the settings that limit the size of a text and of a message.

    Yields:
        Messages; at last the exception of ``texts``, or of a text that cannot be embedded, if there is
        one. It is yielded and not raised, because messages before it may still be on their way.
    """
    start, some, size = 0, list[str](), 0
    failure: Exception | None = None
    try:
        for position, text in enumerate(texts):
            text_bytes = checked_bytes(text, position, limits)
            if some and size + text_bytes > limits.max_message_bytes:
                yield Texts(start, some)
                start, some, size = position, [], 0
            some.append(text)
            size += text_bytes
            if len(some) == most_texts:
                yield Texts(start, some)
                start, some, size = position + 1, [], 0
    except Exception as error:  # noqa: BLE001 - whatever the caller's iterable raises
        failure = error
    if some:
        yield Texts(start, some)
    if failure is not None:
        yield failure


def numbered(error: Exception, start: int) -> Exception:
    """Return the error of a message with its text's position among all texts of the caller.

    Args:
        error: that the message ended with.
        start: position of the message's first text.
    """
    match error:
        case EncodingError(device=device, position=position, reason=reason):
            return EncodingError(device, start + position, reason)
        case InvalidTextError(position=position, reason=reason):
            return InvalidTextError(start + position, reason)
    return error
