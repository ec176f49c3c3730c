"""What ``embed`` does on a device: what holds up others, and what an admitted task does."""

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from sutra_tasks import keys
from sutra_tasks.batching.batcher import Batcher
from sutra_tasks.batching.next_batch import Limits
from sutra_tasks.batching.service import EmbeddingService
from sutra_tasks.client.call import Call
from sutra_tasks.device.execution import Execution
from sutra_tasks.device.tasks import DeviceTasks
from sutra_tasks.engines.encoder import TokenizedText
from sutra_tasks.engines.simulated_engine import SimulatedEncoder
from sutra_tasks.settings import Settings
from sutra_tasks.vectors import Floats

OPTIONS = Settings(device_id="g0", broker_url="redis://unused:1", sample_texts=0)


class Seen:
    """A device of which a test sees who had the lock in each step of a call."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, int]] = []
        self.announced: list[int] = []
        self.batcher = Batcher(Limits(max_tokens=4096, max_texts=8, max_wait_s=0))
        client: Any = SimpleNamespace()
        self.execution = Execution(OPTIONS, client, "g0.1")
        seen = self

        class Watched(SimulatedEncoder):
            def tokenize(self, texts: Sequence[str], prompt: str | None) -> list[TokenizedText]:
                seen.step("tokenize")
                return super().tokenize(texts, prompt)

            def encode(self, batch: Sequence[TokenizedText]) -> Floats:
                seen.step("encode")
                return super().encode(batch)

        service = EmbeddingService(Watched(width=4), self.batcher, "g0", OPTIONS)
        self.loaded = SimpleNamespace(service=service, reference="other")
        models: Any = SimpleNamespace(has=lambda model: model == "loaded", get=self.get)
        self.tasks = DeviceTasks(OPTIONS, client, models, self.batcher, self.execution)

    def step(self, name: str) -> None:
        self.steps.append((name, self.execution.lock._sharing))

    def get(self, *_: Any) -> SimpleNamespace:
        self.step("find model")
        self.announced.append(len(self.batcher._announced))
        return self.loaded

    def embed(self, **options: Any) -> Any:
        message = SimpleNamespace(headers={})
        request = SimpleNamespace(
            id="it", name=keys.EMBED_TASK, group=None, message=message, maybe_expire=lambda: False
        )
        self.execution.begin(request, self.batcher.announce())
        return self.tasks.embed(Call.of(["a text"], options, Settings()))


@pytest.fixture
def device() -> Iterator[Seen]:
    device = Seen()
    device.batcher.start()
    yield device
    device.batcher.close(10)


def test_a_suspect_waits_for_tokenizing_and_computing_but_for_no_model_that_is_loaded(
    device: Seen,
) -> None:
    assert device.embed().shape == (4,)
    assert dict(device.steps) == {"find model": 0, "tokenize": 1, "encode": 1}
    assert device.execution.lock._sharing == 0


@pytest.mark.parametrize(
    ("options", "expected"), [({}, 1), ({"model": "loaded"}, 1), ({"model": "x"}, 0)]
)
def test_no_batch_waits_for_a_call_whose_model_may_have_to_be_loaded(
    device: Seen, options: dict[str, Any], expected: int
) -> None:
    device.embed(**options)
    assert device.announced == [expected]
    assert not device.batcher._announced
