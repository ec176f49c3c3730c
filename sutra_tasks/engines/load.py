"""Chooses the engine for a model, by ``SUTRA_ENGINE`` and by the model's folder, and loads it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sutra_tasks.engines.model_files import check_files
from sutra_tasks.engines.model_folder import locate
from sutra_tasks.engines.simulated_engine import SimulatedEncoder
from sutra_tasks.engines.static_engine import StaticEncoder, is_static
from sutra_tasks.errors import ModelError

if TYPE_CHECKING:
    from sutra_tasks.engines.encoder import Encoder
    from sutra_tasks.settings import Settings

__all__ = ["load_engine"]


def load_engine(options: Settings, model: str | None = None, folder: Path | None = None) -> Encoder:
    """Load a model into its engine.

    Args:
        options: the engine, and how it computes.
        model: the model's name; None: that of ``options``.
        folder: its files; None: its name says where they are.

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
    path = str(folder) if folder is not None else locate(name)
    if Path(path).is_dir():  # else sentence-transformers has to find it
        check_files(name, Path(path))
        if is_static(Path(path)):
            return StaticEncoder(name, Path(path))
    try:
        # torch takes seconds to import, and the other engines do not need it.
        from sutra_tasks.engines.torch_engine.encoder import TorchEncoder  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ModelError(name, f"needs {error.name}: pip install 'sutra-tasks[worker]'") from None
    return TorchEncoder(
        name,
        folder=path,
        device=options.torch_device,
        threads=options.torch_threads,
        memory_share=options.gpu_memory_share,
        attention=options.attention,
        dtype=options.dtype,
    )
