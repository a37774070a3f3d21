"""Where a run came from: versions, seed, commands, commit, hardware, and the time of each stage."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from certprune import __version__

PACKAGES = (
    "torch",
    "torchvision",
    "auto_LiRPA",
    "numpy",
    "scipy",
    "statsmodels",
    "pydantic",
    "safetensors",
    "rich",
    "typer",
    "PyYAML",
    "matplotlib",
    "mlxtend",
    "scikit-learn",
)


def describe(seed: int, command: str, threads: int, device: str) -> dict[str, Any]:
    """The provenance of a run that starts now; ``stages`` and ``resumed`` fill up as it goes."""
    return {
        "started": now(),
        "command": command,
        "seed": seed,
        "python": platform.python_version(),
        "torch": package_version("torch"),
        "packages": package_versions(),
        "git_commit": git_commit(),
        "hardware": hardware(device),
        "threads": threads,
        "device": device,
        "stages": {},
        "resumed": [],
    }


def now() -> str:
    """The time in UTC, to the second, as ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def package_version(name: str) -> str | None:
    """The installed version, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def package_versions() -> dict[str, str | None]:
    """The versions of everything that can change a result or a picture of it."""
    return {"certprune": __version__, **{name: package_version(name) for name in PACKAGES}}


def git_commit() -> str | None:
    """The commit of the checkout this package runs from, ``+changes`` if files differ; None elsewhere."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():  # installed somewhere: an enclosing repository is not ours
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changed else "")


def hardware(device: str) -> dict[str, Any]:
    """The processor, its cores open to this process, the memory, and the GPU if one is used."""
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": _memory_gb(),
    }
    if device.startswith("cuda"):
        import torch

        found["gpu"] = torch.cuda.get_device_name()
    return found


def command_line() -> str:
    """The command as the user typed it, ready to be pasted."""
    import shlex

    name = Path(sys.argv[0]).name
    program = f"python {name}" if name.endswith(".py") and name != "__main__.py" else "certprune"
    return shlex.join([*program.split(), *sys.argv[1:]])


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None
