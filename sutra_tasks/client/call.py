"""A call of ``embed`` as a value, checked before it is sent, and the header that routers read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from sutra_tasks.errors import (
    InvalidInputError,
    InvalidOptionError,
    InvalidTextError,
    TooLargeError,
    UnsupportedVersionError,
)
from sutra_tasks.settings import METHODS, STRATEGIES, settings

if TYPE_CHECKING:
    from sutra_tasks.settings import Settings

__all__ = [
    "HEADER",
    "VERSION",
    "Call",
    "Demand",
    "check_strategy",
    "checked_bytes",
    "demand_of",
    "estimated_tokens",
]

VERSION: Final = 1
HEADER: Final = "sutra"
LATEST: Final = 1e11  # the year 5138
BYTES_PER_TOKEN: Final = 4
"""UTF-8 bytes in one token of English prose under WordPiece. Code and other scripts differ from it, but
on every device alike, so loads and speeds still compare."""

TOKENS_PER_TEXT: Final = 2
"""Special tokens of one text."""

OPTIONS: Final = (
    "prompt",
    "dimensions",
    "normalize",
    "details",
    "chunk_vectors",
    "truncate",
    "aggregation_method",
    "model",
    "space",
)
MOST_NAME_CHARS: Final = 200


@dataclass(frozen=True, slots=True)
class Demand:
    """The work that a message asks for, as the router knows it without decoding the body.

    Attributes:
        texts: how many.
        bytes: of all texts in UTF-8, or of the body if its sender wrote no header.
        sent_at: Unix time in seconds; None: not known.
        strategy: how the router chooses a device; None: by its default.
        model: the model that was asked for; None: the fleet's default.
    """

    texts: int
    bytes: int
    sent_at: float | None
    strategy: str | None
    model: str | None = None

    @property
    def tokens(self) -> int:
        """Estimated tokens, at least 1: the unit of loads, credits and measured speeds."""
        return estimated_tokens(self.texts, self.bytes)


def estimated_tokens(texts: int, size_bytes: int) -> int:
    """Estimate tokens without a tokenizer, at least 1."""
    return max(1, TOKENS_PER_TEXT * texts + size_bytes // BYTES_PER_TOKEN)


@dataclass(frozen=True, slots=True, repr=False)
class Call:
    """One call of ``embed``; its ``repr`` holds no text.

    Attributes:
        texts: those to embed.
        single: whether one text was given and not a list, so that the answer has one vector.
        bytes: of all texts in UTF-8.

    The other fields are the options of :meth:`sutra_tasks.client.embed_task.EmbedTask.delay`.
    """

    texts: tuple[str, ...]
    single: bool
    bytes: int
    prompt: str | None = None
    dimensions: int | None = None
    normalize: bool = True
    details: bool = False
    chunk_vectors: bool = False
    truncate: bool = False
    aggregation_method: str | None = None
    model: str | None = None
    space: str | None = None

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: Mapping[str, Any], limits: Settings) -> Call:
        """Check the arguments of ``embed``.

        Args:
            args: the positional ones.
            kwargs: those by name.
            limits: the settings that limit the size of a call.

        Raises:
            InvalidInputError: it names the argument at fault, or the position of the text.
        """
        options = dict(kwargs)
        positional = list(args)
        if positional:
            texts = positional.pop(0)
            if "texts" in options:
                raise InvalidInputError("embed() got texts twice")
        else:
            try:
                texts = options.pop("texts")
            except KeyError:
                raise InvalidInputError("embed() needs texts: a str or a list of str") from None
        if positional:
            raise InvalidInputError(
                "embed() takes one positional argument. Pass several texts as a list, and "
                f"{', '.join(OPTIONS)} by name"
            )
        for name in options:
            if name not in OPTIONS:
                raise InvalidOptionError(name, "...", f"one of the options {', '.join(OPTIONS)}")
        if not isinstance(texts, str) and callable(getattr(texts, "tolist", None)):
            texts = texts.tolist()  # an array of numpy, a column of pandas
        single = isinstance(texts, str)
        if not single and not isinstance(texts, list | tuple):
            raise InvalidTextError(0, f"a str or a list of str is needed, not {_kind(texts)}")
        checked = (texts,) if single else tuple(texts)
        call = cls(
            texts=checked,
            single=single,
            bytes=_checked_size(checked, limits),
            prompt=_checked_prompt(options.get("prompt")),
            dimensions=_checked_dimensions(options.get("dimensions")),
            normalize=_checked_flag("normalize", options.get("normalize", True)),
            details=_checked_flag("details", options.get("details", False)),
            chunk_vectors=_checked_flag("chunk_vectors", options.get("chunk_vectors", False)),
            truncate=_checked_flag("truncate", options.get("truncate", False)),
            aggregation_method=_checked_method(options.get("aggregation_method")),
            model=_checked_name("model", options.get("model")),
            space=_checked_name("space", options.get("space")),
        )
        if call.chunk_vectors and not call.details:
            raise InvalidOptionError("chunk_vectors", "True", "details=True beside it")
        return call

    @property
    def tokens(self) -> int:
        """Estimated tokens, as :attr:`Demand.tokens`."""
        return estimated_tokens(len(self.texts), self.bytes)

    def header(self, *, sent_at: float, strategy: str | None) -> dict[str, Any]:
        """Return the message's header ``sutra``, which the router reads."""
        return {
            "v": VERSION,
            "texts": len(self.texts),
            "bytes": self.bytes,
            "sent_at": sent_at,
            "strategy": strategy,
            **({"model": self.model} if self.model is not None else {}),
        }

    def __repr__(self) -> str:
        return f"<Call {len(self.texts)} texts, {self.bytes} bytes>"


