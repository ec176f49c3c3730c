"""A device's work on long texts, without its threads and a real engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from celery.app.task import Context
from celery.exceptions import Ignore

from sutra_tasks import keys
from sutra_tasks.batching.batcher import Batcher
from sutra_tasks.batching.jobs import NO_CONTEXT
from sutra_tasks.batching.next_batch import Limits
from sutra_tasks.batching.service import EmbeddingService, Prepared
from sutra_tasks.broker.result_backend import RequeueMessage
from sutra_tasks.client.call import HEADER, Call
from sutra_tasks.engines.simulated_engine import SimulatedEncoder
from sutra_tasks.errors import EncodingError
from sutra_tasks.fanout.long_texts import LongTexts
from sutra_tasks.routing.snapshot import Device, Fleet
from sutra_tasks.settings import Settings
from sutra_tasks.vectors import Embeddings, Floats, Vectors
from tests.redis.fanout.parts import (
    CALLBACKS,
    documents_on,
)
from tests.redis.flow import message
from tests.redis.peers import absent_server, waiting

if TYPE_CHECKING:
    import redis

    from sutra_tasks.engines.encoder import TokenizedText
    from sutra_tasks.fanout.documents import Documents

OPTIONS = Settings(sequence_threshold=32, block_size=32, overlap_tokens=6, batch_tokens=64)
TEXTS = ["short", " ".join(f"word{n}" for n in range(500)), " ".join(f"more{n}" for n in range(90))]


class Refusing(SimulatedEncoder):
    """An engine whose vectors are zeros, so that chunks make no vector."""

    def encode(self, batch: Sequence[TokenizedText]) -> Floats:
        return np.zeros((len(batch), self.info.width), dtype=np.float32)


@pytest.fixture
def share(documents: Documents) -> Iterator[Callable[..., LongTexts]]:
    """``share(device, encoder)``: the long texts of a device that computes on the caller's thread."""
    with ExitStack() as opened:

        def share_of(device: str = "g0", encoder: SimulatedEncoder | None = None) -> LongTexts:
            engine = encoder or SimulatedEncoder(width=8)
            batcher = Batcher(Limits(max_tokens=256, max_texts=8, max_wait_s=0))
            batcher.start()
            opened.callback(batcher.close, 10)
            service = EmbeddingService(engine, batcher, device, OPTIONS)
            return LongTexts(
                lambda *_: service, documents, device, OPTIONS, lambda: nullcontext(NO_CONTEXT)
            )

        yield share_of


def delivered(raw: bytes, *, weight: int = 0) -> Any:
    """Return a message as a device takes it."""
    headers = json.loads(raw)["headers"]
    return SimpleNamespace(
        headers=headers, payload=([], {}, CALLBACKS), sutra_raw=raw, sutra_weight=weight
    )


def spread(
    of: LongTexts, *devices: Device, weight: int = 0, strategy: str | None = None, **asked: Any
) -> Prepared:
    """Fan out a call whose message counts so many tokens in its device's load."""
    prepared = of._services(None, None).prepare(Call.of([TEXTS], asked, Settings()))
    sent = delivered(message(1), weight=weight)
    sent.headers[HEADER]["strategy"] = strategy
    of.fan_out(of._services(None, None), prepared, sent, Fleet(devices))
    return prepared


def request_of(raw: bytes) -> Context:
    return Context(json.loads(raw)["headers"])


def device(name: str, **facts: Any) -> Device:
    return Device(name, keys.device_queue(name), tokens_per_s=100.0, **facts)


@pytest.mark.parametrize("asked", [{}, {"details": True, "chunk_vectors": True, "dimensions": 3}])
def test_devices_that_share_a_text_give_what_one_would(
    client: redis.Redis, documents: Documents, share: Callable[..., LongTexts], asked: dict[str, Any]
) -> None:
    workers = {name: share(name) for name in ("g0", "g1")}
    prepared = spread(workers["g0"], device("g0"), device("g1"), **asked)
    seen = set()
    for name, worker in workers.items():
        for raw in waiting(client, keys.device_queue(name)):
            request = request_of(raw)
            seen.add(name)
            documents.join(request.group, request.group_index, worker.part(request))
    assert seen == {"g0", "g1"}
    got, alone = workers["g1"].combine("1"), workers["g0"]._services(None, None).answer(prepared)
    if not asked:
        assert isinstance(got, Vectors)
        assert np.allclose(got, np.asarray(alone), atol=1e-6)
        return
    assert isinstance(got, Embeddings)
    assert isinstance(alone, Embeddings)
    assert np.allclose(got.vectors, alone.vectors, atol=1e-6)
    assert got.chunk_vectors is not None
    assert np.allclose(got.chunk_vectors, np.asarray(alone.chunk_vectors), atol=1e-6)
    assert (got.spans, got.weights, got.tokens) == (alone.spans, alone.weights, alone.tokens)
    assert got.device == "g0,g1"
    assert got.space == "simulated-1:3"
    assert got.compute_s > 0


