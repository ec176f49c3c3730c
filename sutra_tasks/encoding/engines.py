"""The engines by the names ``SUTRA_ENGINE`` gives them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sutra_tasks.encoding.simulated import SimulatedEncoder
from sutra_tasks.errors import ModelError

if TYPE_CHECKING:
    from sutra_tasks.encoding.encoder import Encoder
    from sutra_tasks.settings import Settings

__all__ = ["load_engine"]


def load_engine(options: Settings) -> Encoder:
    """Load the engine and model that ``options`` name.

    Raises:
        ModelError: the engine is not installed, or the model cannot be loaded.
    """
    if options.engine == "simulated":
        return SimulatedEncoder(
            width=options.simulated_width,
            fixed_s=options.simulated_fixed_s,
            per_token_s=options.simulated_per_token_s,
        )
    try:
        # torch takes seconds to import, and the simulated engine does without.
        from sutra_tasks.encoding.torch_engine import TorchEncoder  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ModelError(
            options.model, f"needs {error.name}: pip install 'sutra-tasks[worker]'"
        ) from None
    return TorchEncoder(
        options.model,
        device=options.torch_device,
        threads=options.torch_threads,
        memory_share=options.gpu_memory_share,
        attention=options.attention,
        dtype=options.dtype,
    )
