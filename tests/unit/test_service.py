"""One call answered by one device: shapes, details and refusals."""

import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from sutra_tasks.batching.batcher import Batcher
from sutra_tasks.batching.jobs import DeviceBroken, Drained, JobContext, Unwanted
from sutra_tasks.batching.next_batch import Limits
from sutra_tasks.batching.service import EmbeddingService
from sutra_tasks.client.call import Call, estimated_tokens
from sutra_tasks.engines.encoder import TokenizedText
from sutra_tasks.engines.simulated_engine import WINDOW, SimulatedEncoder, vectors_of
from sutra_tasks.errors import EncodingError, InvalidOptionError
from sutra_tasks.settings import Settings
from sutra_tasks.vectors import Embeddings, Floats, Vectors

WIDTH = 8
SECRET = "not for logs"


class Fragile(SimulatedEncoder):
    """Fails on one text, and repeats it in its message."""

    def encode(self, batch: Sequence[TokenizedText]) -> Floats:
        for text in batch:
            if text.content == SECRET:
                raise ValueError(text.content)
        return super().encode(batch)


@pytest.fixture
def batcher() -> Iterator[Batcher]:
    batcher = Batcher(Limits(max_tokens=4096, max_texts=8, max_wait_s=0))
    batcher.start()
    yield batcher
    batcher.close(10)


@pytest.fixture
def service(batcher: Batcher) -> EmbeddingService:
    return EmbeddingService(Fragile(width=WIDTH), batcher, "gpu0", Settings())


def call(texts: Any, **options: Any) -> Call:
    return Call.of([texts], options, Settings())


@pytest.mark.parametrize(
    ("texts", "dimensions", "shape"),
    [
        ("one", None, (8,)),
        ("", None, (8,)),
        ("one", 3, (3,)),
        ("one", 8, (8,)),
        ([], None, (0, 8)),
        ([], 3, (0, 3)),
        (["one"], None, (1, 8)),
        (["one", "two", "one"], 3, (3, 3)),
    ],
)
@pytest.mark.parametrize("details", [False, True])
def test_one_text_gives_a_vector_and_a_list_gives_rows(
    service: EmbeddingService, texts: Any, dimensions: int | None, shape: Any, details: bool
) -> None:
    found = service.answer(service.prepare(call(texts, dimensions=dimensions, details=details)))
    if details:
        assert isinstance(found, Embeddings)
        found = found.vectors
    assert isinstance(found, Vectors)
    assert found.shape == shape
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(np.atleast_2d(found), axis=1), 1, rtol=1e-5)


def test_rows_are_those_of_the_texts_in_order(service: EmbeddingService) -> None:
    texts = ["a much longer text than", "b", "c d", "b"]
    found = service.answer(service.prepare(call(texts, normalize=False)))
    np.testing.assert_array_equal(found, vectors_of(texts, WIDTH))


def test_details_are_those_of_the_texts(service: EmbeddingService) -> None:
    found = service.answer(
        service.prepare(call(["one", "word " * WINDOW, "b c"], details=True, dimensions=4))
    )
    assert isinstance(found, Embeddings)
    assert (found.model, found.space, found.device) == ("simulated", "simulated-1:4", "gpu0")
    assert found.tokens == (3, WINDOW + 2, 4)
    assert found.truncated == (False, False, False)
    assert found.chunks == (1, 2, 1)
    assert found.spans[0] == ((0, 3),)
    assert found.weights[0] == (1,)
    assert found.queue_s >= 0
    assert found.compute_s > 0


def test_details_of_nothing_are_empty(service: EmbeddingService) -> None:
    found = service.answer(service.prepare(call([], details=True)))
    assert isinstance(found, Embeddings)
    assert (found.tokens, found.truncated, found.chunks) == ((), (), ())
    assert (found.space, found.queue_s, found.compute_s) == ("simulated-1:8", 0, 0)


@pytest.mark.parametrize("texts", ["one", []])
@pytest.mark.parametrize(
    ("option", "value", "said"),
    [("prompt", "poem", "document, query"), ("dimensions", WIDTH + 1, "8 or fewer")],
)
def test_what_the_model_cannot_give_is_refused(
    service: EmbeddingService, texts: Any, option: str, value: Any, said: str
) -> None:
    with pytest.raises(InvalidOptionError, match=said) as refused:
        service.answer(service.prepare(call(texts, **{option: value})))
    assert refused.value.option == option


def test_a_failure_names_device_and_position_and_tells_no_text(service: EmbeddingService) -> None:
    with pytest.raises(EncodingError) as failed:
        service.answer(service.prepare(call(["a", "b", SECRET])))
    error = failed.value
    assert (error.device, error.position, error.reason) == ("gpu0", 2, "ValueError")
    assert SECRET not in "".join(traceback.format_exception(error))


@pytest.mark.parametrize("texts", ["one", ["a", "b"], []])
def test_no_batch_waits_for_a_call_whose_rows_are_submitted(
    service: EmbeddingService, batcher: Batcher, texts: Any
) -> None:
    context = JobContext(announcement=batcher.announce())
    service.answer(service.prepare(call(texts)), context)
    assert not batcher._announced


def test_an_answer_is_counted_with_its_time(batcher: Batcher) -> None:
    counted: list[tuple[float, dict[str, float]]] = []

    def count(seconds: float, **work: float) -> None:
        counted.append((seconds, work))

    service = EmbeddingService(Fragile(width=WIDTH), batcher, "gpu0", Settings(), on_answer=count)
    asked = call(["one", "two"])
    service.answer(service.prepare(asked))
    [(seconds, work)] = counted
    assert 0 < work.pop("compute_s") <= seconds
    assert work == {"tokens": 6, "estimated_tokens": estimated_tokens(2, asked.bytes)}


def test_a_stopping_device_gives_the_call_back(service: EmbeddingService, batcher: Batcher) -> None:
    batcher.drain()
    with pytest.raises(Drained):
        service.answer(service.prepare(call("one")))


def test_a_call_that_is_given_up_is_not_answered(service: EmbeddingService) -> None:
    with pytest.raises(Unwanted):
        service.answer(service.prepare(call(["one", "two"])), JobContext(lambda: False))


def test_a_broken_device_blames_no_text(batcher: Batcher, service: EmbeddingService) -> None:
    batcher._self_check = lambda: False
    with pytest.raises(DeviceBroken) as broken:
        service.answer(service.prepare(call(["a", SECRET])))
    assert broken.value.position == 1
    assert SECRET not in "".join(traceback.format_exception(broken.value))
