"""Atomic checkpoints of a stage: weights and optimizer moments as safetensors, the rest as JSON, a SHA-256
manifest.

A directory named step-N is complete by construction: it is written under another name, synced, and renamed
last. Neither safetensors nor JSON detects a flipped bit, so the manifest does. Random numbers need no state
here: all of them are a function of (run seed, stage, step, purpose, row).
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from preftune.errors import DataError, StorageError
from preftune.faults import faultpoint
from preftune.hashing import sha256_file
from preftune.rundir import sync
from preftune.training.learner import Learner
from preftune.training.metrics import Say
from preftune.training.processes import world_size
from preftune.training.state import (
    TrainState,
    device_name,
    load_state,
    rows_by_moment,
    rows_by_name,
    state_bytes,
    trunks_of,
)
from preftune.version import __version__

_SCHEMA = 1
_MANIFEST, _STATE = "manifest.json", "state.json"


def save(
    directory: Path,
    step: int,
    state: TrainState,
    keep: int,
    spare: Collection[int] = (),
    learner: Learner | None = None,
) -> Path:
    """Write step-`step` and remove all but the newest `keep` and those of the steps `spare`. If the `learner`
    shards, all processes must call this, and each writes its parts; the main one opens and closes the
    checkpoint.

    StorageError, in all of them, if the disk refuses; earlier checkpoints are then still there.
    """
    sharded = learner if learner is not None and learner.shard else None
    main = sharded is None or sharded.is_main
    partial = directory / f".tmp-{step:06d}-{os.getpid() if sharded is None else 'parts'}"
    try:
        suffix = "" if sharded is None else sharded.file_suffix
        _in_every_process(sharded, directory, lambda: _open(partial) if main else None)
        _in_every_process(sharded, directory, lambda: _write_tensors(partial, state, suffix))
        _in_every_process(sharded, directory, lambda: _close(partial, step, state) if main else None)
    except StorageError:
        if main:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    with contextlib.suppress(OSError):  # the new one is there; old ones go with the next
        for old in list(_newest_first(directory))[keep:] if main else ():
            if step_of(old) in spare:
                continue
            faultpoint("checkpoint.purge")
            _remove(old)
    return checkpoint_at(directory, step)


def _in_every_process(sharded: Learner | None, directory: Path, work: Callable[[], None]) -> None:
    """Do `work` in every process; StorageError in all if it fails in one."""
    cause = None
    try:
        work()
    except (OSError, SafetensorError) as error:
        cause = error
    message = "" if cause is None else str(cause)
    failed = [text for text in ([message] if sharded is None else sharded.gather_items([message])) if text]
    if failed:
        raise StorageError(f"cannot write a checkpoint to {directory}: {failed[0]}") from cause


def _open(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    faultpoint("checkpoint.open")


def _write_tensors(directory: Path, state: TrainState, suffix: str) -> None:
    for name in state.weights:
        for file, tensors in ((name, state.weights[name]), (f"{name}-optimizer", state.moments[name])):
            path = directory / f"{file}{suffix}.safetensors"
            save_file({key: tensor.cpu() for key, tensor in tensors.items()}, path)
            faultpoint("checkpoint.file", path)


def _close(partial: Path, step: int, state: TrainState) -> None:
    """Write what is not a tensor, and the manifest, then rename: the checkpoint is complete."""
    _describe(partial, step, state)
    target = checkpoint_at(partial.parent, step)
    faultpoint("checkpoint.rename")
    if target.exists():
        _remove(target)
    os.rename(partial, target)
    sync(target.parent)
    faultpoint("checkpoint.renamed")


def _describe(directory: Path, step: int, state: TrainState) -> None:
    record = {
        "schema": _SCHEMA,
        "step": step,
        "skipped": dict(state.skipped),
        "bad_steps": state.bad_steps,
        "scaler": dict(state.scaler),
        "made_with": _made_with(state.device),
        **({"kept": dict(state.scalars)} if state.scalars else {}),
        **({"trunks": dict(state.trunks)} if state.trunks else {}),
    }
    (directory / _STATE).write_text(json.dumps(record), encoding="utf-8")
    faultpoint("checkpoint.manifest")
    manifest = {file.name: sha256_file(file) for file in sorted(directory.iterdir())}
    (directory / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for file in directory.iterdir():
        sync(file)


def restore(directory: Path, learner: Learner, say: Say = print) -> int:
    """Load the newest valid checkpoint into the learner; returns its step, 0 if there is none.

    Damaged ones are moved to corrupt/ and the next older is used. DataError if there are some and none is
    valid: they stay where they are, so that the next attempt does not silently start from nothing.
    """
    if not directory.is_dir():
        return 0
    if learner.is_main:
        for stale in directory.glob(".tmp-*"):
            shutil.rmtree(stale, ignore_errors=True)
    damaged: dict[Path, str] = {}
    for checkpoint in _newest_first(directory):
        fault = fault_of(checkpoint)
        if fault is None:
            learner.wait()  # every process has looked before anything is moved
            if learner.is_main:
                _set_aside(damaged, directory / "corrupt", say)
            return load(checkpoint, learner, say)
        damaged[checkpoint] = fault
    if damaged:
        tried = "; ".join(f"{path.name}: {fault}" for path, fault in list(damaged.items())[:3])
        raise DataError(
            f"none of {len(damaged)} checkpoints in {directory} is valid ({tried})",
            hint="--restart makes the run again; removing that directory starts this stage again",
        )
    return 0


def check_space(directory: Path, learner: Learner) -> None:
    """StorageError if there is no room for two checkpoints, the one there is and the one being written."""
    needed = 2 * state_bytes(learner)
    existing = directory
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    have = sum(file.stat().st_size for file in directory.glob("step-*/*"))
    if free + have < needed:
        raise StorageError(
            f"checkpoints in {directory} need {_size(needed)} and {_size(free)} are free",
            hint="free some space, or use another place with --out DIR",
        )


def newest_step(directory: Path, below: float = math.inf, every: int = 1) -> int:
    """The step of the newest valid checkpoint of a step below another, of those that are due `every` so many
    steps; 0 without one.
    """
    steps = ((step_of(path), path) for path in _newest_first(directory))
    due = ((step, path) for step, path in steps if step < below and step % every == 0)
    return next((step for step, path in due if fault_of(path) is None), 0)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def checkpoint_at(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return directory / f"step-{step:06d}"


def digests(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of each file of tensors: weights and moments of every trained role."""
    manifest = json.loads((checkpoint / _MANIFEST).read_text(encoding="utf-8"))
    return {name: digest for name, digest in manifest.items() if name.endswith(".safetensors")}


