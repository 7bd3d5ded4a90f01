"""Carrying out a run: open it and train what is missing. Loads torch."""

from collections.abc import Sequence
from pathlib import Path

from preftune.config import RunConfig, dump_toml
from preftune.data import Dataset
from preftune.rundir import BASE, RunDir, json_text, read_object, write_json, write_text
from preftune.runs.console import Console
from preftune.runs.lock import is_main_process
from preftune.runs.mirror import Mirror
from preftune.runs.provenance import describe
from preftune.runs.session import Session
from preftune.runs.stages import is_finished, unverified
from preftune.runs.train import run_stage
from preftune.sums import check_own, note
from preftune.training.learner import Learner, effective_precision
from preftune.training.processes import answering


def open_session(
    config: RunConfig,
    dataset: Dataset,
    run: RunDir,
    console: Console,
    mirror: str | None = None,
    *,
    trains: bool = True,
) -> Session:
    """A session whose settings, data and provenance are on record; to be asked for under the lock.

    ConfigError if a stage in `run`, or in the directory `mirror`, was made with other settings: nothing is
    written then, config.toml least of all.
    """
    _meet(config)  # --restart may have removed what is there
    session = Session(config=config, dataset=dataset, run=run, console=console, trains=trains)
    if mirror is not None:
        session.mirror = Mirror(
            directory=Path(mirror), run=run, keep=config.checkpoint.keep, say=console.line
        )
    for name in [*([BASE] if config.model.scratch is not None else []), *config.stage]:
        stage = session.stage(name)
        if not is_finished(run, stage) and session.mirror is not None:
            session.mirror.check(stage)
    if is_main_process():
        _record(session)
        if old := unverified(run):
            console.line(f"not verified: made before preftune kept sums of files: {', '.join(old)}")
    if effective_precision(config.precision) != config.precision:
        console.line(f"precision {config.precision} needs a GPU; this run uses float32")
    return session


def _record(session: Session) -> None:
    """Write config.toml, data.json and run.json where they differ from what is there, and note their sums."""
    run, config, report_of_data = session.run, session.config, session.dataset.report
    if not _holds(run.config, dump_toml(config)):
        write_text(run.config, dump_toml(config))
    if not _holds(run.data, json_text(report_of_data)):
        write_json(run.data, report_of_data)
    if not run.run.exists():
        write_json(run.run, describe(config.seed))
    else:
        check_own(run, run.run)
        read_object(run.run)
    note(run, (run.config, run.data, run.run))


def _holds(file: Path, text: str) -> bool:
    return file.is_file() and file.read_bytes() == text.encode()


def train_stages(session: Session, stages: Sequence[str]) -> None:
    """The base model from scratch if there is one, then the stages, each unless it is finished."""
    scratch = [BASE] if session.config.model.scratch is not None else []
    for name in [*scratch, *stages]:
        if session.mirror is not None:
            if is_main_process():
                session.mirror.fetch(session.stage(name))
            _meet(session.config)
        with answering(session.config.process_timeout):
            run_stage(session, session.stage(name))


def _meet(config: RunConfig) -> None:
    """Wait until every process is here: the others go by the files that the main one has put in order."""
    with answering(config.process_timeout):
        Learner(config.precision, process_timeout=config.process_timeout).wait()
