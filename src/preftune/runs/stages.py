"""The unit of skip and resume: a stage has a key made of all that its result depends on."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preftune.config import config_of
from preftune.errors import ConfigError
from preftune.rundir import RunDir, read_json, write_json

SIDE_FILE = "preftune.json"  # beside the weights of every model that preftune saves
_FREE = ("microbatch_size",)  # may change on resume: no effect beyond rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A node of the run graph. `inputs` determines the result: settings, data hash, parents' keys."""

    name: str
    algorithm: str
    parents: tuple[str, ...]
    inputs: Mapping[str, Any]

    @property
    def key(self) -> str:
        return digest(self.inputs)

    @property
    def trains_policy(self) -> bool:
        """Whether its model writes responses; the other kind scores them."""
        kind = config_of(self.algorithm)
        return kind is None or kind.trains_policy  # unknown is the pretraining of a base model

    def model_dir(self, run: RunDir) -> Path:
        return run.model_dir(self.name, trains_policy=self.trains_policy)


def digest(value: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON-able value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def settings_of(config: Any) -> dict[str, Any]:
    """A stage's config without the fields that do not change its result."""
    values = config.model_dump(mode="json", exclude=set(_FREE))
    scratch = values.get("scratch")
    return {**values, "scratch": {k: v for k, v in scratch.items() if k not in _FREE}} if scratch else values


def is_finished(run: RunDir, stage: Stage) -> bool:
    """True if the stage is done. ConfigError if it was started with other inputs: nothing is overwritten."""
    file = run.stage_json(stage.name)
    if not file.exists():
        return False
    recorded = read_json(file)
    if recorded.get("key") != stage.key:
        raise ConfigError(
            f"stage {stage.name} in {run.path} was made with other settings:\n  "
            + "\n  ".join(differences(recorded.get("inputs", {}), dict(stage.inputs))[:6]),
            hint="use another out=DIR, or --restart to make the run again from nothing",
        )
    return recorded.get("status") == "finished" and stage.model_dir(run).is_dir()


def begin(run: RunDir, stage: Stage) -> None:
    """Mark a stage as running. ConfigError if its model's place holds something that is not preftune's."""
    target = stage.model_dir(run)
    if target.exists() and not (target / SIDE_FILE).is_file():
        raise ConfigError(
            f"{target} was not made by preftune and is in the way", hint="move it, or use another out=DIR"
        )
    write_json(run.stage_json(stage.name), {**_record(stage), "status": "running"})


def finish(run: RunDir, stage: Stage, facts: Mapping[str, Any]) -> None:
    """Mark a stage finished and drop its checkpoints: its model is complete."""
    write_json(run.stage_json(stage.name), {**_record(stage), **facts, "status": "finished"})
    shutil.rmtree(run.checkpoints(stage.name), ignore_errors=True)


def _record(stage: Stage) -> dict[str, Any]:
    return {
        "stage": stage.name,
        "algorithm": stage.algorithm,
        "parents": list(stage.parents),
        "key": stage.key,
        "inputs": dict(stage.inputs),
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted lines "key: old -> new" of all that differs."""
    lines = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before} -> {after}")
    return lines
