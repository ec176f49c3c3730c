"""The base class of engines whose models have a ``tokenizers`` tokenizer: texts as token ids.

A text is tokenised once, as a whole, and cut into windows of its ids.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sutra_tasks.engines.encoder import TokenizedText
from sutra_tasks.engines.offsets import Offsets
from sutra_tasks.engines.tokenizing.slices import SLICE_CHARS, tokenize_in_slices
from sutra_tasks.errors import CorruptMessageError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tokenizers import Encoding, Tokenizer

    from sutra_tasks.engines.offsets import Integers

__all__ = ["TokenizingEncoder", "WholeTextIds", "WindowIds"]


@dataclass(frozen=True, slots=True, eq=False)
class WindowIds:
    """The ids of a window.

    Attributes:
        ids: with special tokens and prompt.
        prompt_tokens: number of first tokens that pooling leaves out.
        first: index of the first token that is neither special nor of the prompt.
    """

    ids: NDArray[np.int32]
    prompt_tokens: int
    first: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class WholeTextIds:
    """The ids of a whole text.

    Attributes:
        ids: with special tokens and prompt.
        prompt_tokens: number of first tokens that pooling leaves out.
        prompt_chars: characters of the prompt.
        spans: returns the characters of each token, special tokens included: shape (tokens, 2).
    """

    ids: NDArray[np.int32]
    prompt_tokens: int
    prompt_chars: int
    spans: Callable[[], Integers]


class TokenizingEncoder:
    """Implements ``Encoder`` except ``encode`` and ``pool``; safe to use from many threads."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompts: Mapping[str, str],
        window: int,
        *,
        pools_prompt: bool,
        default_prompt: str | None = None,
    ) -> None:
        """Prepare for tokenising.

        Args:
            tokenizer: of the model; it neither pads nor truncates, and is not reconfigured afterwards.
            prompts: the model's named prompts.
            window: tokens of a text that the model computes.
            pools_prompt: whether pooling includes the states of a prompt's tokens.
            default_prompt: the name of the prompt of texts for which none is named.

        Raises:
            ValueError: the tokenizer gives no token for any text.
        """
        self._tokenizer, self._prompts, self._window = tokenizer, prompts, window
        self._pools_prompt, self._default_prompt = pools_prompt, default_prompt
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        probe = _with_content(tokenizer, vocabulary)
        self._specials_before = probe.special_tokens_mask.index(0)
        self._specials_after = probe.special_tokens_mask[::-1].index(0)
        self._specials = np.array(probe.ids, dtype=np.int32)
        # Not the size of the vocabulary, which may have gaps.
        self._last_id = max(vocabulary.values())

    def tokenize(self, texts: Sequence[str], prompt: str | None) -> list[TokenizedText]:
        """Return the token ids of whole texts, the same as sentence-transformers computes."""
        prefix = self._prefix(prompt)
        prompt_tokens = self._prompt_tokens(prefix) if prefix and not self._pools_prompt else 0
        given = [prefix + text for text in texts] if prefix else texts
        # encode_batch is thread-safe while the tokenizer is not reconfigured, and releases the GIL.
        encoded = iter(
            self._tokenizer.encode_batch([text for text in given if len(text) <= SLICE_CHARS])
        )
        found = []
        for text in given:
            ids, spans = self._sliced(text) if len(text) > SLICE_CHARS else _ids_and_spans(next(encoded))
            found.append(TokenizedText(len(ids), WholeTextIds(ids, prompt_tokens, len(prefix), spans)))
        return found

    def offsets(self, text: TokenizedText) -> Offsets:
        """Return where a whole text's tokens are in the text."""
        whole: WholeTextIds = text.content
        spans = whole.spans()[self._specials_before : text.tokens - self._specials_after]
        # A token that begins in the prompt and ends in the text belongs to the text.
        prompt = np.append(spans[:, 1] > whole.prompt_chars, True).argmax() if whole.prompt_chars else 0
        starts, ends = np.maximum(spans[prompt:] - whole.prompt_chars, 0).T
        return Offsets(starts, ends)

    def windows(
        self, text: TokenizedText, offsets: Offsets, spans: Sequence[tuple[int, int]]
    ) -> list[TokenizedText]:
        """Return windows of a whole text's ids, each with its special tokens and prompt."""
        whole: WholeTextIds = text.content
        first = len(whole.ids) - self._specials_after - len(offsets)
        before, after = whole.ids[:first], whole.ids[first + len(offsets) :]
        rows = []
        for start, stop in spans:
            ids = np.concatenate([before, whole.ids[first + start : first + stop], after])
            # Tokenised with a text, a prompt's last token may include the text's first characters.
            prompt_tokens = first if start and whole.prompt_tokens else whole.prompt_tokens
            rows.append(TokenizedText(len(ids), WindowIds(ids, prompt_tokens, first)))
        return rows

    def pack(self, batch: Sequence[TokenizedText]) -> dict[str, Any]:
        """Return the ids as base64 of little-endian int32, one text after the other."""
        ids = np.concatenate([text.content.ids for text in batch]).astype("<i4")
        return {
            "tokens": [text.tokens for text in batch],
            "prompt_tokens": [text.content.prompt_tokens for text in batch],
            "ids": base64.b64encode(ids.tobytes()).decode("ascii"),
        }

    def unpack(self, packed: Mapping[str, Any]) -> list[TokenizedText]:
        """Return the packed texts.

        Raises:
            CorruptMessageError: :meth:`pack` did not pack them, or an id is not in the vocabulary.
        """
        try:
            ids = np.frombuffer(base64.b64decode(packed["ids"], validate=True), dtype="<i4")
            stops = np.cumsum(packed["tokens"])
            rows = [
                TokenizedText(len(part), WindowIds(part, int(prompt_tokens)))
                for part, prompt_tokens in zip(
                    np.split(ids, stops[:-1]), packed["prompt_tokens"], strict=True
                )
            ]
            whole = [row.tokens for row in rows] == packed["tokens"]
            known = ids.min() >= 0 and ids.max() <= self._last_id
            fit = all(
                0 < row.tokens <= self._window and 0 <= row.content.prompt_tokens <= self._window
                for row in rows
            )
        except (KeyError, IndexError, TypeError, ValueError, OverflowError):
            raise CorruptMessageError("the token ids of a part") from None
        if not (whole and known and fit):
            raise CorruptMessageError("the token ids of a part")
        return rows

    def _prefix(self, prompt: str | None) -> str:
        """Return the text of a prompt; None is the model's default prompt, and "" is no prompt."""
        name = self._default_prompt if prompt is None else prompt
        return self._prompts[name] if name else ""

    def _prompt_tokens(self, prefix: str) -> int:
        # As sentence-transformers counts them: without a closing special token.
        prompt = self._tokenizer.encode(prefix)
        return len(prompt.ids) - sum(prompt.special_tokens_mask[-1:])

    def _sliced(self, text: str) -> tuple[NDArray[np.int32], Callable[[], Integers]]:
        ids, spans = tokenize_in_slices(self._tokenizer, text)
        before, after = self._specials_before, self._specials_after
        special = self._specials
        around = (special[:before], ids, special[len(special) - after :])
        padded = np.pad(spans, ((before, after), (0, 0)))
        return np.concatenate(around), lambda: padded


def _with_content(tokenizer: Tokenizer, vocabulary: Mapping[str, int]) -> Encoding:
    """Return the encoding of some text that has a token beside the special ones."""
    # A letter is enough for most; a vocabulary of another script without a token for the unknown has
    # none.
    for text in ("a", *vocabulary):
        found = tokenizer.encode(text)
        if 0 in found.special_tokens_mask:
            return found
    raise ValueError("its tokenizer gives no token for any text")


def _ids_and_spans(encoding: Encoding) -> tuple[NDArray[np.int32], Callable[[], Integers]]:
    # The offsets are computed on request: few calls need them, and they take longer than the ids.
    return (
        np.array(encoding.ids, dtype=np.int32),
        lambda: np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2),
    )
