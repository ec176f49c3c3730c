"""Installs the wheel with each extra alone in an empty environment; ``scripts/try-install`` starts it.

For every Python that is found here and every extra: a new environment, the wheel, and one job of
``install_jobs.py`` in it, against a fleet of this checkout. ``--quick`` tries the client on every Python
and the extras on the one that runs this script.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, chdir
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement

from sutra_tasks.engines.model_folder import locate
from sutra_tasks.host.embedded_server import embedded_server
from sutra_tasks.host.hardware import plan_devices
from sutra_tasks.host.local_fleet import await_devices, run_workers, stop_on_signals
from sutra_tasks.host.supervisor import worker_specs
from sutra_tasks.settings import Settings

ROOT: Final = Path(__file__).parents[1]
MINORS: Final = (11, 12, 13, 14)
EXTRAS: Final = ("", "cli", "local", "flower", "worker", "distill")
"""Each is tried alone; the empty one is the client. ``gpu`` needs a GPU and its compiler."""
WITH_TORCH: Final = ("local", "worker", "distill")
"""The package with the model requires torch as well."""
WITH_OWN_FLEET: Final = ("worker", "distill")
OWN: Final = sys.version_info[:2]
PIP: Final = (sys.executable, "-m", "pip", "--disable-pip-version-check")
JOB_S: Final = 300
SHOWN_LINES: Final = 30


class TrialError(Exception):
    """A step of a trial failed; the message is its output."""


class NoTorchError(Exception):
    """No CPU build of torch for this Python can be had here."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One environment to make: a Python, and an extra."""

    python: Path
    minor: int
    extra: str

    def __str__(self) -> str:
        return f"Python 3.{self.minor}, {self.extra or 'client'}"


def pythons() -> Iterator[tuple[int, Path]]:
    """Yield the Pythons of this machine, one for each version, and how to call it."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for minor in MINORS:
        named = [sys.executable] if minor == OWN[1] else []
        found = shutil.which(f"python3.{minor}")
        named += [found] if found else []
        named += sorted(map(str, pyenv.glob(f"3.{minor}.*/bin/python")))
        for one in named:
            asked = subprocess.run(
                [one, "-c", "import sys, venv; print(sys.version_info[1])"],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            if asked.stdout.strip() == str(minor):
                yield minor, Path(one)
                break


def run(command: Sequence[str | Path], *, environ: dict[str, str] | None = None) -> None:
    """Run a command, and raise a TrialError with the end of its output if it fails."""
    done = subprocess.run(
        list(map(str, command)), env=environ, timeout=JOB_S,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise TrialError("\n".join(done.stdout.splitlines()[-SHOWN_LINES:]))


def built_wheel(folder: Path) -> Path:
    """Build the wheel of this checkout."""
    run([*PIP, "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT])
    (wheel,) = folder.glob("*.whl")
    return wheel


def torch_of_this_environment(folder: Path) -> Path:
    """Return a folder with links to this environment's torch and all that torch requires.

    Its hundreds of MB are shared. Whatever else an environment imports has to be installed there.
    """
    shared = folder / "torch"
    if not shared.is_dir():
        shared.mkdir()
        here, names, seen = Path(sysconfig.get_paths()["purelib"]), ["torch"], set[str]()
        while names:
            name = names.pop()
            if name in seen:
                continue
            seen.add(name)
            found = metadata.distribution(name)
            needed = map(Requirement, found.requires or ())
            names += [
                one.name for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})
            ]
            for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
                (shared / top).symlink_to(here / top)
    return shared


def prepare(trial: Trial, wheel: Path, environment: Path, folder: Path) -> Path:
    """Make an environment with the wheel and the extra, and return its Python."""
    run([trial.python, "-m", "venv", "--without-pip", environment])
    python = environment / "bin" / "python"
    install: list[str | Path] = [*PIP, "--python", python, "install", "--quiet", "--no-compile"]
    if trial.extra in WITH_TORCH:
        if trial.minor == OWN[1]:
            site = environment / "lib" / f"python3.{trial.minor}" / "site-packages"
            (site / "torch.pth").write_text(f"{torch_of_this_environment(folder)}\n")
        else:
            version = metadata.version("torch").partition("+")[0]
            run_first(
                [*install, "--only-binary=:all:", f"torch=={version}+cpu"],
                [*uv(), "pip", "install", "--quiet", "--python", python, "--torch-backend", "cpu",
                 f"torch=={version}"],
            )  # fmt: skip
    run([*install, f"sutra-tasks[{trial.extra}] @ {wheel.as_uri()}"])
    return python


def run_first(*commands: Sequence[str | Path]) -> None:
    """Run commands that install torch until one succeeds."""
    for number, command in enumerate(commands, start=1):
        try:
            return run(command)
        except TrialError:
            if number == len(commands):
                raise NoTorchError from None
    return None


def uv() -> list[str]:
    """Return the command uv, which knows where CPU builds of torch are published; install it first."""
    run([*PIP, "install", "--quiet", "uv"])
    return [sys.executable, "-m", "uv"]


def attempt(trial: Trial, wheel: Path, folder: Path, broker: str) -> str | None:
    """Return why an extra does not do its job; None: it does."""
    environment = folder / f"3.{trial.minor}-{trial.extra or 'client'}"
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    # A database of its own, where the workers that a job starts are a fleet of their own.
    environ |= {"SUTRA_BROKER_URL": broker, "SUTRA_MODEL": locate("all-MiniLM-L6-v2")}
    environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    try:
        python = prepare(trial, wheel, environment, folder)
        run([python, "-I", Path(__file__).with_name("install_jobs.py"), trial.extra], environ=environ)
    except TrialError as error:
        return str(error)
    except subprocess.TimeoutExpired as error:
        return str(error)
    finally:
        shutil.rmtree(environment, ignore_errors=True)
    return None


def main(*, quick: bool) -> int:
    """Try every Python and extra; return the number of failures."""
    trials = [
        Trial(python, minor, extra)
        for minor, python in pythons()
        for extra in EXTRAS
        if not quick or not extra or minor == OWN[1]
    ]
    failures = 0
    with stop_on_signals(), ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sutra-install-")))
        stack.enter_context(chdir(folder))  # away from this checkout, whose packages would be found
        wheel = built_wheel(folder)
        address = stack.enter_context(embedded_server())
        options = replace(Settings(), broker_url=address, engine="simulated")
        devices = plan_devices(host="try", engine="simulated", gpus=(), cores=1, count=1)
        log = stack.enter_context((folder / "fleet.log").open("wb"))
        specs = worker_specs(options, devices, worker_options=["-E"])
        output = {spec.name: log for spec in specs}
        supervisor = stack.enter_context(run_workers(options, specs, report=print, output=output))
        await_devices(supervisor, options, devices)
        for number, trial in enumerate(trials, start=1):
            own_fleet = trial.extra in WITH_OWN_FLEET
            broker = f"{address.removesuffix('/0')}/{number}" if own_fleet else address
            began = time.monotonic()
            try:
                reason = attempt(trial, wheel, folder, broker)
            except NoTorchError as error:
                print(f"{trial}: left out. {error.__doc__}", flush=True)
                continue
            failures += reason is not None
            print(f"{trial}: {'ok' if reason is None else 'FAILED'}, {time.monotonic() - began:.0f} s")
            if reason is not None:
                print("  " + reason.replace("\n", "\n  "), flush=True)
            supervisor.step(time.monotonic())
    return failures


if __name__ == "__main__":
    sys.exit(1 if main(quick="--quick" in sys.argv[1:]) else 0)
