"""Which models leave so that another fits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sutra_tasks.errors import ModelError
from sutra_tasks.models.loaded.eviction import MB, CachedModel, least_recently_used, models_to_evict

RESIDENTS = st.lists(
    st.builds(CachedModel, st.uuids().map(str), st.integers(0, 50), st.floats(0, 9)),
    unique_by=lambda one: one.reference,
)


@given(RESIDENTS, st.integers(-10, 200))
def test_those_that_stay_fit_and_were_used_later(held: list[CachedModel], room: int) -> None:
    gone = least_recently_used(held, room)
    stay = [one for one in held if one.reference not in gone]
    assert sum(one.size_bytes for one in stay) <= max(room, 0) or not stay
    used = {one.reference: one.used_at for one in held}
    assert all(used[name] <= one.used_at for name in gone for one in stay)
    # Nobody leaves without need.
    if gone:
        size = next(one.size_bytes for one in held if one.reference == gone[-1])
        assert sum(one.size_bytes for one in stay) + size > room


@given(
    RESIDENTS.map(
        lambda held: [CachedModel(one.reference, one.size_bytes * MB, one.used_at) for one in held]
    ),
    st.sets(st.integers(0, 9)),
    st.integers(0, 50),
    st.integers(1, 200),
)
def test_a_model_that_comes_keeps_all_within_the_limit_and_takes_away_none_that_stays(
    held: list[CachedModel], staying: set[int], size: int, limit: int
) -> None:
    held = [
        CachedModel(one.reference, one.size_bytes, one.used_at, stays=at in staying)
        for at, one in enumerate(held)
    ]
    fixed = sum(one.size_bytes for one in held if one.stays)
    try:
        gone = models_to_evict("new", size * MB, held, limit, may_exceed_limit=False)
    except ModelError:
        assert fixed + size * MB > limit * MB
        return
    left = [one for one in held if one.reference not in gone]
    assert all(one in left for one in held if one.stays)
    assert sum(one.size_bytes for one in left) + size * MB <= limit * MB


def test_a_candidate_stays_and_keeps_no_other_out() -> None:
    held = [
        CachedModel("default", 4 * MB, 0.0, stays=True),
        CachedModel("candidate", 4 * MB, 0.0, is_candidate=True),
        CachedModel("other", MB, 1.0),
    ]
    assert models_to_evict("new", 4 * MB, held, 10, may_exceed_limit=False) == ["other"]


def test_a_model_without_room_comes_only_may_exceed_limit() -> None:
    held = [CachedModel("default", 8 * MB, 0.0, stays=True), CachedModel("other", MB, 0.0)]
    with pytest.raises(ModelError, match="4 MB beside 8 MB of models that stay"):
        models_to_evict("new", 4 * MB, held, 10, may_exceed_limit=False)
    assert models_to_evict("new", 4 * MB, held, 10, may_exceed_limit=True) == ["other"]