def fault_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((checkpoint / _MANIFEST).read_text(encoding="utf-8"))
        if _STATE not in manifest:
            return f"{_MANIFEST} is incomplete"
        for name, digest in manifest.items():
            if sha256_file(checkpoint / name) != digest:
                return f"{name} does not match its SHA-256"
        state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
        if not isinstance(state, dict) or not {"schema", "step", "skipped", "scaler"} <= state.keys():
            return f"{_STATE} is not as preftune writes it"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _set_aside(damaged: Mapping[Path, str], aside: Path, say: Say) -> None:
    for checkpoint, fault in damaged.items():
        aside.mkdir(exist_ok=True)
        target, n = aside / checkpoint.name, 2
        while target.exists():  # of an earlier accident at the same step
            target, n = aside / f"{checkpoint.name}-{n}", n + 1
        os.rename(checkpoint, target)
        say(f"checkpoint {checkpoint} is damaged ({fault}); set aside in {aside}")


def load(checkpoint: Path, learner: Learner, say: Say = print) -> int:
    """Give the learner the state of a valid checkpoint; returns its step."""
    record = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    if record["schema"] != _SCHEMA:
        raise DataError(
            f"{checkpoint} has schema {record['schema']}; this preftune ({__version__}) reads {_SCHEMA}",
            hint="resume with the preftune that wrote it",
        )
    if record.get("trunks", {}) != (trunks := trunks_of(learner)):
        raise DataError(
            f"{checkpoint} holds the trained weights of other models: what is frozen in them differs",
            hint="resume from the base model with which the stage was begun, or remove its checkpoints",
        )
    weights = {name: rows_by_name(trained.role.model) for name, trained in learner.trained.items()}
    moments = {name: rows_by_moment(trained.optimizer) for name, trained in learner.trained.items()}
    state = TrainState(
        weights={name: _read_all(checkpoint, name, weights[name]) for name in weights},
        moments={name: _read(checkpoint, f"{name}-optimizer", moments[name]) for name in moments},
        skipped=record["skipped"],
        bad_steps=record.get("bad_steps", 0),  # absent in early checkpoints
        scaler=record["scaler"],
        scalars=record.get("kept", {}),
        trunks=trunks,
    )
    load_state(state, learner)
    setup, old = _made_with(device_name(learner.device)), record.get("made_with", {})
    changed = [f"{key} {old[key]} -> {setup[key]}" for key in setup if old.get(key, setup[key]) != setup[key]]
    if changed and learner.is_main:
        say(f"resuming with {', '.join(changed)}: the last bits may differ from an uninterrupted run")
    return int(record["step"])


