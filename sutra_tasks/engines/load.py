"""The engines by the names ``SUTRA_ENGINE`` gives them, and by what a model's folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sutra_tasks.engines.model_folder import locate
from sutra_tasks.engines.simulated_engine import SimulatedEncoder
from sutra_tasks.engines.static_engine import StaticEncoder, is_static
from sutra_tasks.errors import ModelError

if TYPE_CHECKING:
    from sutra_tasks.engines.encoder import Encoder
    from sutra_tasks.settings import Settings

__all__ = ["load_engine"]


def load_engine(options: Settings, model: str | None = None, folder: Path | None = None) -> Encoder:
    """Load a model into the engine for it.

    Args:
        options: which engine, and how it computes.
        model: the model's name; that of ``options`` if None.
        folder: where it is, if its name does not say.

    Raises:
        ModelError: the engine is not installed, or the model cannot be loaded.
    """
    name = model or options.model
    if options.engine == "simulated":
        return SimulatedEncoder(
            model="simulated" if name == options.model and folder is None else name,
            width=options.simulated_width,
            fixed_s=options.simulated_fixed_s,
            per_token_s=options.simulated_per_token_s,
        )
    place = str(folder) if folder is not None else locate(name)
    if is_static(Path(place)):
        return StaticEncoder(name, Path(place))
    try:
        # torch takes seconds to import, and the other engines do without.
        from sutra_tasks.engines.torch_engine.encoder import TorchEncoder  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ModelError(name, f"needs {error.name}: pip install 'sutra-tasks[worker]'") from None
    return TorchEncoder(
        name,
        folder=place,
        device=options.torch_device,
        threads=options.torch_threads,
        memory_share=options.gpu_memory_share,
        attention=options.attention,
        dtype=options.dtype,
    )
