"""When a lease is over, by what one reaper has seen; and when a process has lost its own."""

from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st

from sutra_tasks.membership.leases import INTERRUPTED_S, LeaseLossDetector, LeaseObservations

LEASE_S = 12.0


def seen(*looks: tuple[float, dict[str, int]]) -> LeaseObservations:
    """Return what is known after looks at these times."""
    leases = LeaseObservations()
    for now, beats in looks:
        leases = leases.after(beats, now)
    return leases


def still(until: int, *, beats: int = 7, since: int = 0) -> list[tuple[float, dict[str, int]]]:
    """Look once a second at a worker whose beats stand still."""
    return [(float(now), {"a": beats}) for now in range(since, until + 1)]


def test_who_has_not_looked_ends_no_lease() -> None:
    assert LeaseObservations().ended(LEASE_S) == []


def test_a_lease_ends_exactly_when_it_stood_still_for_so_long() -> None:
    assert seen(*still(11)).ended(LEASE_S) == []
    assert seen(*still(12)).ended(LEASE_S) == ["a"]
    assert seen(*still(11), (11.999, {"a": 7})).ended(LEASE_S) == []


def test_a_beat_begins_a_lease_anew() -> None:
    looks = [*still(11), *still(23, beats=8, since=12)]
    assert seen(*looks).ended(LEASE_S) == []
    assert seen(*looks, (24.0, {"a": 8})).ended(LEASE_S) == ["a"]


def test_a_lease_that_was_taken_out_anew_has_beaten() -> None:
    # Its beats are counted from 1 again.
    assert seen(*still(11, beats=7), (12.0, {"a": 1})).ended(LEASE_S) == []


def test_who_left_is_not_remembered() -> None:
    looks = [*still(11), (12.0, {}), (13.0, {"a": 7})]
    assert seen(*looks).ended(LEASE_S) == []
    assert seen(*looks[:-1]).unchanged == {}


def test_each_lease_stands_for_itself() -> None:
    looks = [(float(now), {"a": 7, "b": now, "c": 3} if now > 5 else {"a": 7}) for now in range(13)]
    assert seen(*looks).ended(LEASE_S) == ["a"]


def test_an_interrupted_look_proves_nothing() -> None:
    later = 11 + INTERRUPTED_S
    assert seen(*still(11), (later, {"a": 7})).ended(LEASE_S) == ["a"]
    assert seen(*still(11), (later + 0.001, {"a": 7})).ended(LEASE_S) == []


def test_one_look_follows_another_unless_something_came_between() -> None:
    first = seen((5.0, {}))
    assert first.after({}, 5.0 + INTERRUPTED_S).is_uninterrupted_since(first)
    assert not first.after({}, 5.1 + INTERRUPTED_S).is_uninterrupted_since(first)
    assert not first.is_uninterrupted_since(LeaseObservations())


GAPS = st.lists(
    st.tuples(st.sampled_from([0.25, 1.0, 1.0, 1.0, 2.0, 3.0, 3.25, 20.0]), st.booleans()), max_size=60
)


@laws(max_examples=50, deadline=None)
@given(looks=GAPS)
def test_a_lease_is_over_if_and_only_if_an_unbroken_look_saw_no_beat(
    looks: list[tuple[float, bool]],
) -> None:
    leases, now, beats, quiet_since = LeaseObservations().after({"a": 0}, 0.0), 0.0, 0, 0.0
    for gap, beat in looks:
        now, beats = now + gap, beats + beat
        leases = leases.after({"a": beats}, now)
        if beat or gap > INTERRUPTED_S:
            quiet_since = now
        assert leases.ended(LEASE_S) == ["a"] * (now - quiet_since >= LEASE_S)


@laws(max_examples=50, deadline=None)
@given(rises=st.lists(st.integers(1, 3), min_size=1, max_size=20))
def test_a_lease_whose_beats_rise_is_not_lost(rises: list[int]) -> None:
    # By more than one if an answer was lost.
    lease, beats = LeaseLossDetector(), 0
    for rise in rises:
        beats += rise
        lease.observe(beats)
        assert not lease.is_lost


@laws(max_examples=50, deadline=None)
@given(before=st.integers(1, 50), after=st.integers(1, 50))
def test_a_lease_whose_beats_are_counted_anew_is_lost(before: int, after: int) -> None:
    lease = LeaseLossDetector()
    lease.observe(before)
    lease.observe(min(before, after))
    assert lease.is_lost
    lease.observe(min(before, after) + 1)
    assert lease.is_lost  # until somebody has acted on it
    lease.is_lost = False
    lease.observe(min(before, after) + 2)
    assert not lease.is_lost