def _read_all(checkpoint: Path, name: str, rows: Mapping[str, slice]) -> dict[str, Tensor]:
    """As `_read`; DataError if a tensor is not there: another version of a library may call it otherwise."""
    read = _read(checkpoint, name, rows)
    if missing := sorted(rows.keys() - read.keys()):
        raise DataError(
            f"{checkpoint} lacks {len(missing)} of the {name}'s weights ({missing[0]})",
            hint=f"resume with the versions that wrote it (made_with in its {_STATE})",
        )
    return read


def _read(checkpoint: Path, name: str, rows: Mapping[str, slice]) -> dict[str, Tensor]:
    """Of each tensor the rows that this process has, from one file, or from the parts that any number of
    processes wrote.
    """
    files = sorted(checkpoint.glob(f"{name}-[0-9]*-of-[0-9]*.safetensors"))
    with contextlib.ExitStack() as stack:
        opened: list[Any] = [
            stack.enter_context(safe_open(file, "pt"))
            for file in files or [checkpoint / f"{name}.safetensors"]
        ]
        return {key: _rows(opened, key, rows[key]) for key in opened[0].keys() if key in rows}  # noqa: SIM118


def _rows(opened: Sequence[Any], key: str, rows: slice) -> Tensor:
    """Some rows of a tensor that is split over files in order; a scalar is in each of them."""
    pieces, start = [], 0
    for file in opened:
        stored = file.get_slice(key)
        if not (shape := stored.get_shape()):
            return file.get_tensor(key)
        low, high = max(rows.start - start, 0), min(rows.stop - start, shape[0])
        pieces += [stored[low:high]] if low < high else []
        start += shape[0]
    return torch.cat(pieces) if pieces else opened[0].get_tensor(key)[:0]


def _made_with(device: str) -> dict[str, Any]:
    """What the bits of a result depend on, besides the machine."""
    versions = {"preftune": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {**versions, "threads": torch.get_num_threads(), "processes": world_size(), "device": device}


def _newest_first(directory: Path) -> Iterator[Path]:
    named = [path for path in directory.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    yield from sorted(named, key=step_of, reverse=True)


def _remove(checkpoint: Path) -> None:
    """Renamed first: a half-removed directory must not be called step-N."""
    partial = checkpoint.with_name(f".tmp-{checkpoint.name}-{os.getpid()}")
    os.rename(checkpoint, partial)
    shutil.rmtree(partial, ignore_errors=True)


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"
