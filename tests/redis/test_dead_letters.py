"""A message that was given up is kept until a person decides, and nothing of it is lost or doubled."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING

import pytest
import redis

from sutra_tasks import keys
from sutra_tasks.broker.attempts import ATTEMPTS, attempts_of
from sutra_tasks.broker.dead_letters import DeadLetter, add_dead_letter, dead_letters, drop, retry
from sutra_tasks.broker.queues import lane
from sutra_tasks.errors import PoisonMessageError
from sutra_tasks.membership.reaper import reap
from tests.redis.flow import Worker, message, numbers, send
from tests.redis.peers import waiting

if TYPE_CHECKING:
    from collections.abc import Iterator

ERROR = PoisonMessageError(3, "workers died or failed with it")


@pytest.fixture(autouse=True)
def _swept(_nothing_is_left_behind: None, client: redis.Redis) -> Iterator[None]:
    """What a test leaves waiting is its own business."""
    yield
    client.flushdb()


def given_up(client: redis.Redis, *messages: bytes) -> list[DeadLetter]:
    """Give messages up, one a second."""
    for at, raw in enumerate(messages):
        task_id = json.loads(raw)["headers"]["id"]
        add_dead_letter(client, task_id, raw, reason=ERROR.reason, attempts=3, now=1000.0 + at)
    return dead_letters(client)


def test_nothing_was_given_up_at_first(client: redis.Redis) -> None:
    assert dead_letters(client) == []
    assert retry(client, []) == drop(client, []) == 0


def test_what_was_given_up_is_listed_the_oldest_first(client: redis.Redis) -> None:
    messages = [message(number) for number in (5, 3, 4)]
    letters = given_up(client, *messages)
    assert letters == [
        DeadLetter(str(number), ERROR.reason, 3, 1000.0 + at, raw.decode())
        for at, (number, raw) in enumerate(zip((5, 3, 4), messages, strict=True))
    ]
    assert client.ttl(keys.dead_letters()) == -1


def test_a_letter_shows_no_text(client: redis.Redis) -> None:
    [letter] = given_up(client, message(0).replace(b'"body": "[[], {}, {}]"', b'"body": "secret"'))
    assert "secret" in letter.message
    assert "secret" not in repr(letter)


def test_a_message_given_up_twice_is_one_letter(client: redis.Redis) -> None:
    # A router may be killed between keeping a message and acknowledging it.
    [letter] = given_up(client, message(0), message(0))
    assert letter.at == 1001.0


def test_a_letter_of_another_version_is_left_alone(client: redis.Redis) -> None:
    client.hset(keys.dead_letters(), "later", json.dumps({"v": 2, "task_id": "later"}))
    [letter] = given_up(client, message(0))
    assert letter.task_id == "0"
    assert drop(client, dead_letters(client)) == 1
    assert client.hexists(keys.dead_letters(), "later")


def test_a_message_sent_again_is_the_same_but_for_its_attempts(client: redis.Redis) -> None:
    send(client, message(0, priority=6, texts=2, size=9))
    died = Worker(client, "gpu0")
    died.queue = keys.EMBED_QUEUE
    [sent] = died.take()
    reap(client, client, died.incarnation)
    [raw] = waiting(client, keys.EMBED_QUEUE)
    assert attempts_of(json.loads(raw)["headers"]) == 1
    client.delete(lane(keys.EMBED_QUEUE, 6))

    assert retry(client, given_up(client, raw)) == 1
    [again] = client.lrange(lane(keys.EMBED_QUEUE, 6), 0, -1)
    expected, found = json.loads(raw), json.loads(again)
    assert expected["headers"].pop(ATTEMPTS) == 1
    assert found == expected
    assert found["body"] == json.loads(sent)["body"]
    assert dead_letters(client) == []


def test_a_message_sent_again_waits_its_turn(client: redis.Redis) -> None:
    letters = given_up(client, message(0), message(1), message(2))
    send(client, message(9))
    assert retry(client, letters[:2]) == 2
    assert numbers(waiting(client, keys.EMBED_QUEUE)) == [9, 0, 1]
    assert dead_letters(client) == letters[2:]


def test_any_number_may_send_again_at_once(client: redis.Redis, url: str) -> None:
    letters = given_up(client, *(message(number) for number in range(60)))
    start, sent = threading.Barrier(4), []

    def run() -> None:
        with redis.Redis.from_url(url) as own:
            start.wait()
            sent.append(retry(own, letters))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(sent) == 60
    assert sorted(numbers(waiting(client, keys.EMBED_QUEUE))) == list(range(60))
    assert dead_letters(client) == []


def test_who_sends_again_what_somebody_dropped_sends_nothing(client: redis.Redis) -> None:
    letters = given_up(client, message(0), message(1))
    assert drop(client, letters[:1]) == 1
    assert drop(client, letters[:1]) == 0
    assert retry(client, letters) == 1
    assert numbers(waiting(client, keys.EMBED_QUEUE)) == [1]
    assert retry(client, letters) == 0


def test_what_is_dropped_is_gone(client: redis.Redis) -> None:
    letters = given_up(client, message(0), message(1))
    assert drop(client, letters) == 2
    assert client.keys() == []
