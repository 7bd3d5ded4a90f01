"""Carrying out a run: open it and train what is missing. Loads torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from preftune.algorithms import ALGORITHMS
from preftune.config import RunConfig, dump_toml
from preftune.config.trainable import LORA, top_blocks
from preftune.data import Dataset
from preftune.models.adapter import adapt
from preftune.models.check import check_scalar_head
from preftune.models.load import load_causal_lm, load_tokenizer
from preftune.models.locate import Source
from preftune.models.trunk import share_trunk
from preftune.records.base import read_record, write_record
from preftune.records.run import DataRecord, RunRecord
from preftune.rundir import BASE, RunDir, json_text, write_text
from preftune.runs.collect import collect_stage
from preftune.runs.console import Console
from preftune.runs.lock import is_main_process
from preftune.runs.mirror import Mirror
from preftune.runs.provenance import describe
from preftune.runs.session import Session
from preftune.runs.sizes import sizes
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
    base: Source | None = None,
    trains: bool = True,
) -> Session:
    """A session whose settings, data and provenance are on record; to be called under the lock. `base` is
    where its base model was found.

    ConfigError if a stage in `run`, or in the directory `mirror`, was made with other settings: nothing is
    written then, config.toml least of all.
    """
    _meet(config)  # --restart may have removed what is there
    session = Session(config=config, dataset=dataset, run=run, console=console, trains=trains, located=base)
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
        write_record(run.data, report_of_data, DataRecord)
    if not run.run.exists():
        write_record(run.run, describe(config.seed) | _commit_of_base(session), RunRecord)
    else:
        check_own(run, run.run)
        read_record(run.run, RunRecord)
    note(run, (run.config, run.data, run.run))


def _commit_of_base(session: Session) -> dict[str, Any]:
    """Of a base model from the hub: what a resumed run goes on with, whatever the hub has by then."""
    if not session.commit_of_base:
        return {}
    return {"base": {"name": session.base.name, "commit": session.base.commit}}


def _holds(file: Path, text: str) -> bool:
    return file.is_file() and file.read_bytes() == text.encode()


def train_stages(session: Session, stages: Sequence[str]) -> None:
    """The base model from scratch if there is one, then the stages, each unless it is finished."""
    scratch = [BASE] if session.config.model.scratch is not None else []
    check_base(session, stages)
    for line in sizes(session.config, None if scratch else session.base, stages):
        session.console.line(line)
    for name in [*scratch, *stages]:
        if session.mirror is not None:
            if is_main_process():
                session.mirror.fetch(session.stage(name))
            _meet(session.config)
        with answering(session.config.process_timeout):
            stage = session.stage(name)
            (run_stage if stage.makes_model else collect_stage)(session, stage)


def check_base(session: Session, stages: Sequence[str]) -> None:
    """DataError for a base model that a stage could not use, before any of them is trained."""
    if session.config.model.scratch is not None:
        return
    unfinished = [name for name in stages if not is_finished(session.run, session.stage(name))]
    if not unfinished:
        return
    load_tokenizer(session.base)
    model = load_causal_lm(session.base)
    models = [n for n in unfinished if session.config.stage[n].makes == "model"]
    tops = {top_blocks(session.config.trainable_of(name)) for name in models}
    for top in filter(None, tops):
        share_trunk(model, top)
    if any(session.config.trainable_of(name) == LORA for name in models):
        adapt(model, rank=1, alpha=1, seed=0)
    needs = {role for name in models for role in ALGORITHMS[session.config.stage[name].algorithm].needs}
    if needs & {"reward_model", "critic"}:
        check_scalar_head(session.base)


def _meet(config: RunConfig) -> None:
    """Wait until every process is here: the others go by the files that the main one has put in order."""
    with answering(config.process_timeout):
        Learner(config.precision, process_timeout=config.process_timeout).wait()
