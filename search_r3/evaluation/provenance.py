"""The provenance of a result: command, commit, versions and hardware, without absolute paths."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

PACKAGES = ("torch", "transformers", "peft", "numpy", "ir_measures", "sentence-transformers", "bm25s")


def provenance(seed: int = 0, device: str = "cpu") -> dict[str, object]:
    """Command line, git commit (with "-dirty" if the source differs from it), seed, versions and hardware."""
    return {
        "command": command_line(sys.argv),
        "commit": git_commit(),
        "seed": seed,
        "versions": versions(),
        "hardware": hardware(device),
    }


def command_line(arguments: list[str]) -> str:
    """The command as typed; absolute paths are shortened to those relative to the working folder, or to the name."""
    if arguments and arguments[0] in ("-c", "-m"):  # for `python -c CODE`, only sys.orig_argv has CODE
        arguments = ["python", *sys.orig_argv[1:]]
    if not arguments or not arguments[0]:
        return "python"
    name = Path(arguments[0])
    program = name.parent.name.replace("_", "-") if name.name == "__main__.py" else name.name  # `python -m search_r3`
    return shlex.join([program, *(_without_machine_path(a) for a in arguments[1:])])


def git_commit() -> str | None:
    """The commit of the source this module was imported from, or None if it is not a git checkout."""
    source = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=source, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD") if (source / ".git").exists() else None
    if commit is None:
        return None
    return f"{commit}-dirty" if git("status", "--porcelain", "--untracked-files=no", "search_r3") else commit


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on, where they are installed."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def hardware(device: str = "cpu") -> str:
    """The kind of machine: "NVIDIA H100 80GB HBM3" for a GPU, else the processor's model and number of cores. The
    hardware behind an "endpoint" is unknown."""
    if device == "endpoint":
        return "behind an endpoint, not known"
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(torch.device(device))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{_processor()}, {cores} core{'s' if cores != 1 else ''}"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _without_machine_path(argument: str) -> str:
    option, equals, value = argument.partition("=")
    if equals and option.startswith("-"):
        return f"{option}={_without_machine_path(value)}"
    label, equals, value = argument.rpartition("=")
    if not Path(value).is_absolute():
        return argument
    path = Path(value)
    shown = str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name
    return f"{label}{equals}{shown}"
