"""Token ids, word by word, of words seen before: text repeats its words.

Tokenising is nearly all that a static model costs. Measured on one core with 64,000 texts of 5 to 20
words from WordNet's glosses: 40 µs a text by the tokenizer; by words 27 the first time, 18 the second (a
dictionary has more of them than are kept) and 8 where all were seen before. Where every word is new, as
in no prose, it takes 83 instead of 41.
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
"""Words whose token ids are kept, and as many that were kept before them: 30 MB at most."""
WORD_CHARS: Final = 32
"""Longer ones are seldom words, and seldom come again."""
AT_A_TIME: Final = 1024


class WordCache:
    """Tokenises without special tokens; for tokenizers that :func:`splits_at_spaces`.

    Safe to use from many threads.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known = {"": b""}
        self._before: dict[str, bytes] = {}

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
            # Not emptied: other threads go on with it, and what is used comes back from it.
            self._before, self._known = self._known, {"": b""}
        if len(learned) < KNOWN_WORDS:
            self._known.update(learned)

    def _learned(self, words: set[str]) -> dict[str, bytes]:
        before = self._before
        learned = {word: before[word] for word in words if word in before}
        new = list(words - learned.keys())
        learned.update(zip(new, encode_ids(self._tokenizer, new), strict=True))
        return learned


def encode_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[bytes]:
    """Return the ids of each text, as bytes of int32, without special tokens."""
    # The fast one leaves out the characters of each token; a tokenizer's own form of a text is large.
    return [
        np.array(encoding.ids, dtype=np.int32).tobytes()
        for start in range(0, len(texts), AT_A_TIME)
        for encoding in tokenizer.encode_batch_fast(
            texts[start : start + AT_A_TIME], add_special_tokens=False
        )
    ]


def splits_at_spaces(tokenizer: Tokenizer) -> bool:
    """Say whether the tokens of a text are those of its parts between spaces and line ends.

    So it is with BERT's: what it does to characters looks at no neighbour beyond a space, and words end
    there. Only a token that is itself found in the text, such as ``[SEP]``, could hold a space.
    """
    parts = json.loads(tokenizer.to_str())
    kinds = [(parts.get(name) or {}).get("type") for name in ("normalizer", "pre_tokenizer", "model")]
    added = [token["content"] for token in parts.get("added_tokens") or ()]
    return kinds == ["BertNormalizer", "BertPreTokenizer", "WordPiece"] and not any(
        character.isspace() for content in added for character in content
    )
