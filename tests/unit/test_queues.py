"""What waits is counted over all priorities; a server would add nothing, so there is none."""

import fakeredis

from sutra_tasks.fleet.queues import lanes
from sutra_tasks.fleet.registry import queue_lengths


def test_a_queue_is_as_long_as_all_its_lanes() -> None:
    with fakeredis.FakeRedis() as client:
        for number, one in enumerate(lanes("q"), start=1):
            client.lpush(one, *["message"] * number)
        assert queue_lengths(client, ["q", "empty"]) == {"q": 10, "empty": 0}
