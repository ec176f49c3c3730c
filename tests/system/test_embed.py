"""The main job through real workers: what a caller sends, and what comes back."""

import json

import numpy as np
import pytest
from celery.exceptions import TaskRevokedError

from sutra_tasks import Embeddings, InvalidOptionError, UnsupportedVersionError, embed, keys
from sutra_tasks.broker.queues import lane
from sutra_tasks.client.call import HEADER
from sutra_tasks.engines.simulated_engine import vectors_of


def cancel_consumer(queue, wait_until):
    """Have the device take no more; a busy machine may not answer at once."""
    control = embed.app.control
    wait_until(lambda: len(control.cancel_consumer(queue, reply=True)) == len(("router", "device")))


@pytest.mark.usefixtures("fleet")
def test_a_text_gives_its_vector_and_a_list_gives_rows():
    one = embed.delay("one text").get(timeout=20)
    assert one.shape == (384,)
    assert one.dtype == np.float32
    assert np.allclose(one, vectors_of(["one text"], 384)[0], atol=1e-6)
    many = embed.delay(["a", "b", "\0", "", "é" * 3000]).get(timeout=20)
    assert many.shape == (5, 384)
    assert np.allclose(many[:4], vectors_of(["a", "b", "\0", ""], 384), atol=1e-6)
    assert embed.delay([]).get(timeout=20).shape == (0, 384)


def test_details_say_where_and_how(fleet):
    options = {"prompt": "query", "dimensions": 256, "details": True}
    got = embed.delay(["a b c", "w " * 600], **options).get(timeout=20)
    assert isinstance(got, Embeddings)
    assert got.vectors.shape == (2, 256)
    assert np.allclose(np.linalg.norm(got.vectors, axis=1), 1, atol=1e-6)
    assert got.tokens == (5, 602)
    assert got.truncated == (False, False)
    assert got.chunks == (1, 2)
    assert got.spans[1][0][0] == 0
    assert got.spans[1][-1][1] == len("w " * 600) - 1
    cut = embed.delay("w " * 600, truncate=True, **options).get(timeout=20)
    assert (cut.tokens, cut.truncated, cut.spans) == ((512,), (True,), (((0, 1019),),))
    assert got.device in fleet.device_ids
    assert got.space == "simulated-1:256"
    assert got.compute_s >= 0


@pytest.mark.usefixtures("fleet")
def test_what_only_the_device_can_refuse_is_raised_with_its_facts():
    with pytest.raises(InvalidOptionError) as refused:
        embed.delay("x", dimensions=1000).get(timeout=20)
    assert (refused.value.option, refused.value.value) == ("dimensions", "1000")
    with pytest.raises(InvalidOptionError, match="document, query"):
        embed.delay("x", prompt="sonnet").get(timeout=20)
    assert embed.delay("x").get(timeout=20).shape == (384,)  # the worker is unharmed


@pytest.mark.usefixtures("fleet")
def test_messages_of_any_client_are_checked_by_the_worker():
    stock = embed.app.send_task
    with pytest.raises(Exception, match="None"):
        stock(keys.EMBED_TASK, (["a", None],)).get(timeout=20)
    with pytest.raises(UnsupportedVersionError, match="message has version 99"):
        stock(keys.EMBED_TASK, ("a",), headers={HEADER: {"v": 99}}).get(timeout=20)
    assert stock(keys.EMBED_TASK, ("a",)).get(timeout=20).shape == (384,)


@pytest.mark.usefixtures("fleet")
def test_an_expired_task_is_not_computed():
    with pytest.raises(TaskRevokedError):
        embed.apply_async(("late",), expires=-5).get(timeout=20)


def test_a_forwarded_message_is_what_was_sent(start_fleet, client, wait_until):
    with start_fleet() as fleet:
        queue = keys.device_queue(fleet.device_ids[0])
        cancel_consumer(queue, wait_until)
        result = embed.apply_async(
            (["text " * 50],),
            compression="zlib",
            priority=9,
            expires=600,
            time_limit=77,
            stamped_headers=["tenant"],
            tenant="acme",
        )
        low = lane(queue, 9)
        wait_until(lambda: client.llen(low) == 1)
        message = json.loads(client.lindex(low, 0))
        headers = message["headers"]
        assert headers["compression"] == "application/x-gzip"
        assert headers["timelimit"] == [77, None]
        assert headers["expires"]
        assert headers["stamps"] == {"tenant": "acme"}
        assert headers["id"] == result.id
        assert message["properties"]["priority"] == 9
        assert message["properties"]["delivery_info"]["routing_key"] == keys.EMBED_QUEUE
        embed.app.control.add_consumer(queue, reply=True)
        assert result.get(timeout=20).shape == (1, 384)


def test_a_message_keeps_its_redelivered_mark(start_fleet, client, wait_until):
    with start_fleet() as fleet:
        queue = keys.device_queue(fleet.device_ids[0])
        cancel_consumer(queue, wait_until)
        embed.delay("once more")
        wait_until(lambda: client.llen(queue) == 1)
        message = json.loads(client.rpop(queue))
        message["headers"]["redelivered"] = True
        message["properties"]["delivery_info"]["redelivered"] = True
        marked = json.dumps(message)
        client.lpush(keys.EMBED_QUEUE, marked)
        wait_until(lambda: client.llen(queue) == 1)
        assert client.rpop(queue).decode() == marked


def test_a_waiting_list_does_not_hold_up_a_single_text(start_fleet):
    with start_fleet(simulated_per_token_s=0.0001, batch_tokens=1024):
        long = embed.delay(["word " * 30] * 640)  # 20 batches of 0.1 s
        single = embed.delay("quick", details=True).get(timeout=20)
        assert not long.ready()
        assert single.queue_s < 1.0
        assert long.get(timeout=30).shape == (640, 384)


def test_results_live_as_long_as_they_are_set_to(start_fleet, client):
    with start_fleet(result_ttl_s=123):
        result = embed.delay("x")
        result.get(timeout=20)
        assert 100 < client.ttl(f"celery-task-meta-{result.id}") <= 123
