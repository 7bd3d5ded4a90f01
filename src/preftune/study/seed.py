"""One seed of a study: a full run directory, and what was measured beside it."""

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preftune.config import stage_order
from preftune.records.study import SeedRecord
from preftune.rundir import RunDir
from preftune.runs.console import Console
from preftune.runs.inputs import check_llm_judges
from preftune.runs.lock import held
from preftune.runs.reopen import checked_data
from preftune.study.alike import refuse_others, stage_keys
from preftune.study.design import Design, load_design, save_design, swept
from preftune.study.kept import contents
from preftune.study.kept import keep as put_by
from preftune.study.places import facts_file, numbers_in, point_dir, seed_dir
from preftune.study.tasks import Task
from preftune.study.tokens import spent_tokens
from preftune.sums import check, read_sealed, sums, write_sealed

if TYPE_CHECKING:
    from preftune.runs.session import Session


def is_finished(out: Path, design: Design, seed: int) -> bool:
    """Whether this seed is done with just this design. DataError if a file of its numbers is not as it was
    written.
    """
    record, run = read_sealed(facts_file(out, seed)), RunDir(seed_dir(out, seed))
    if record.get("key") != design.key(seed):
        return False
    check(run, record, f"remove {run.path / 'study'} and run the same command: it measures that seed again")
    return True


def run_seed(task: Task) -> None:
    """Train, evaluate and measure one seed; what exists is not made again. With `stages` only these are
    trained: a part of a seed that is spread over machines. `point`, the last of them, has a run directory of
    its own beside the seed's, so that several can be trained at a time; the seed takes it over.

    `mirror` is the study's, for machines without common storage: the design comes from there, checkpoints and
    models go to its seed-N, a finished seed's numbers to its `numbers`. `keep` has those of other seeds.

    DataError if a finished seed of the study was made of other functions or models than there are now.
    """
    out, mirror = task.out, task.mirror
    if mirror is not None and (mirror / "design.json").is_file():
        save_design(load_design(mirror), out)
    design = load_design(out)
    if task.stages or not is_finished(out, design, task.seed):
        _make(task, design)
    if mirror is not None and not task.stages:  # of a seed too that was stopped just before
        put_by(out, numbers_in(mirror), design, task.seed)


def _make(task: Task, design: Design) -> None:
    """What is missing of a seed, or of the task's stages."""
    out, seed, mirror, point = task.out, task.seed, task.mirror, task.point
    config, began = design.for_seed(seed), time.monotonic()
    seed_run, copies = RunDir(seed_dir(out, seed)), None if mirror is None else str(seed_dir(mirror, seed))
    check_llm_judges(config, seed_run)
    dataset, base = checked_data(config, seed_run, copies)
    run = seed_run if point is None else RunDir(point_dir(out, seed, point))
    with held(run):
        console = Console(log=run.log(run.next_attempt()))
        from preftune.runs import runner
        from preftune.runs.takeover import take

        session = runner.open_session(
            config,
            dataset,
            run,
            console,
            copies,
            base=base,
            origin=None if point is None else seed_run,
        )
        refuse_others(session, design, out, mirror, task.keep)
        if task.stages:
            runner.train_stages(session, task.stages)
            return
        for name in swept(design):
            take(session, RunDir(point_dir(out, seed, name)), session.stage(name))
        runner.train_stages(session, stage_order(config.stage), compared=True)
        _measure(session, design, out, task.reports, began)
    for name in swept(design):
        shutil.rmtree(point_dir(out, seed, name), ignore_errors=True)


def _measure(session: "Session", design: Design, out: Path, reports: bool, began: float) -> None:
    """Evaluate and measure a trained seed; its facts are written last."""
    from preftune.measure.write_up import measure_and_report
    from preftune.study.measure import measure_seed

    config, run, target = session.config, session.run, facts_file(out, session.config.seed)
    if reports:
        measure_and_report(session, [n for n in stage_order(config.stage) if n in design.recipe_stages])
    facts = measure_seed(session, design)
    tuned = [n for n, s in config.stage.items() if s.tunes]
    record: dict[str, Any] = {
        "seed": config.seed,
        "key": design.key(config.seed),
        "seconds": time.monotonic() - began,  # of the last attempt
        "content_sha256": contents(session.dataset),
        "stages": stage_keys(session),
        **facts,
        "tokens": {name: spent_tokens(run, name) for name in tuned},
    }
    SeedRecord.model_validate(record)
    numbers = [file for file in target.parent.glob("*.json") if file.name != target.name]
    write_sealed(target, {**record, "files": sums(run, numbers)})
