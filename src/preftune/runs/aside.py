"""`--redo STAGE`: a stage and what hangs on it are made anew, while the old ones are kept aside until then.

    .aside/request.json      the stages that were asked for
    .aside/STAGE/stage · model

Directories are renamed, never copied; a kill leaves every one of them in one of the two places. As long as a
new stage is not finished, the command without --redo puts the old one back.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from preftune.config import parents
from preftune.config.algorithms.base import StageSettings
from preftune.errors import UsageError
from preftune.rundir import RunDir, read_object, write_json
from preftune.runs.stages import Stage, made_of_what_is_here
from preftune.sums import read_sealed


def with_children(stages: Mapping[str, StageSettings], asked: Sequence[str]) -> list[str]:
    """The stages asked for and all that read their models. UsageError for a name that is no stage."""
    for name in asked:
        if name not in stages:
            raise UsageError(f"--redo {name}: there is no such stage", f"the stages are: {', '.join(stages)}")
    found = set(asked)
    while more := {n for n, s in stages.items() if n not in found and found & set(parents(s))}:
        found |= more
    return [name for name in stages if name in found]


def put_aside(run: RunDir, stages: Sequence[Stage], asked: Sequence[str]) -> list[str]:
    """Move what is there of these stages out of the way; the names of those that were moved now. A call with
    what was asked before, some of it not made yet, goes on with that and moves nothing.
    """
    request = run.aside / "request.json"
    waiting = [stage for stage in stages if _place(run, stage).is_dir()]
    goes_on = bool(waiting) and request.is_file() and read_object(request).get("asked") == list(asked)
    moved = []
    for stage in stages:
        if _place(run, stage).is_dir() and _is_whole(run, stage):
            if not goes_on or read_sealed(run.stage_json(stage.name)).get("key", stage.key) != stage.key:
                _drop(run, stage)  # a new one that was not finished
        elif (not goes_on and run.stage_json(stage.name).is_file()) or _place(run, stage).is_dir():
            _move(run, stage)
            moved.append(stage.name)
    if moved:
        write_json(request, {"asked": list(asked)})
    return moved


def put_back(run: RunDir, stage: Stage) -> bool:
    """The old stage in its place again, if it is the one that is wanted and no new one is finished."""
    place = _place(run, stage)
    if not place.is_dir():
        return False
    old = place / "stage" / "stage.json"
    record = read_sealed(old if old.is_file() else run.stage_json(stage.name), stage.name)
    if record.get("key") != stage.key or not made_of_what_is_here(run, record):
        return False
    if old.is_file():
        _drop(run, stage)
    for target, name in _parts(run, stage):
        if (place / name).is_dir():
            shutil.rmtree(target, ignore_errors=True)
            os.rename(place / name, target)
    settle(run, stage)
    return True


def settle(run: RunDir, stage: Stage) -> None:
    """The old stage goes: a new one stands, or it is back itself."""
    shutil.rmtree(_place(run, stage), ignore_errors=True)
    if run.aside.is_dir() and not any(path.is_dir() for path in run.aside.iterdir()):
        shutil.rmtree(run.aside, ignore_errors=True)


def _place(run: RunDir, stage: Stage) -> Path:
    return run.aside / stage.name


def _parts(run: RunDir, stage: Stage) -> tuple[tuple[Path, str], ...]:
    """The model first: a stage whose record is still in place can be recognised."""
    return (stage.model_dir(run), "model"), (run.stage_dir(stage.name), "stage")


def _is_whole(run: RunDir, stage: Stage) -> bool:
    return (_place(run, stage) / "stage").is_dir()


def _move(run: RunDir, stage: Stage) -> None:
    place = _place(run, stage)
    place.mkdir(parents=True, exist_ok=True)
    for source, name in _parts(run, stage):
        if source.is_dir() and not (place / name).exists():
            os.rename(source, place / name)


def _drop(run: RunDir, stage: Stage) -> None:
    for path, _ in _parts(run, stage):
        shutil.rmtree(path, ignore_errors=True)
