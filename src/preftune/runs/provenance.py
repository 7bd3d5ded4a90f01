"""What produced a run: versions, commit, command, machine. An allow-list, never the whole environment."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from preftune.config import Resolved
from preftune.models.fast import native
from preftune.records.base import write_record
from preftune.records.run import OriginsRecord
from preftune.rundir import RunDir, json_text
from preftune.sums import note
from preftune.training.processes import world_size
from preftune.untrusted import redact
from preftune.version import __version__

_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "datasets",
    "safetensors",
    "numpy",
)


def describe(seed: int) -> dict[str, Any]:
    """The content of run.json."""
    return {
        "seed": seed,
        "command": _command(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "world_size": world_size(),
        "kernel": kernel(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"],
        "versions": {"preftune": __version__} | {name: _version(name) for name in _PACKAGES},
        "commit": _commit(),
    }


def kernel() -> str | None:
    """The file of the sampling kernel, if it is built."""
    return native.kernel_file().name if native.kernel_file().is_file() else None


def record_origins(run: RunDir, resolved: Resolved) -> None:
    """Write origins.json, where it differs: the recipe, and for every setting where its value comes from.

    Only the command that was given a recipe knows: of the run's own config.toml everything would be "recipe".
    """
    if Path(resolved.recipe).resolve() == run.config.resolve():
        return
    record = {"recipe": resolved.recipe, "origins": dict(resolved.origins)}
    if not run.origins.is_file() or run.origins.read_bytes() != json_text(record).encode():
        write_record(run.origins, record, OriginsRecord)
    note(run, [run.origins])


def reset_peak_memory() -> None:
    """Start a new peak for `peak_memory_mb`, where the system allows it (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory_mb() -> float | None:
    """Peak resident memory of this process in MiB since the last reset; None where it cannot be read."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return None


def _command() -> list[str]:
    """What was typed, without credentials; `python -m preftune` is the same program as `preftune`."""
    program = Path(sys.argv[0]).name
    return [redact(word) for word in ("preftune" if program == "__main__.py" else program, *sys.argv[1:])]


def _version(package: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the source tree, with "+" if it has changes; None for an installed package."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)  # noqa: S603
        dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")
