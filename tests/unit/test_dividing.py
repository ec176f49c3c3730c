"""Dividing the rows of a call into parts."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st

from sutra_tasks.fanout.dividing import PARTS_PER_DEVICE, parts_of

TOKENS = st.lists(st.integers(1, 512), min_size=1, max_size=300)


@laws(max_examples=120, deadline=None)
@given(tokens=TOKENS, devices=st.integers(0, 20), most=st.integers(1, 4096))
def test_parts_are_all_rows_in_order_and_none_is_empty(
    tokens: list[int], devices: int, most: int
) -> None:
    parts = parts_of(tokens, devices=devices, most_tokens=most)
    assert [row for part in parts for row in part] == list(range(len(tokens)))
    assert all(parts)


@laws(max_examples=120, deadline=None)
@given(tokens=TOKENS, devices=st.integers(0, 20), most=st.integers(1, 4096))
def test_no_part_is_over_a_batch_but_a_row_that_is(tokens: list[int], devices: int, most: int) -> None:
    for part in parts_of(tokens, devices=devices, most_tokens=most):
        assert len(part) == 1 or sum(tokens[part.start : part.stop]) <= most


@laws(max_examples=120, deadline=None)
@given(tokens=TOKENS, devices=st.integers(1, 20), most=st.integers(512, 8192))
def test_parts_keep_every_device_about_equally_busy(tokens: list[int], devices: int, most: int) -> None:
    sizes = [sum(tokens[p.start : p.stop]) for p in parts_of(tokens, devices=devices, most_tokens=most)]
    goal = min(most, max(1.0, sum(tokens) / (PARTS_PER_DEVICE * devices)))
    goal = sum(tokens) / math.ceil(sum(tokens) / goal)  # as many parts, of the same size
    longest = max(tokens)
    # Each part is as near to the goal as whole rows allow.
    assert max(sizes) <= goal + longest / 2 or max(sizes) in tokens
    # No two neighbours would have been one part.
    for one, next_one in pairwise(sizes[:-1]):
        assert one + next_one > goal


@pytest.mark.parametrize("devices", [1, 2, 3, 8, 16])
def test_equal_rows_are_spread_fairly(devices: int) -> None:
    parts = parts_of([512] * 2400, devices=devices, most_tokens=10**9)
    assert PARTS_PER_DEVICE * devices - 1 <= len(parts) <= PARTS_PER_DEVICE * devices + 1
    # The device that is free first takes the next part: none waits long for the last.
    load = [0] * devices
    for part in parts:
        load[load.index(min(load))] += len(part)
    assert max(load) <= 1.3 * 2400 / devices


def test_few_rows_are_one_a_part_where_there_are_devices_for_them() -> None:
    assert parts_of([512] * 4, devices=16, most_tokens=8192) == [range(n, n + 1) for n in range(4)]
