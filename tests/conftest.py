"""For all tests: an environment without network and settings, ``wait_until`` and ``disconnect``."""

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
    # A shell ignores SIGINT in background jobs; the commands that tests start would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def wait_until(condition: Callable[[], object], *, within_s: float = 20.0) -> None:
    """Return as soon as ``condition()`` is true; fail when it is not within ``within_s``."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not true within {within_s} s"
        time.sleep(0.01)  # the one place that polls


def disconnect(backend: Any) -> None:
    """Close the connections of a result backend: Celery leaves them to the garbage collector."""
    if not hasattr(backend, "result_consumer"):
        return  # the backend of an app without a server, which has no connections
    backend.result_consumer._pubsub = None  # else collecting a result later would connect it again
    backend.client.connection_pool.disconnect()
