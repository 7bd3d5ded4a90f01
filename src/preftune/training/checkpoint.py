"""Atomic checkpoints of a stage: weights and optimizer moments as safetensors, the rest as JSON, a SHA-256
manifest.

A directory named step-N is complete by construction: it is written under another name, synced, and renamed
last. Neither safetensors nor JSON detects a flipped bit, so the manifest does. Random numbers need no state
here: all of them are a function of (run seed, stage, step, purpose, row).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from preftune.errors import StorageError
from preftune.training.learner import Learner

_SCHEMA = 1


def save(directory: Path, step: int, learner: Learner, keep: int) -> Path:
    """Write step-`step` and remove all but the newest `keep`. StorageError if the disk refuses."""
    target = directory / f"step-{step:06d}"
    partial = directory / f".tmp-{step:06d}-{os.getpid()}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, trained in learner.trained.items():
            save_file(weights_of(trained.role.model), partial / f"{name}.safetensors")
            save_file(_moments(trained.optimizer), partial / f"{name}-optimizer.safetensors")
        skipped = {name: trained.skipped for name, trained in learner.trained.items()}
        state = {"schema": _SCHEMA, "step": step, "skipped": skipped, "scaler": learner.scaler_state()}
        (partial / "state.json").write_text(json.dumps(state), encoding="utf-8")
        manifest = {file.name: _sha256(file) for file in sorted(partial.iterdir())}
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for file in partial.iterdir():
            _sync(file)
        if target.exists():
            shutil.rmtree(target)
        os.rename(partial, target)
        _sync(directory)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise StorageError(f"cannot write a checkpoint to {directory}: {error}") from error
    for old in list(_newest_first(directory))[keep:]:
        shutil.rmtree(old)
    return target


def restore(directory: Path, learner: Learner) -> int:
    """Load the newest valid checkpoint into the learner; returns its step, 0 if there is none.

    Damaged ones are moved to corrupt/ and the next older is used. StorageError if there are some and none is
    valid: they stay where they are, so that the next attempt does not silently start from nothing.
    """
    if not directory.is_dir():
        return 0
    if learner.is_main:
        for stale in directory.glob(".tmp-*"):
            shutil.rmtree(stale, ignore_errors=True)
    damaged: dict[Path, str] = {}
    for checkpoint in _newest_first(directory):
        fault = _fault(checkpoint)
        if fault is None:
            learner.wait()  # every process has looked before anything is moved
            if learner.is_main:
                _set_aside(damaged, directory / "corrupt")
            return _load(checkpoint, learner)
        damaged[checkpoint] = fault
    if damaged:
        raise StorageError(
            f"none of {len(damaged)} checkpoints in {directory} is valid ({next(iter(damaged.values()))})",
            hint="start the stage again by removing that directory",
        )
    return 0


def _set_aside(damaged: Mapping[Path, str], aside: Path) -> None:
    for checkpoint, fault in damaged.items():
        aside.mkdir(exist_ok=True)
        target = aside / checkpoint.name
        shutil.rmtree(target, ignore_errors=True)  # of an earlier accident at the same step
        os.rename(checkpoint, target)
        print(f"checkpoint {checkpoint} is damaged ({fault}); set aside in {aside}")


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters by name, tied ones once, on the CPU."""
    return {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}


def _moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    states = optimizer.state_dict()["state"]
    return {
        f"{i}.{k}": v.detach().cpu().contiguous() for i, state in states.items() for k, v in state.items()
    }


def _load(checkpoint: Path, learner: Learner) -> int:
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    for name, trained in learner.trained.items():
        weights = load_file(checkpoint / f"{name}.safetensors")
        with torch.no_grad():
            for key, parameter in trained.role.model.named_parameters():
                parameter.copy_(weights[key])
        restored = trained.optimizer.state_dict()
        restored["state"] = {}
        for key, value in load_file(checkpoint / f"{name}-optimizer.safetensors").items():
            index, kind = key.split(".", 1)
            restored["state"].setdefault(int(index), {})[kind] = value
        trained.optimizer.load_state_dict(restored)
        trained.skipped = int(state["skipped"][name])
    learner.load_scaler_state(state["scaler"])
    return int(state["step"])


def _newest_first(directory: Path) -> Iterator[Path]:
    yield from sorted(directory.glob("step-*"), key=lambda p: p.name, reverse=True)


def _fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
        if "state.json" not in manifest:
            return "manifest.json is incomplete"
        for name, digest in manifest.items():
            if _sha256(checkpoint / name) != digest:
                return f"{name} does not match its SHA-256"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
