"""What a figure was measured with: machine, versions and command, for a report.

Everything is a short text by name. What cannot be told is left out.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from transcribe.printable import printable

_PACKAGES = ("transcribe", "ray", "torch", "ctranslate2", "transformers")


def environment(packages: Sequence[str] = _PACKAGES) -> dict[str, str]:
    """Machine, system, versions of `packages` that are installed, and this process's command."""
    found = {
        "cpu": _cpu(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": _memory(),
        "gpu": _gpus(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{package: _version(package) for package in packages},
        "command": printable(_command()),
    }
    return {name: text for name, text in found.items() if text}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _memory() -> str:
    try:
        n_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return ""
    return f"{n_bytes / 1e9:.0f} GB"


def _gpus() -> str:
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    names = [line.strip() for line in told.splitlines() if line.strip()]
    return ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _command() -> str:
    """The command line as one would type it; a module's file is written as `python -m`."""
    program, *arguments = sys.argv or [""]
    path = Path(program)
    if path.suffix == ".py":
        root = Path(__file__).parents[1]
        if path.is_relative_to(root):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            return shlex.join(["python", "-m", name.removesuffix(".__main__"), *arguments])
        return shlex.join(["python", program, *arguments])
    return shlex.join([path.name, *arguments])
