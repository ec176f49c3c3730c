"""All device workers of this machine, without a router: ``python -m workers.launcher [N]``."""

import sys
import time

from sutra_tasks.cli.server import warnings_of
from sutra_tasks.errors import SutraError
from sutra_tasks.host.local_fleet import (
    await_devices,
    free_fleet_number,
    local_devices,
    run_workers,
    stop_on_signals,
)
from sutra_tasks.host.processes import end_on_signals
from sutra_tasks.host.supervisor import worker_specs
from sutra_tasks.settings import settings

__all__ = ["main"]


def main(count: int | None) -> None:
    """Keep a device worker alive for each GPU, or each group of cores, until a signal.

    Raises:
        SutraError: one cannot start, and says why.
    """
    options = settings()
    for warning in warnings_of(options, "device"):
        sys.stderr.write(f"launcher: {warning}\n")
    chosen = local_devices(options, count, number=free_fleet_number(options, count))
    devices = [spec for spec in worker_specs(options, chosen) if spec.device_id]
    with stop_on_signals(), run_workers(options, devices, report=print) as supervisor:
        await_devices(supervisor, options, chosen)
        while True:
            time.sleep(supervisor.step(time.monotonic()))


if __name__ == "__main__":
    end_on_signals()
    try:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else None)
    except (SutraError, ValueError) as error:
        sys.exit(f"launcher: {error}")
