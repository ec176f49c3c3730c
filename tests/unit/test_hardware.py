"""How many cores there are: those that the process may use, and may keep busy."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from celery.utils import sysinfo

from sutra_tasks.host.hardware import count_cores, plan_devices

GROUP = Path("/sys/fs/cgroup/cpu/sutra-tasks-test")
Files = Callable[[str], dict[str, str]]
COUNT = "from sutra_tasks.host.hardware import count_cores; print(count_cores())"


def of_version_2(quota: str) -> dict[str, str]:
    return {"proc": "0::/a/b\n", "sys/a/cpu.max": f"{quota} 100000", "sys/a/b/cpu.max": "max 100000"}


def of_version_1(quota: str) -> dict[str, str]:
    return {
        "proc": "3:cpu,cpuacct:/a\n0::/\n",
        "sys/cpu,cpuacct/a/cpu.cfs_quota_us": quota,
        "sys/cpu,cpuacct/a/cpu.cfs_period_us": "100000",
    }


@pytest.mark.parametrize("version", [of_version_1, of_version_2])
@pytest.mark.parametrize(
    ("quota", "cores"), [("50000", 1), ("100000", 1), ("150000", 2), ("800000", 8), ("6400000", 16)]
)
def test_the_quota_of_control_groups_limits_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: Files, quota: str, cores: int
) -> None:
    for name, content in version(quota).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(sysinfo, "CGROUP_ROOT", str(tmp_path / "sys"))
    monkeypatch.setattr(sysinfo, "PROC_SELF_CGROUP", str(tmp_path / "proc"))
    monkeypatch.setattr(sysinfo, "available_cpu_count", lambda: 16)
    assert count_cores() == cores


def test_a_quota_decides_devices_and_their_threads() -> None:
    planned = plan_devices(host="h", engine="torch", gpus=(), cores=1, count=None)
    assert [one.environ["SUTRA_TORCH_THREADS"] for one in planned] == ["1"]
    planned = plan_devices(host="h", engine="torch", gpus=(), cores=16, count=None)
    assert [one.environ["SUTRA_TORCH_THREADS"] for one in planned] == ["2"] * 8


def test_a_real_control_group_is_seen() -> None:
    try:
        GROUP.mkdir()
        (GROUP / "cpu.cfs_quota_us").write_text("100000")
    except OSError:
        pytest.skip("control groups cannot be made here")
    try:
        found = subprocess.run(
            [sys.executable, "-c", COUNT],
            preexec_fn=lambda: (GROUP / "cgroup.procs").write_text(str(os.getpid())),
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        assert found.stdout == "1\n"
    finally:
        GROUP.rmdir()
