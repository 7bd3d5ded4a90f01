"""`--from RUN`: stages of another run whose key is the same are copied instead of trained again.

A key covers all that a stage's result depends on, so the copies are what training here would give on the same
machine. Only finished stages are taken, and only files that are what was written.
"""

from collections.abc import Iterator, Sequence

from preftune.errors import DataError
from preftune.rundir import RunDir, read_text, write_text
from preftune.runs.session import Session
from preftune.runs.stages import (
    Stage,
    changes,
    copy_files,
    drop_checkpoints,
    is_finished,
    made_of_what_is_here,
    refuse_foreign,
)
from preftune.sums import CARD, check, model_sum, read_sealed, recorded_sums, write_sealed
from preftune.untrusted import redact


def what_is_kept(session: Session, stages: Sequence[str]) -> Iterator[str]:
    """Lines for people: which of the stages, parents first, are taken over, and why others are not."""
    if session.origin is None:
        return
    origin, reusable, reasons = session.origin, list[str](), dict[str, str]()
    for stage in map(session.stage, stages):
        if stage.name in session.anew or is_finished(session.run, stage):
            continue
        if why := _reason(session.run, origin, stage, reusable):
            reasons[stage.name] = why
        else:
            reusable.append(stage.name)
    yield f"taken over from {origin.path}: {', '.join(reusable) or 'nothing'}"
    yield from (f"trained here: {name} ({why})" for name, why in reasons.items())


def take(session: Session, origin: RunDir, stage: Stage) -> bool:
    """Copy a finished stage of the same key, its record last, with `taken_from`: the run that trained it.
    Returns whether there was one. DataError, naming the file, for what was not written so, or is a link;
    ConfigError where somebody else's directory is in the way.
    """
    run = session.run
    anew = stage.name.partition("/")[0] in session.anew  # a member is made anew with its stage
    if anew or is_finished(run, stage) or _reason(run, origin, stage):
        return False
    record = read_sealed(origin.stage_json(stage.name))
    check(origin, record, f"leave out --from, which makes {stage.name} anew")
    target, folder = stage.model_dir(run), stage.model_dir(origin)
    files = {name: origin.path / name for name in recorded_sums(record) or {}}
    for path in (folder.parent, folder, *folder.rglob("*"), origin.stage_dir(stage.name), *files.values()):
        if path.is_symlink():
            raise DataError(f"{path} is a link", "give a run directory that holds its own files")
    if any(not f.is_relative_to(folder) and f.parent != origin.stage_dir(stage.name) for f in files.values()):
        raise DataError(
            f"the record of {stage.name} in {origin.path} names files of others", "leave out --from"
        )
    refuse_foreign(target)
    model_files = [
        file for file in (*files.values(), folder / CARD) if file.is_relative_to(folder) and file.is_file()
    ]
    copy_files({str(file.relative_to(folder)): file for file in model_files}, target)
    drop_checkpoints(run, stage)
    for name, source in files.items():
        if source not in model_files:
            write_text(run.path / name, read_text(source))
    write_sealed(run.stage_json(stage.name), {"taken_from": redact(str(origin.path.resolve())), **record})
    session.console.line(f"{stage.name:<12} taken from {origin.path}")
    return True


def _reason(run: RunDir, origin: RunDir, stage: Stage, reused: Sequence[str] = ()) -> str:
    """Why the stage of `origin` is not that of this run; "" if it is: finished there with the same key, and
    made of the parents that are here, or of those that are `reused` from there as well.
    """
    record = read_sealed(origin.stage_json(stage.name))
    if record.get("status") != "finished" or not stage.model_dir(origin).is_dir():
        return "not finished there"
    if record.get("key") != stage.key:
        changed = changes(record, stage)
        lines = [line for line in changed if not line.startswith("parents.")]
        return "; ".join(lines[:3]) or f"another {' and '.join(line[8:].split(':')[0] for line in changed)}"
    if recorded_sums(record) is None:
        return "made before sums were kept"
    parents = {parent: model_sum(origin, parent) for parent in reused}
    return "" if made_of_what_is_here(run, record, parents) else "its parent here has other bits"
