"""The unit of skip and resume: a stage has a key made of all that its result depends on."""

import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preftune.config import OptimizerConfig, config_of
from preftune.config.rewards import source_file
from preftune.errors import ConfigError, DataError, StorageError
from preftune.hashing import sha256_file
from preftune.records.stage import StageRecord
from preftune.rundir import RunDir
from preftune.sums import CARD, check, model_sum, read_sealed, recorded_sums, sum_of, sums

SIDE_FILE = "preftune.json"  # beside the weights of every model that preftune saves
_UNDER_WAY = re.compile(r"\..*\.tmp-")  # a file of a writer that was killed
_BEGINNING = "step-000000"  # a checkpoint of before the first step, which kl_budget may go back to
_FREE = ("microbatch_size",)  # may change on resume: no effect beyond rounding
# In the inputs of a stage by themselves, or in those of the stages of later rounds.
_ELSEWHERE = ("trainable", "lora", "kept_gb", "kept_dtype", "data", "rounds", "llm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A node of the run graph. `inputs` determines the result: settings, data hash, parents' keys."""

    name: str
    algorithm: str
    parents: tuple[str, ...]
    inputs: Mapping[str, Any]

    @property
    def key(self) -> str:
        return sum_of(self.inputs)

    @property
    def trains_policy(self) -> bool:
        """Whether its model writes responses; the other kind scores them."""
        kind = config_of(self.algorithm)
        return kind is None or kind.trains_policy  # unknown is the pretraining of a base model

    @property
    def makes_model(self) -> bool:
        """Whether it makes a model; otherwise data that others learn from."""
        kind = config_of(self.algorithm)
        return kind is None or kind.makes == "model"

    def model_dir(self, run: RunDir) -> Path:
        """Where what it makes lies: a model, or data; a member of an ensemble in that one's directory."""
        if not self.makes_model:
            return run.collected(self.name)
        name, _, member = self.name.partition("/")
        return run.model_dir(name, trains_policy=self.trains_policy) / member


class OtherSettings(ConfigError):
    """A stage that is there was made with other settings than are asked for."""

    def __init__(self, stage: str, message: str, hint: str) -> None:
        super().__init__(message, hint)
        self.stage = stage


def settings_of(config: Any) -> dict[str, Any]:
    """A stage's config without the fields that do not change its result."""
    values = config.model_dump(mode="json", exclude={*_FREE, *_ELSEWHERE})
    scratch = values.get("scratch")
    return {**values, "scratch": {k: v for k, v in scratch.items() if k not in _FREE}} if scratch else values


def is_finished(run: RunDir, stage: Stage) -> bool:
    """True if the stage is done and its files are what it wrote; False if its model is gone altogether.

    ConfigError if it was started with other inputs, or made from a parent that has become another: nothing is
    overwritten. False for one that has only become longer and can go on, and for an ensemble that only
    combines its members otherwise. DataError if a file of it is damaged.
    """
    recorded = read_sealed(run.stage_json(stage.name))
    if not recorded:
        return False
    if recorded.get("key") != stage.key:
        if recorded.get("status") == "running" and not _has_begun(run, stage.name):
            return False  # it was begun, and no step of it is kept: there is nothing to keep apart
        changed, more = changes(recorded, stage), ""
        if was_raised(stage, recorded, changed):
            why_not = why_not_longer(run, stage, recorded)
            if not why_not:
                return False
            more = f"\n  it cannot continue from where it ended: {why_not}"
        if _is_combined_otherwise(run, stage, changed):
            return False
        raise OtherSettings(
            stage.name,
            f"stage {stage.name} in {run.path} was made with other settings:\n  "
            + "\n  ".join(changed[:6])
            + more,
            hint="--redo trains it and the stages that depend on it again, --from takes over unchanged "
            "stages into another run, --restart begins from scratch",
        )
    if recorded.get("status") != "finished" or not stage.model_dir(run).is_dir():
        return False
    _check(run, recorded, stage.name, stage.model_dir(run))
    return True


def _has_begun(run: RunDir, name: str) -> bool:
    """Whether a step of a stage, or of one of its members, is kept; the state before its first step does not
    count.
    """
    replies, steps = run.replies(name), run.checkpoints(name).glob("step-*")
    if (replies.is_file() and replies.stat().st_size > 0) or any(path.name != _BEGINNING for path in steps):
        return True
    members = (f"{name}/{folder.name}" for folder in members_begun(run, name))
    return any(
        read_sealed(run.stage_json(member)).get("status") == "finished" or _has_begun(run, member)
        for member in members
    )


def was_raised(stage: Stage, recorded: Mapping[str, Any], changed: Sequence[str]) -> bool:
    """Whether a finished stage has become longer, by its steps or epochs, and nothing else has changed."""
    kind = config_of(stage.algorithm)
    if kind is None or not kind.length or recorded.get("status") != "finished":
        return False
    if [line.split(":")[0] for line in changed] != [f"settings.{kind.length}"]:
        return False
    old_length, new_length = _lengths(stage, recorded)
    return type(old_length) is int and type(recorded.get("steps")) is int and new_length > old_length


def _lengths(stage: Stage, recorded: Mapping[str, Any]) -> tuple[Any, Any]:
    """What the setting that says how long a stage trains is in a record of it, and what it is now."""
    kind = config_of(stage.algorithm)
    name = kind.length if kind else ""
    return inputs_in(recorded).get("settings", {}).get(name), stage.inputs.get("settings", {}).get(name)


def why_not_longer(run: RunDir, stage: Stage, recorded: Mapping[str, Any]) -> str:
    """Why a stage that `was_raised` cannot go on from its last state; "" if it can."""
    settings, steps = stage.inputs["settings"], recorded["steps"]
    old_length, new_length = _lengths(stage, recorded)
    optimizer = OptimizerConfig.model_validate(settings["optimizer"])
    if settings.keys() & {"members", "experts"}:
        return "an ensemble is trained anew"
    if "kl_budget" in recorded or "best" in recorded:
        return "its model is not that after its last step (kl_budget, checkpoint.best)"
    if settings.get("kl_budget") is not None:
        return "the checkpoints that kl_budget may go back to are not kept"
    if (best := stage.inputs.get("best")) and steps % best["every"]:
        return (
            f"checkpoint.best compared the state after its last step, {steps}, which is no multiple of "
            f"checkpoint.every = {best['every']}: a stage that was longer from the beginning would not"
        )
    if not optimizer.same_rates(steps, math.ceil(steps * new_length / old_length)):
        return (
            f"its learning rate depends on the number of steps (schedule {optimizer.schedule}, warmup "
            f"{optimizer.warmup:g}); optimizer.schedule=constant optimizer.warmup=0 would not"
        )
    if not (run.checkpoints(stage.name) / f"step-{steps:06d}").is_dir():
        return "its last state was not kept (checkpoint.keep_last=true keeps it)"
    return ""


def goes_on(run: RunDir, stage: Stage) -> str:
    """The steps and settings from which a finished stage goes on, for people; "" for any other."""
    recorded = read_sealed(run.stage_json(stage.name))
    if recorded.get("status") != "finished" or recorded.get("key") == stage.key:
        return ""
    return f"continues after step {recorded.get('steps')}: {'; '.join(changes(recorded, stage))}"


def members_begun(run: RunDir, name: str) -> list[Path]:
    """The directories of the members of an ensemble that have a record."""
    return sorted(file.parent for file in run.stage_dir(name).glob("member-*/stage.json"))


def _is_combined_otherwise(run: RunDir, stage: Stage, changed: Sequence[str]) -> bool:
    """Whether only settings that combine an ensemble's members have changed: the members, which are stages of
    their own, do not depend on them.
    """
    kind = config_of(stage.algorithm)
    combining = kind.combining if kind else ()
    if not {*combining} & stage.inputs.get("settings", {}).keys() or not members_begun(run, stage.name):
        return False
    free = tuple(f"settings.{name}: " for name in combining)
    return all(line.startswith(free) for line in changed)


def check_model(run: RunDir, name: str, model: Path) -> bool:
    """Whether a stage's model is there to be read. DataError if it, or a log of its stage, is not what was
    written, or if the stage is finished and its model is gone.
    """
    recorded = read_sealed(run.stage_json(name))
    if recorded.get("status") == "finished":
        if not model.is_dir():
            raise DataError(f"{model} is missing", hint=_remedy(run, name, model))
        _check(run, recorded, name, model)
    return model.is_dir() and recorded.get("status", "finished") == "finished"


def unverified(run: RunDir) -> list[str]:
    """Finished parts of a run from before sums were kept."""
    files = sorted(run.stages.glob("*/stage.json"))
    records = {file.parent.name: read_sealed(file) for file in files}
    finished = {name: record for name, record in records.items() if record.get("status") == "finished"}
    return [name for name, record in finished.items() if recorded_sums(record) is None]


def made_of_what_is_here(
    run: RunDir, record: Mapping[str, Any], parent_sums: Mapping[str, str | None] | None = None
) -> bool:
    """Whether the parents that a record names have the models that it was made of; `parent_sums`: of parents
    that are not looked up in the run.
    """
    made_from, given_sums = record.get("made_from"), parent_sums or {}
    return all(
        old_sum is None or old_sum == (given_sums[parent] if parent in given_sums else model_sum(run, parent))
        for parent, old_sum in (made_from.items() if isinstance(made_from, dict) else ())
    )


def _check(run: RunDir, recorded: Mapping[str, Any], name: str, model: Path) -> None:
    check(run, recorded, _remedy(run, name, model))
    made_from = recorded.get("made_from")
    for parent, old_sum in made_from.items() if isinstance(made_from, dict) else ():
        new_sum = model_sum(run, parent)
        if None not in (new_sum, old_sum) and new_sum != old_sum:
            raise ConfigError(
                f"stage {name} in {run.path} was made from another model of {parent} than is there now",
                hint=_remedy(run, name, model),
            )


def _remedy(run: RunDir, name: str, model: Path) -> str:
    return (
        f"remove {model} and {run.stage_dir(name)} and run the command that made "
        "the run: it makes just that stage anew, with the same bits on the same machine"
    )


def begin(run: RunDir, stage: Stage) -> None:
    """Mark a stage as running; the state of before its first step goes if it was that of other settings.
    Raises what `refuse_foreign` raises.
    """
    refuse_foreign(stage.model_dir(run))
    if read_sealed(run.stage_json(stage.name)).get("key") != stage.key:
        shutil.rmtree(run.checkpoints(stage.name) / _BEGINNING, ignore_errors=True)
    StageRecord.write(run.stage_json(stage.name), {**_record(stage), "status": "running"})


def refuse_foreign(target: Path) -> None:
    """ConfigError if a model's place holds something that is not preftune's."""
    if target.exists() and not (target / SIDE_FILE).is_file() and not _is_empty(target):
        raise ConfigError(
            f"{target} was not made by preftune and is in the way", hint="move it, or use another out=DIR"
        )


def _is_empty(folder: Path) -> bool:
    """Whether there is nothing in it but files that were under way when their writer was killed."""
    return folder.is_dir() and all(_UNDER_WAY.match(file.name) for file in folder.iterdir())


def copy_files(files: Mapping[str, Path], target: Path, sums: Mapping[str, str] = {}) -> None:
    """Put copies of files, by their path in it, in the place of the directory `target`, all or none.
    StorageError for a copy whose SHA-256 is not that in `sums`.
    """
    partial = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, file in files.items():
        copy = partial / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
        if name in sums and sha256_file(copy) != sums[name]:
            raise StorageError(f"{file} changed while it was read", hint="run the command again")
    shutil.rmtree(target, ignore_errors=True)
    os.rename(partial, target)


def finish(run: RunDir, stage: Stage, facts: Mapping[str, Any], *, keep_last: bool = False) -> None:
    """Mark a stage finished, with the sums of its files, and drop its checkpoints: its model is complete.
    `keep_last`: but for the last one.
    """
    model = stage.model_dir(run)
    files = [file for file in model.rglob("*") if file.is_file() and file.name != CARD]
    files += [file for file in (run.metrics(stage.name), run.ledger(stage.name)) if file.is_file()]
    made_from = {parent: model_sum(run, parent) for parent in stage.parents}
    record = {**_record(stage), **facts, "made_from": made_from, "files": sums(run, files)}
    StageRecord.write(run.stage_json(stage.name), {**record, "status": "finished"})
    drop_checkpoints(run, stage, keep_last=keep_last)


def drop_checkpoints(run: RunDir, stage: Stage, *, keep_last: bool = False) -> None:
    """Remove the checkpoints and working files of a finished stage, some of which a kill may have left.
    `keep_last`: all but the last checkpoint, from which the stage can become longer.
    """
    folder = run.checkpoints(stage.name)
    last = sorted(folder.glob("step-*"))[-1:] if keep_last else []
    for path in [path for path in folder.glob("*") if path not in last] if last else [folder]:
        shutil.rmtree(path, ignore_errors=True)
    for log in (run.replies(stage.name), run.answers(stage.name), run.live(stage.name)):
        log.unlink(missing_ok=True)


def _record(stage: Stage) -> dict[str, Any]:
    return {
        "stage": stage.name,
        "algorithm": stage.algorithm,
        "parents": list(stage.parents),
        "key": stage.key,
        "inputs": dict(stage.inputs),
    }


def changes(recorded: Mapping[str, Any], stage: Stage) -> list[str]:
    """What differs in the inputs of a stage from those that a record of it has."""
    return differences(inputs_in(recorded), stage.inputs)


def inputs_in(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """What the key in a record is made of; {} where that cannot be read."""
    inputs = recorded.get("inputs")
    return inputs if isinstance(inputs, dict) else {}


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted lines "key: old -> new" of all that differs."""
    lines = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, f"{prefix}{key}.")
        elif prefix == "reward_functions." and before and after and before != after:
            lines.append(f"reward function {key}: {source_file(key) or 'its file'} has changed since")
        elif before != after:
            lines.append(f"{prefix}{key}: {before} -> {after}")
    return lines
