"""`--redo STAGE`: a stage and what hangs on it are made anew, while the old ones are kept aside until then.

    .aside/request.json      the stages asked for, the keys to be made, whether all were moved
    .aside/STAGE/stage · model

Directories are renamed, never copied; a kill leaves every one of them in one of the two places. The next
command goes on, with --redo or without; one with the settings of the old stage puts that back.
"""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from preftune.config import parents
from preftune.config.algorithms.base import StageSettings
from preftune.errors import UsageError, no_bare_text, one_of
from preftune.rundir import RunDir, read_object, write_json
from preftune.runs.stages import Stage, made_of_what_is_here
from preftune.sums import read_sealed


def with_children(stages: Mapping[str, StageSettings], names: Sequence[str]) -> list[str]:
    """The stages asked for and all that read their models. UsageError for a name that is no stage."""
    no_bare_text("redo", names)
    for name in names:
        if name not in stages:
            raise UsageError(f"--redo {name}: there is no such stage", one_of(name, stages))
    affected = set(names)
    while more := {n for n, s in stages.items() if n not in affected and affected & set(parents(s))}:
        affected |= more
    return [name for name in stages if name in affected]


def put_aside(
    run: RunDir,
    stages: Sequence[Stage],
    names: Sequence[str],
    before: Callable[[Sequence[str]], None] = lambda moving: None,
) -> list[str]:
    """Move what is there of these stages out of the way; the names of those that were moved now. `before` is
    told first which stages are asked for. A call with what was asked before goes on with that and moves
    nothing, until `close` says that a command has come to its end.
    """
    request: dict[str, Any] = {"asked": list(names), "keys": {stage.name: stage.key for stage in stages}}
    if _request(run) == {**request, "moved": True}:
        return []
    begun = [stage for stage in stages if (_folder(run, stage) / "stage").is_dir()]
    moving = [stage for stage in stages if stage not in begun and run.stage_json(stage.name).is_file()]
    before([stage.name for stage in stages])
    write_json(_file(run), request)
    for stage in begun:
        _drop(run, stage)  # a new one that was not finished
    for stage in moving:
        _move(run, stage)
    write_json(_file(run), {**request, "moved": True})
    return [stage.name for stage in moving]


def half_moved(run: RunDir, stages: Mapping[str, Stage]) -> list[str]:
    """The stages that a command was asked to make again, and was killed while it moved them; [] if the
    settings have changed since.
    """
    request = _request(run)
    if not request or request.get("moved"):
        return []
    unchanged = all(name in stages and stages[name].key == key for name, key in request["keys"].items())
    return list(request["asked"]) if unchanged else []


def put_back(
    run: RunDir, stage: Stage, before: Callable[[Sequence[str]], None] = lambda moving: None
) -> bool:
    """Put the old stage back if the settings are those of the old stage, not of the new one. `before` is told
    first.
    """
    folder = _folder(run, stage)
    if not folder.is_dir() or _request(run).get("keys", {}).get(stage.name) == stage.key:
        return False
    old = folder / "stage" / "stage.json"
    record = read_sealed(old if old.is_file() else run.stage_json(stage.name), stage.name)
    if record.get("key") != stage.key or not made_of_what_is_here(run, record):
        return False
    before([stage.name])
    if old.is_file():
        _drop(run, stage)
    for target, name in _folders(run, stage):
        if (folder / name).is_dir():
            shutil.rmtree(target, ignore_errors=True)
            os.rename(folder / name, target)
    settle(run, stage)
    close(run)
    return True


def settle(run: RunDir, stage: Stage) -> None:
    """Remove what is kept of the old stage: the new one is finished, or the old one is back."""
    shutil.rmtree(_folder(run, stage), ignore_errors=True)


def close(run: RunDir) -> None:
    """Forget what was asked for, unless an old stage still waits for its new one."""
    if run.aside.is_dir() and not any(path.is_dir() for path in run.aside.iterdir()):
        shutil.rmtree(run.aside, ignore_errors=True)


def _file(run: RunDir) -> Path:
    return run.aside / "request.json"


def _request(run: RunDir) -> dict[str, Any]:
    return read_object(_file(run)) if _file(run).is_file() else {}


def _folder(run: RunDir, stage: Stage) -> Path:
    return run.aside / stage.name


def _folders(run: RunDir, stage: Stage) -> tuple[tuple[Path, str], ...]:
    """The model first: a stage whose record is still in place can be recognised."""
    return (stage.model_dir(run), "model"), (run.stage_dir(stage.name), "stage")


def _move(run: RunDir, stage: Stage) -> None:
    folder = _folder(run, stage)
    folder.mkdir(parents=True, exist_ok=True)
    for source, name in _folders(run, stage):
        if source.is_dir() and not (folder / name).exists():
            os.rename(source, folder / name)


def _drop(run: RunDir, stage: Stage) -> None:
    for path, _ in _folders(run, stage):
        shutil.rmtree(path, ignore_errors=True)
