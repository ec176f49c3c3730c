"""How much memory a device has left, whoever can tell, and no error where nobody can."""

import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest

from sutra_tasks.health.memory import UNKNOWN, Memory, device_memory, process_memory

GIB = 2**30
USED = 2**22
NO_LIMIT = "9223372036854771712\n"


def folder(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with 4 GiB, and a process on it."""
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=USED))
    monkeypatch.setattr(psutil, "Process", lambda: process)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=4 * GIB))


class NVMLError(Exception):
    """As pynvml names it."""


class Nvml(ModuleType):
    """NVIDIA's library, knowing some devices by their UUIDs."""

    NVMLError = NVMLError

    def __init__(self, **devices: tuple[int, int]) -> None:
        super().__init__("pynvml")
        self.devices = {name.replace("_", "-"): memory for name, memory in devices.items()}
        self.open = 0

    def nvmlInit(self) -> None:  # noqa: N802
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        assert self.open
        if uuid not in self.devices:
            raise NVMLError(uuid)
        return uuid

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:  # noqa: N802
        used, total = self.devices[handle]
        return SimpleNamespace(used=used, total=total)


class NoDriver(Nvml):
    """The package without the driver."""

    def nvmlInit(self) -> None:  # noqa: N802
        raise NVMLError("shared library not found")


class Cuda:
    """torch.cuda with two devices; ``device`` 1 is the one asked about."""

    def __init__(self, *, free: int = 30, reserved: int = 20, allocated: int = 15) -> None:
        self.free, self.reserved, self.allocated = free, reserved, allocated

    def memory_reserved(self, device: str) -> int:
        return self.reserved if device == "cuda:1" else 0

    def memory_allocated(self, device: str) -> int:
        return self.allocated if device == "cuda:1" else 0

    def get_device_properties(self, device: str) -> Any:
        return SimpleNamespace(uuid="two" if device == "cuda:1" else "one")

    def mem_get_info(self, device: str) -> tuple[int, int]:
        return (self.free, 100) if device == "cuda:1" else (1, 100)


def torch_with(monkeypatch: pytest.MonkeyPatch, *, hip: str | None = None, **parts: Any) -> None:
    fake = SimpleNamespace(version=SimpleNamespace(hip=hip), **parts)
    monkeypatch.setitem(sys.modules, "torch", fake)


@pytest.mark.parametrize(
    ("used", "total", "share"),
    [
        (1, 4, 0.25),
        (4, 4, 1.0),
        (5, 4, 1.0),
        (-1, 4, 0.0),
        (None, 4, None),
        (4, None, None),
        (4, 0, None),
    ],
)
def test_a_share_is_between_0_and_1_or_not_known(
    used: int | None, total: int | None, share: float | None
) -> None:
    assert Memory(used, total, "nvml").share == share


@pytest.mark.parametrize(
    ("files", "total_bytes", "source"),
    [
        ({}, 4 * GIB, "process"),
        # Version 2: its own limit, a parent's, none, and one above the machine's memory.
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": f"{GIB}\n"}, GIB, "cgroup"),
        (
            {
                "proc/self/cgroup": "0::/pod/one\n",
                "sys/fs/cgroup/pod/memory.max": f"{GIB}\n",
                "sys/fs/cgroup/pod/one/memory.max": f"{2 * GIB}\n",
            },
            GIB,
            "cgroup",
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, 4 * GIB, "process"),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": f"{8 * GIB}"}, 4 * GIB, "process"),
        # Version 1: its own limit, one of a container that sees the host's path, and none.
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/docker/id\n0::/\n",
                "sys/fs/cgroup/memory/docker/id/memory.limit_in_bytes": f"{GIB}\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": NO_LIMIT,
            },
            GIB,
            "cgroup",
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/docker/id\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{GIB}\n",
                "memory.limit_in_bytes": "1\n",  # not a control group's
            },
            GIB,
            "cgroup",
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": NO_LIMIT,
            },
            4 * GIB,
            "process",
        ),
    ],
)
@pytest.mark.usefixtures("machine")
def test_a_process_may_use_what_its_control_groups_allow(
    tmp_path: Path, files: Mapping[str, str], total_bytes: int, source: str
) -> None:
    assert process_memory(folder(tmp_path, files)) == Memory(USED, total_bytes, source)


def test_this_process_uses_some_memory() -> None:
    memory = device_memory("cpu")
    assert memory.share is not None
    assert 0 < memory.share < 1
    assert memory.used_bytes is not None
    assert memory.used_bytes > 2**20


def test_a_system_without_control_groups_has_no_limit(tmp_path: Path) -> None:
    elsewhere, here = process_memory(tmp_path), process_memory()
    assert elsewhere.source == "process"
    assert elsewhere.used_bytes is not None
    assert here.used_bytes is not None
    assert here.used_bytes / 2 < elsewhere.used_bytes < 2 * here.used_bytes


def test_a_system_that_tells_nothing_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Any:
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil, "virtual_memory", refuse)
    assert device_memory("cpu") == UNKNOWN
    assert UNKNOWN.share is None


def test_nvidia_is_asked_about_the_device_that_cuda_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = Nvml(GPU_one=(99, 100), GPU_two=(50, 100))
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    torch_with(monkeypatch, cuda=Cuda(reserved=0, allocated=0))
    assert device_memory("cuda:1") == Memory(50, 100, "nvml")
    assert nvml.open == 0


def test_what_torch_keeps_for_reuse_is_no_pressure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(GPU_two=(99, 100)))
    torch_with(monkeypatch, cuda=Cuda(reserved=90, allocated=15))
    assert device_memory("cuda:1") == Memory(24, 100, "nvml")


def test_a_slice_of_a_gpu_is_asked_about_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(GPU_one=(99, 100), MIG_two=(5, 10)))
    torch_with(monkeypatch, cuda=Cuda(reserved=0, allocated=0))
    assert device_memory("cuda:1") == Memory(5, 10, "nvml")


@pytest.mark.parametrize(
    "nvml",
    [None, NoDriver(), Nvml(GPU_one=(99, 100))],
    ids=["not installed", "no driver", "another device"],
)
def test_torch_is_asked_where_nvidias_library_does_not_tell(
    monkeypatch: pytest.MonkeyPatch, nvml: Nvml | None
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    torch_with(monkeypatch, cuda=Cuda(free=30, reserved=20, allocated=15))
    assert device_memory("cuda:1") == Memory(65, 100, "torch")
    assert nvml is None or nvml.open == 0


def test_an_amd_device_is_not_looked_for_among_nvidias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(GPU_two=(99, 100)))
    torch_with(monkeypatch, hip="6.2", cuda=Cuda(free=30, reserved=20, allocated=15))
    assert device_memory("cuda:1") == Memory(65, 100, "torch")


def test_apples_share_is_of_what_it_recommends(monkeypatch: pytest.MonkeyPatch) -> None:
    mps = SimpleNamespace(current_allocated_memory=lambda: 3, recommended_max_memory=lambda: 12)
    torch_with(monkeypatch, mps=mps)
    assert device_memory("mps") == Memory(3, 12, "torch")


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "mps", "xpu"])
def test_a_device_nobody_can_tell_of_is_unknown(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert device_memory(device) == UNKNOWN
    assert "torch" not in sys.modules
    torch_with(monkeypatch)  # and one without such a device
    assert device_memory(device) == UNKNOWN
