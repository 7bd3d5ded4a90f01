"""Carrying out a run: train what is missing, measure it, write it up. Loads torch."""

from collections.abc import Sequence
from pathlib import Path

from preftune.config import RunConfig, dump_toml
from preftune.data import Dataset
from preftune.errors import StorageError
from preftune.pipeline.console import Console
from preftune.pipeline.evaluate import evaluate_run
from preftune.pipeline.lock import is_main_process
from preftune.pipeline.mirror import Mirror
from preftune.pipeline.provenance import describe
from preftune.pipeline.session import Session
from preftune.pipeline.stages import is_finished
from preftune.pipeline.train import run_stage
from preftune.rundir import BASE, RunDir, plain, read_json, read_text, write_json, write_text
from preftune.training.learner import Learner, effective_precision
from preftune.training.processes import answering


def open_session(
    config: RunConfig, dataset: Dataset, run: RunDir, console: Console, mirror: str | None = None
) -> Session:
    """A session whose settings, data and provenance are on record.

    ConfigError if a stage in `run`, or in the directory `mirror`, was made with other settings: nothing is
    written then, config.toml least of all.
    """
    _meet(config)  # --restart may have removed what is there
    session = Session(config=config, dataset=dataset, run=run, console=console)
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
    if effective_precision(config.precision) != config.precision:
        console.line(f"precision {config.precision} needs a GPU; this run uses float32")
    return session


def _record(session: Session) -> None:
    """Write config.toml, data.json and run.json where they differ from what is there."""
    run, config, report_of_data = session.run, session.config, session.dataset.report
    if not run.config.is_file() or read_text(run.config) != dump_toml(config):
        write_text(run.config, dump_toml(config))
    if not run.data.is_file() or read_json(run.data) != plain(report_of_data):
        write_json(run.data, report_of_data)
    if not run.run.exists():
        write_json(run.run, describe(config.seed))


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


def measure(session: Session, stages: Sequence[str]) -> None:
    """Evaluate, write the report, show the table and say where everything lies."""
    from preftune import report  # here, since matplotlib takes a second and training need not wait for it

    run, console = session.run, session.console
    if evaluate_run(session, stages) or not run.analysis_text.exists():
        try:
            report.build(run)
        except StorageError as error:  # the run is what took long, and it is there
            console.line(f"warning: {error.message}; preftune report {run.path} writes the report")
    table = report.comparison_table(report.load_run(run))
    console.table(table.headers, table.rows)
    if run.reward_evaluation.exists():
        accuracy = read_json(run.reward_evaluation)["accuracy"]
        low, high = accuracy["interval"]
        share = f"{accuracy['value']:.3f} [{low:.3f}, {high:.3f}]"
        console.line(f"reward model: accuracy {share} on {accuracy['n']:,} validation pairs")
    for what, path in (("analysis", run.analysis_text), ("report", run.report_page), ("models", run.models)):
        console.line(f"{what + ':':<10}{path}")