def demand_of(header: Any, body_bytes: int) -> Demand:
    """Read the header ``sutra``.

    Args:
        header: None: the message was sent by another client, and counts by the size of its body.
        body_bytes: of the message.

    Raises:
        UnsupportedVersionError: another version of this package wrote the header.
    """
    if header is None:
        return Demand(texts=1, bytes=body_bytes, sent_at=None, strategy=None)
    if not isinstance(header, dict) or header.get("v") != VERSION:
        version = header.get("v") if isinstance(header, dict) else None
        raise UnsupportedVersionError("message", str(version)[:20], VERSION)
    limits = settings()  # what a message says of itself beyond them would keep out the calls of others
    return Demand(
        texts=_number(header.get("texts"), 1, limits.max_texts),
        bytes=_number(header.get("bytes"), body_bytes, limits.max_message_bytes),
        sent_at=_moment(header.get("sent_at")),
        strategy=header["strategy"] if isinstance(header.get("strategy"), str) else None,
        model=header["model"] if isinstance(header.get("model"), str) else None,
    )


def check_strategy(name: str) -> str:
    """Return ``name`` if it is the name of a strategy.

    Raises:
        InvalidOptionError: it is not.
    """
    if name not in STRATEGIES:
        raise InvalidOptionError("strategy", repr(name)[:50], f"one of {', '.join(STRATEGIES)}")
    return name


def _number(value: object, otherwise: int, most: int) -> int:
    return min(value, most) if type(value) is int and value >= 0 else otherwise


def _moment(value: object) -> float | None:
    """Return a time, or None for anything but a plausible number."""
    if isinstance(value, int | float) and abs(value) < LATEST:  # false for NaN, too
        return float(value)
    return None


def _kind(value: object) -> str:
    return "None" if value is None else type(value).__name__


def _checked_size(texts: tuple[Any, ...], limits: Settings) -> int:
    if len(texts) > limits.max_texts:
        raise TooLargeError("texts in one call", len(texts), limits.max_texts, "SUTRA_MAX_TEXTS")
    total = sum(checked_bytes(text, position, limits) for position, text in enumerate(texts))
    if total > limits.max_message_bytes:
        raise TooLargeError(
            "bytes of text in one call", total, limits.max_message_bytes, "SUTRA_MAX_MESSAGE_BYTES"
        )
    return total


def checked_bytes(text: Any, position: int, limits: Settings) -> int:
    """Check one text and return its bytes in UTF-8.

    Args:
        text: that may be no text at all.
        position: of the text among those that its caller gave.
        limits: the settings that limit its size.

    Raises:
        InvalidTextError: it is not text that can be embedded.
        TooLargeError: no message can hold it.
    """
    if not isinstance(text, str):
        raise InvalidTextError(position, f"a str is needed, not {_kind(text)}")
    if len(text) > limits.max_text_chars:
        raise TooLargeError(
            f"characters in texts[{position}]", len(text), limits.max_text_chars, "SUTRA_MAX_TEXT_CHARS"
        )
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidTextError(
            position, f"a lone surrogate at character {error.start} is not valid Unicode"
        ) from None
    if size > limits.max_message_bytes:
        raise TooLargeError(
            f"bytes of texts[{position}]", size, limits.max_message_bytes, "SUTRA_MAX_MESSAGE_BYTES"
        )
    return size


def _checked_prompt(prompt: Any) -> str | None:
    if prompt is not None and not isinstance(prompt, str):
        raise InvalidOptionError("prompt", _kind(prompt), "the name of one of the model's prompts")
    return prompt


def _checked_name(option: str, name: Any) -> str | None:
    if name is not None and (not isinstance(name, str) or not 0 < len(name) <= MOST_NAME_CHARS):
        shown = repr(name)[:50] if isinstance(name, str) else _kind(name)
        raise InvalidOptionError(option, shown, f"a name of 1 to {MOST_NAME_CHARS} characters")
    return name


def _checked_dimensions(dimensions: Any) -> int | None:
    if dimensions is None:
        return None
    if type(dimensions) is not int:
        raise InvalidOptionError("dimensions", _kind(dimensions), "a whole number")
    if dimensions < 1:
        raise InvalidOptionError("dimensions", str(dimensions), "1 or more")
    return dimensions


def _checked_method(method: Any) -> str | None:
    if method is not None and method not in METHODS:
        raise InvalidOptionError("aggregation_method", repr(method)[:50], f"one of {', '.join(METHODS)}")
    return str(method) if method is not None else None


def _checked_flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidOptionError(name, _kind(value), "True or False")
    return value
