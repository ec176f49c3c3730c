"""A cache of the token ids of words, because texts repeat their words.

Tokenising is nearly all that a static model costs. Measured on one core with 64,000 texts of 5 to 20
words from WordNet's glosses: 40 µs a text by the tokenizer; by words 27 µs the first time, 18 µs the
second (a dictionary has more words than the cache keeps), and 8 µs if all words are known. If every word
is new, which no prose has, it takes 83 µs instead of 41.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["WordCache", "encode_ids", "splits_at_spaces"]

KNOWN_WORDS: Final = 2**16
"""Words in each of the two generations of the cache: 30 MB at most."""
WORD_CHARS: Final = 32
"""Longer strings are rarely words, and rarely repeated."""
AT_A_TIME: Final = 1024


class WordCache:
    """Tokenises without special tokens; only for tokenizers for which :func:`splits_at_spaces` is true.

    Safe to use from many threads.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known = {"": b""}
        self._previous: dict[str, bytes] = {}

    def __call__(self, texts: Sequence[str]) -> list[bytes]:
        """Return the ids of each text, as bytes of int32."""
        known = self._known
        found, cold = [], {}
        for at, text in enumerate(texts):
            words = text.replace("\n", " ").split(" ")
            try:
                found.append(b"".join([known[word] for word in words]))
            except KeyError:
                found.append(b"")
                cold[at] = words
        if cold:
            self._learn(texts, cold, known, found)
        return found

    def _learn(
        self,
        texts: Sequence[str],
        cold: Mapping[int, list[str]],
        known: dict[str, bytes],
        found: list[bytes],
    ) -> None:
        whole = [at for at, words in cold.items() if max(map(len, words)) > WORD_CHARS]
        for at, ids in zip(whole, encode_ids(self._tokenizer, [texts[at] for at in whole]), strict=True):
            found[at] = ids
        rest = {at: cold[at] for at in cold.keys() - set(whole)}
        learned = self._learned({w for words in rest.values() for w in words if w not in known})
        for at, words in rest.items():
            found[at] = b"".join([learned[w] if w in learned else known[w] for w in words])
        if len(self._known) + len(learned) > KNOWN_WORDS:
            # Replaced, not emptied: other threads use it, and words that occur again come back from it.
            self._previous, self._known = self._known, {"": b""}
        if len(learned) < KNOWN_WORDS:
            self._known.update(learned)

    def _learned(self, words: set[str]) -> dict[str, bytes]:
        previous = self._previous
        learned = {word: previous[word] for word in words if word in previous}
        new = list(words - learned.keys())
        learned.update(zip(new, encode_ids(self._tokenizer, new), strict=True))
        return learned


def encode_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[bytes]:
    """Return the ids of each text, as bytes of int32, without special tokens."""
    # encode_batch_fast computes no offsets. In blocks: a tokenizer's own form of a text is large.
    return [
        np.array(encoding.ids, dtype=np.int32).tobytes()
        for start in range(0, len(texts), AT_A_TIME)
        for encoding in tokenizer.encode_batch_fast(
            texts[start : start + AT_A_TIME], add_special_tokens=False
        )
    ]


def splits_at_spaces(tokenizer: Tokenizer) -> bool:
    """Return whether a text's tokens are those of its parts between spaces and line ends.

    This holds for BERT's tokenizer: its normalizer does not look beyond a space, and words end there.
    Only an added token, such as ``[SEP]``, could contain a space.
    """
    parts = json.loads(tokenizer.to_str())
    kinds = [(parts.get(name) or {}).get("type") for name in ("normalizer", "pre_tokenizer", "model")]
    added = [token["content"] for token in parts.get("added_tokens") or ()]
    return kinds == ["BertNormalizer", "BertPreTokenizer", "WordPiece"] and not any(
        character.isspace() for content in added for character in content
    )