@pytest.mark.parametrize(
    ("strategy", "weight", "expected"),
    [(None, 0, "one"), (None, 10**6, "both"), ("round_robin", 0, "both")],
)
def test_parts_go_by_the_strategy_and_the_call_itself_is_no_backlog(
    client: redis.Redis,
    share: Callable[..., LongTexts],
    strategy: str | None,
    weight: int,
    expected: str,
) -> None:
    devices = device("g0", backlog_messages=1, backlog_tokens=10**6), device("g1")
    spread(share("g0"), *devices, weight=weight, strategy=strategy)
    lengths = [client.llen(keys.device_queue(name)) for name in ("g0", "g1")]
    assert sum(lengths) >= 8
    if expected == "both":
        assert abs(lengths[0] - lengths[1]) <= 1
    else:
        assert lengths[0] == 0


def test_parts_beyond_the_credit_of_all_devices_wait_for_the_router(
    client: redis.Redis, share: Callable[..., LongTexts]
) -> None:
    spread(share("g0"), device("g0", credit_tokens=200), device("g1", credit_tokens=1))
    assert client.llen(keys.device_queue("g0")) >= 1
    assert client.llen(keys.device_queue("g1")) == 1
    assert client.llen(keys.EMBED_QUEUE) >= 2


def test_without_a_device_all_parts_wait_for_the_router(
    client: redis.Redis, share: Callable[..., LongTexts]
) -> None:
    spread(share("g0"))
    assert client.llen(keys.EMBED_QUEUE) >= 4


def test_a_part_asks_for_the_model_and_space_its_text_was_begun_with(
    client: redis.Redis, share: Callable[..., LongTexts]
) -> None:
    one = share("g0")
    spread(one, device("g0"))
    (raw, *_) = waiting(client, keys.device_queue("g0"))
    asked: list[tuple[str | None, str | None]] = []
    service = one._services(None, None)
    one._services = lambda model, space: asked.append((model, space)) or service  # type: ignore[func-returns-value]
    assert one.part(request_of(raw)) is not None
    assert asked == [("simulated", "simulated-1:8")]


def test_a_part_that_is_done_or_unwanted_is_nothing(
    client: redis.Redis, documents: Documents, share: Callable[..., LongTexts]
) -> None:
    one = share("g0")
    spread(one, device("g0"))
    first, second, *_ = map(request_of, waiting(client, keys.device_queue("g0")))
    documents.join(first.group, first.group_index, one.part(first))
    assert one.part(first) is None
    assert one.part(second) is not None
    documents.store.delete("1")
    assert one.part(second) is None
    with pytest.raises(Ignore):
        one.combine("1")


def test_chunks_without_a_direction_are_an_error_of_their_text(
    client: redis.Redis, documents: Documents, share: Callable[..., LongTexts]
) -> None:
    one = share("g0", Refusing(width=8))
    spread(one, device("g0"))
    for raw in waiting(client, keys.device_queue("g0")):
        request = request_of(raw)
        documents.join(request.group, request.group_index, one.part(request))
    with pytest.raises(EncodingError) as failed:
        one.combine("1")
    assert failed.value.position == 1


def test_an_error_is_raised_as_it_is(documents: Documents, share: Callable[..., LongTexts]) -> None:
    one = share("g0")
    spread(one, device("g0"))
    documents.fail("1", EncodingError("g7", 2, "no"))
    with pytest.raises(EncodingError) as failed:
        one.combine("1")
    assert failed.value.args == ("g7", 2, "no")


def test_a_server_that_is_away_sends_the_message_back(share: Callable[..., LongTexts]) -> None:
    one = share("g0")
    away = absent_server()
    one._documents = documents_on(away, away)
    with pytest.raises(RequeueMessage):
        spread(one, device("g0"))
    with pytest.raises(RequeueMessage):
        one.part(Context(group="1", group_index=0))
    with pytest.raises(RequeueMessage):
        one.combine("1")
