"""A text's place in the draw: at random, and always the same."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sutra_tasks.distillation.data.traffic_sample import priority

UNICODE = st.text(st.characters(exclude_categories=["Cs"]))


@given(UNICODE, st.binary(max_size=64))
def test_a_place_is_in_0_to_1_and_always_the_same(text: str, salt: bytes) -> None:
    place = priority(text, salt)
    assert 0 <= place < 1
    assert place == priority(text, salt)
    assert float(repr(place)) == place


def test_places_are_uniform_and_another_salt_draws_others() -> None:
    texts = [f"text {i}" for i in range(20_000)]
    one, other = (np.array([priority(text, salt) for text in texts]) for salt in (b"a", b"b"))
    for places in (one, other):
        np.testing.assert_allclose(np.sort(places), np.arange(20_000) / 20_000, atol=0.015)
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.03
    assert abs(np.corrcoef(one[1:], one[:-1])[0, 1]) < 0.03


def test_every_sample_of_k_is_as_likely() -> None:
    drawn = [min("abcde", key=lambda text: priority(text, bytes([salt]))) for salt in range(250)]
    counts = np.array([drawn.count(text) for text in "abcde"])
    assert ((counts - 50) ** 2 / 50).sum() < 18.5  # chi squared, 4 degrees of freedom: 1 in 1,000


def test_a_lone_surrogate_has_no_place() -> None:
    with pytest.raises(UnicodeEncodeError):
        priority("a\ud800", b"")
