"""A second place for what a run cannot afford to lose, and a start from there on a new machine.

Made for mounted cloud drives, where locks and renames cannot be trusted and files appear in any order: every
unit (a checkpoint, a finished stage) is a directory of copies with a manifest of SHA-256 sums that is written
last. A unit whose sums do not hold does not exist. Nothing in the mirror is ever used in place.

    DIR/STAGE/step-000050/   a checkpoint's files · stage.json · metrics.jsonl · ledger.jsonl · mirror.json
    DIR/STAGE/finished/      model/... · stage.json · metrics.jsonl · ledger.jsonl · mirror.json
    DIR/STAGE/member-0/...   the same of an ensemble's member, until the ensemble is finished
    DIR/commits.json         of what comes from the hub, and the precision: what a new machine goes on with
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from preftune.errors import ConfigError, PreftuneError
from preftune.hashing import sha256_file
from preftune.rundir import RunDir, read_text, write_text
from preftune.runs.inputs import COMMITS, mirrored_commits
from preftune.runs.stages import Stage, changes, copy_files, is_finished, refuse_foreign
from preftune.sums import read_sealed, write_sealed
from preftune.training.checkpoint import checkpoint_at, fault_of, newest_step, step_of

_MANIFEST = "mirror.json"
_MODEL = "model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mirror:
    """The mirror of one run. Trouble with it costs a warning, never the run."""

    directory: Path
    run: RunDir
    say: Callable[[str], None]

    def put_commits(self, commits: Mapping[str, str]) -> None:
        """Note the commits of what comes from the hub, if there are any."""
        with self._trouble("note commits of the hub in the mirror"):
            if commits and mirrored_commits(self.directory) != commits:
                self.directory.mkdir(parents=True, exist_ok=True)
                write_sealed(self.directory / COMMITS, commits)

    def put_checkpoint(self, stage: Stage, checkpoint: Path) -> None:
        """Copy a complete checkpoint with the logs up to it; others go that are not here any more."""
        unit = self._folder(stage) / checkpoint.name
        with self._trouble(f"copy to the mirror {unit}"):
            files = {file.name: file for file in checkpoint.iterdir()}
            if self._put_unit(unit, {**files, **self._logs(stage)}):
                for old in self._checkpoints(stage):
                    if not checkpoint_at(self.run.checkpoints(stage.name), step_of(old)).is_dir():
                        _discard(old)

    def put_stage(self, stage: Stage) -> None:
        """Copy a finished stage, unless it is there: its model and logs; its checkpoints and members go."""
        model, unit = stage.model_dir(self.run), self._finished_unit(stage)
        with self._trouble(f"copy to the mirror {unit}"):
            files = {
                f"{_MODEL}/{file.relative_to(model)}": file for file in model.rglob("*") if file.is_file()
            }
            if self._holds(stage, unit) or self._put_unit(unit, {**files, **self._logs(stage)}):
                for old in (*self._checkpoints(stage), *self._folder(stage).glob("member-*/*")):
                    _discard(old)

    def forget(self, stages: Iterable[str], *, commits: bool = False) -> None:
        """Remove what the mirror holds of these stages and their members, and perhaps its commits."""
        with self._trouble("remove earlier stages from the mirror"):
            if commits:
                (self.directory / COMMITS).unlink(missing_ok=True)
            for folder in (self.directory / stage for stage in stages):
                for unit in [*folder.glob("*"), *folder.glob("member-*/*")]:
                    if unit.name == "finished" or unit.name.startswith("step-"):
                        _discard(unit)

    def check(self, stage: Stage) -> None:
        """ConfigError if the stage was mirrored with other settings."""
        steps = (unit for unit in self._checkpoints(stage) if step_of(unit) > 0)
        for unit in (self._finished_unit(stage), *steps):
            if _is_complete(unit):
                self._same_settings(stage, unit)
                return

    def fetch(self, stage: Stage) -> None:
        """Bring a stage to where the mirror is, if that is further than the run directory. ConfigError if it
        was mirrored with other settings, or somebody else's directory is in the way.
        """
        if is_finished(self.run, stage):
            return
        finished = self._finished_unit(stage)
        if _is_complete(finished):
            self._same_settings(stage, finished)
            refuse_foreign(target := stage.model_dir(self.run))
            listed = _sums(finished).items()
            sums = {name[len(_MODEL) + 1 :]: sha for name, sha in listed if name.startswith(f"{_MODEL}/")}
            copy_files({name: finished / _MODEL / name for name in sums}, target, sums)
            self._fetch_logs(stage, finished)
            self.say(f"{stage.name:<12} fetched from {finished}")
            return
        directory, logs = self.run.checkpoints(stage.name), self._logs(stage)
        newest = _newest(directory)
        units = [unit for unit in self._checkpoints(stage) if self._is_further(stage, unit, newest)]
        for unit in reversed(units):  # the newest last: a kill before it leaves something to fetch
            self._same_settings(stage, unit)
            sums = {name: sha for name, sha in _sums(unit).items() if name not in logs}
            copy_files({name: unit / name for name in sums}, checkpoint_at(directory, step_of(unit)), sums)
        if units:
            self._fetch_logs(stage, units[0])
            self.say(f"{stage.name:<12} checkpoint of step {step_of(units[0])} fetched from {units[0]}")

    def _is_further(self, stage: Stage, unit: Path, newest: int) -> bool:
        """Whether a checkpoint is complete and of a later step. Of other settings, a state of before the
        first step is in nobody's way.
        """
        if step_of(unit) <= newest or not _is_complete(unit):
            return False
        return step_of(unit) > 0 or self._is_of(stage, unit)

    def _folder(self, stage: Stage) -> Path:
        return self.directory / stage.name

    def _finished_unit(self, stage: Stage) -> Path:
        return self._folder(stage) / "finished"

    def _checkpoints(self, stage: Stage) -> list[Path]:
        checkpoints = list[Path]()
        with self._trouble(f"look into the mirror {self._folder(stage)}"):
            checkpoints += [path for path in self._folder(stage).glob("step-*") if path.name[5:].isdecimal()]
        return sorted(checkpoints, key=step_of, reverse=True)

    def _logs(self, stage: Stage) -> dict[str, Path]:
        run, name = self.run, stage.name
        return {file.name: file for file in (run.metrics(name), run.ledger(name), run.stage_json(name))}

    def _fetch_logs(self, stage: Stage, unit: Path) -> None:
        """stage.json comes last: it makes a finished stage finished."""
        for name, target in self._logs(stage).items():
            if (unit / name).is_file():
                write_text(target, read_text(unit / name))

    def _put_unit(self, unit: Path, files: Mapping[str, Path]) -> bool:
        """Write a unit, its manifest last, and read it back; whether it is there."""
        unit.mkdir(parents=True, exist_ok=True)
        (unit / _MANIFEST).unlink(missing_ok=True)
        sums = {}
        for name, file in files.items():
            if file.is_file():
                sums[name] = sha256_file(file)
                (unit / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, unit / name)
        (unit / _MANIFEST).write_text(json.dumps(sums, indent=1), encoding="utf-8")
        if not (whole := _is_complete(unit)):
            self.say(f"warning: {unit} does not read back as it was written")
        return whole

    def _holds(self, stage: Stage, unit: Path) -> bool:
        """Whether a unit is of the stage as it is finished here; its files were read back when it was
        written.
        """
        try:
            sums = _sums(unit)
        except (OSError, ValueError, TypeError, AttributeError):
            return False
        own_record = sha256_file(self.run.stage_json(stage.name))
        return sums.get("stage.json") == own_record and all((unit / name).is_file() for name in sums)

    @contextmanager
    def _trouble(self, doing: str) -> Iterator[None]:
        """An error here is a warning, not the end of the run."""
        try:
            yield
        except (PreftuneError, OSError) as error:
            self.say(f"warning: cannot {doing}: {error}; training continues")

    def _is_of(self, stage: Stage, unit: Path) -> bool:
        return read_sealed(unit / "stage.json", stage.name).get("key") == stage.key

    def _same_settings(self, stage: Stage, unit: Path) -> None:
        if not self._is_of(stage, unit):
            recorded = read_sealed(unit / "stage.json", stage.name)
            raise ConfigError(
                f"stage {stage.name} in the mirror {self.directory} was made with other settings:\n  "
                + "\n  ".join(changes(recorded, stage)[:5]),
                hint="give this run its own mirror",
            )


def _newest(checkpoints: Path) -> int:
    """The step of the newest valid checkpoint: 0 is the state of before the first step, -1 is none."""
    return newest_step(checkpoints) or (-1 if fault_of(checkpoint_at(checkpoints, 0)) else 0)


def _is_complete(unit: Path) -> bool:
    """Whether every file of the manifest is there with its sum."""
    try:
        sums = _sums(unit)
        return "stage.json" in sums and all(sha256_file(unit / name) == sums[name] for name in sums)
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def _sums(unit: Path) -> dict[str, str]:
    """The manifest. ValueError for a name that leads out of the unit."""
    sums = json.loads((unit / _MANIFEST).read_text(encoding="utf-8"))
    for name in sums:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{name!r} is no name of a file in {unit}")
    return sums


def _discard(unit: Path) -> None:
    """Remove a unit, its manifest first: without one it does not count as a unit."""
    (unit / _MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(unit, ignore_errors=True)
