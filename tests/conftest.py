"""What all tiers share: no network, a way to await a condition, and one to close a result backend."""

import os
import signal
import time
from collections.abc import Callable
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
for _name in [name for name in os.environ if name.startswith("SUTRA_")]:
    del os.environ[_name]
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # So it is in what a script starts in the background, and would be in the commands that tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def wait_until(condition: Callable[[], object], *, within_s: float = 20.0) -> None:
    """Return as soon as ``condition()`` is true; fail when it is not within ``within_s``."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not true within {within_s} s"
        time.sleep(0.01)  # the one place that polls


def disconnect(backend: Any) -> None:
    """Close the connections of a result backend: Celery leaves them to the garbage collector."""
    backend.result_consumer._pubsub = None  # it would connect again for a result that is let go later
    backend.client.connection_pool.disconnect()
