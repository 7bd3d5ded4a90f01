"""`--from RUN`: stages of another run whose key is the same are copied instead of trained again.

A key covers all that a stage's result depends on, so the copies are what training here would give on the same
machine. Only finished stages are taken, and only files that are what was written.
"""

import os
import shutil
from collections.abc import Sequence

from preftune.errors import DataError
from preftune.rundir import RunDir
from preftune.runs.session import Session
from preftune.runs.stages import Stage, is_finished, made_of_what_is_here, model_sum
from preftune.sums import CARD, check, listed, read_sealed


def takeable(session: Session, other: RunDir, stages: Sequence[str]) -> list[str]:
    """Those of the stages, parents first, that are not finished here and finished with the same key there."""
    found: list[str] = []
    for stage in map(session.stage, stages):
        if not is_finished(session.run, stage) and _same(session.run, other, stage, found):
            found.append(stage.name)
    return found


def take(session: Session, other: RunDir, stage: Stage) -> bool:
    """Copy a finished stage of the same key, its record last; whether there was one. DataError, naming the
    file, for one that is not what was written, or a link.
    """
    run = session.run
    if is_finished(run, stage) or not _same(run, other, stage):
        return False
    record = read_sealed(other.stage_json(stage.name))
    check(other, record, f"leave out --from, which makes {stage.name} anew")
    here, there = stage.model_dir(run), stage.model_dir(other)
    logs = [file(stage.name) for file in (other.metrics, other.ledger, other.stage_json)]
    for path in (there, *there.rglob("*"), *logs):
        if path.is_symlink():
            raise DataError(f"{path} is a link", "give a run directory that holds its own files")
    draft = here.with_name(f".tmp-{here.name}-{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    files = [file for file in map(other.path.joinpath, listed(record) or ()) if there in file.parents]
    for source in {*files, *there.glob(CARD)}:
        copy = draft / source.relative_to(there)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)
    shutil.rmtree(here, ignore_errors=True)  # of an attempt that was not finished
    os.rename(draft, here)
    shutil.rmtree(run.checkpoints(stage.name), ignore_errors=True)
    run.stage_dir(stage.name).mkdir(parents=True, exist_ok=True)
    for source, target in zip(logs, (run.metrics, run.ledger, run.stage_json), strict=True):
        if source.is_file():
            partial = target(stage.name).with_name(f".{source.name}.tmp-{os.getpid()}")
            shutil.copyfile(source, partial)
            os.replace(partial, target(stage.name))
    session.console.line(f"{stage.name:<12} taken from {other.path}")
    return True


def _same(run: RunDir, other: RunDir, stage: Stage, taken: Sequence[str] = ()) -> bool:
    """Whether `other` has the stage finished with this key and made of the parents that are here, or of those
    that are `taken` from there as well.
    """
    record = read_sealed(other.stage_json(stage.name))
    if record.get("key") != stage.key or record.get("status") != "finished" or listed(record) is None:
        return False
    return stage.model_dir(other).is_dir() and made_of_what_is_here(
        run, record, {parent: model_sum(other, parent) for parent in taken}
    )
