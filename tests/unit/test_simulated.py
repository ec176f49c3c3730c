"""The simulated engine: the same vectors everywhere, and the time of a device."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st

from sutra_tasks.engines.simulated_engine import SPECIAL_TOKENS, WINDOW, SimulatedEncoder, vectors_of
from sutra_tasks.errors import CorruptMessageError

WORDS = st.lists(st.text("abc é", max_size=8), min_size=2, max_size=6, unique=True)


@laws(max_examples=60, deadline=None)
@given(texts=WORDS, width=st.integers(1, 64))
def test_vectors_depend_on_the_text_alone(texts: list[str], width: int) -> None:
    rows = vectors_of(texts, width)
    assert rows.shape == (len(texts), width)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(vectors_of(texts[::-1], width)[::-1], rows)


@laws(max_examples=30, deadline=None)
@given(texts=WORDS)
def test_different_texts_are_nearly_orthogonal(texts: list[str]) -> None:
    rows = vectors_of(texts, 384)
    assert np.abs(rows @ rows.T - np.eye(len(texts))).max() < 0.4


def test_vectors_are_the_same_in_every_release() -> None:
    # Held fixed: a fleet of two releases must agree.
    assert vectors_of(["sutra"], 4)[0].tolist() == pytest.approx(
        [-0.523855, -0.706055, 0.331188, 0.342604], abs=1e-6
    )


@pytest.mark.parametrize("words", [0, 1, WINDOW - SPECIAL_TOKENS, 5 * WINDOW])
def test_words_are_tokens_and_none_is_left_out(words: int) -> None:
    encoder = SimulatedEncoder()
    (text,) = encoder.tokenize(["word " * words], None)
    assert text.tokens == words + SPECIAL_TOKENS
    assert len(encoder.offsets(text)) == words


def test_a_window_is_a_slice_of_the_text() -> None:
    encoder = SimulatedEncoder()
    (text,) = encoder.tokenize(["  one two\nthree  four "], None)
    windows = encoder.windows(text, encoder.offsets(text), [(0, 2), (1, 4)])
    assert [(one.content, one.tokens) for one in windows] == [
        ("one two", 2 + SPECIAL_TOKENS),
        ("two\nthree  four", 3 + SPECIAL_TOKENS),
    ]


def test_what_is_packed_is_what_is_unpacked() -> None:
    encoder = SimulatedEncoder()
    texts = encoder.tokenize(["one", "", "two three 🙂"], None)
    packed = json.loads(json.dumps(encoder.pack(texts)))
    assert encoder.unpack(packed) == texts


@pytest.mark.parametrize("packed", [{}, {"texts": 1}, {"texts": [[1]]}, {"texts": [["a", "b"]]}])
def test_what_was_not_packed_here_is_refused(packed: dict[str, Any]) -> None:
    with pytest.raises(CorruptMessageError):
        SimulatedEncoder().unpack(packed)


@pytest.mark.parametrize(
    ("texts", "seconds"),
    [(["a b c"], 0.5 + 0.01 * 5), (["a b c", "a"], 0.5 + 0.01 * 10), (["a"] * 4, 0.5 + 0.01 * 12)],
)
def test_a_batch_takes_the_time_of_its_padded_tokens(texts: list[str], seconds: float) -> None:
    slept: list[float] = []
    clock = iter([10.0, 10.1])  # making up the vectors took 0.1 s
    encoder = SimulatedEncoder(
        fixed_s=0.5, per_token_s=0.01, sleep=slept.append, clock=lambda: next(clock)
    )
    encoder.encode(encoder.tokenize(texts, None))
    assert slept == [pytest.approx(seconds - 0.1)]


def test_no_time_is_taken_unless_asked() -> None:
    slept: list[float] = []
    encoder = SimulatedEncoder(sleep=slept.append)
    encoder.encode(encoder.tokenize(["a"], None))
    assert slept == []


def test_encoding_gives_the_vectors_of_the_texts() -> None:
    encoder = SimulatedEncoder(width=16)
    texts = ["a", "b  c\n", ""]
    rows = encoder.encode(encoder.tokenize(texts, "query"))
    assert encoder.info.width == 16
    np.testing.assert_array_equal(rows, vectors_of(texts, 16))
