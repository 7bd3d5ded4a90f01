"""Carrying out a run: open it and train what is missing. Loads torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from preftune.algorithms import ALGORITHMS
from preftune.config import EVALUATION, RunConfig, dump_toml, stage_order
from preftune.config.trainable import LORA, top_blocks
from preftune.data import Dataset
from preftune.errors import ConfigError
from preftune.models.adapter import adapt
from preftune.models.check import check_scalar_head
from preftune.models.load import context_length, load_causal_lm, load_tokenizer
from preftune.models.locate import Source
from preftune.models.memory import give_back_memory
from preftune.models.quantised import backend
from preftune.models.trunk import share_trunk
from preftune.records.base import read_record, write_record
from preftune.records.run import DataRecord, RunRecord
from preftune.rundir import BASE, RunDir, json_text, write_text
from preftune.runs.aside import half_moved, put_aside, put_back, settle, with_children
from preftune.runs.collect import collect_stage
from preftune.runs.console import Console
from preftune.runs.ensemble import make_ensemble, refuse_changed_members
from preftune.runs.lock import is_main_process
from preftune.runs.mirror import Mirror
from preftune.runs.provenance import describe
from preftune.runs.session import Session
from preftune.runs.sizes import sizes
from preftune.runs.stages import Stage, goes_on, is_finished, unverified
from preftune.runs.takeover import take, what_is_kept
from preftune.runs.train import run_stage
from preftune.sums import check_own, note
from preftune.training.learner import Learner
from preftune.training.precision import remark
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
    origin: RunDir | None = None,
    redo: Sequence[str] = (),
) -> Session:
    """A session whose settings, data and provenance are on record; to be called under the lock. `base` is
    where its base model was found.

    ConfigError if a stage in `run`, or in the directory `mirror`, was made with other settings: nothing is
    written then, config.toml least of all.
    """
    _meet(config)  # --restart may have removed what is there
    session = Session(
        config=config,
        dataset=dataset,
        run=run,
        console=console,
        mirror=None if mirror is None else Mirror(directory=Path(mirror), run=run, say=console.line),
        trains=trains,
        located=base,
        origin=origin,
    )
    stages = [session.stage(name) for name in [*session.scratch, *stage_order(config.stage)]]
    if trains and (redo := redo or half_moved(run, {stage.name: stage for stage in stages})):
        session.anew = with_children(config.stage, redo)
        for stage in stages:
            if stage.name not in session.anew:
                _refuse_changed(session, stage)  # before the others are moved
    _meet(config)
    if trains and is_main_process():
        _make_way(session, redo)
    _meet(config)
    for stage in stages:
        if _refuse_changed(session, stage) and session.mirror is not None and is_main_process():
            session.mirror.forget([stage.name])
    if is_main_process():
        _record(session)
        if session.mirror is not None:
            session.mirror.put_commits(session.commits())
        if old := unverified(run):
            console.line(f"not verified: made before preftune kept sums of files: {', '.join(old)}")
    if warning := remark(config.precision, session.precision):
        console.line(warning)
    return session


def _refuse_changed(session: Session, stage: Stage) -> bool:
    """ConfigError if a stage was made with other settings, here or in the mirror. True if it goes on from its
    end here: what was mirrored is the shorter one.
    """
    if is_finished(session.run, stage):
        return False
    if stage.name in session.config.stage and session.config.stage[stage.name].models > 1:
        refuse_changed_members(session, stage)
    if session.mirror is None:
        return False
    if goes_on(session.run, stage):
        return True
    session.mirror.check(stage)
    return False


def _make_way(session: Session, redo: Sequence[str]) -> None:
    """Stages that are to be made anew go aside, in the mirror too; old ones that are wanted come back."""
    run, stages = session.run, session.config.stage
    forget = (lambda moving: None) if session.mirror is None else session.mirror.forget
    if redo:
        moved = put_aside(run, [session.stage(name) for name in session.anew], redo, forget)
        if moved:
            session.console.line(
                f"training again: {', '.join(moved)}; the old ones are kept in {run.aside} until then"
            )
        return
    for stage in map(session.stage, stage_order(stages)):
        if put_back(run, stage, forget):
            session.console.line(f"{stage.name:<12} the old one is back in its place")


def _record(session: Session) -> None:
    """Write config.toml, data.json and run.json where they differ from what is there, and note their sums."""
    run, config, report_of_data = session.run, session.config, session.dataset.report
    if not _holds(run.config, dump_toml(config)):
        write_text(run.config, dump_toml(config))
    if not _holds(run.data, json_text(report_of_data)):
        write_record(run.data, report_of_data, DataRecord)
    if not run.run.exists():
        write_record(run.run, describe(config.seed) | _resolved(session), RunRecord)
    else:
        check_own(run, run.run)
        read_record(run.run, RunRecord)
    note(run, (run.config, run.data, run.run))


def _resolved(session: Session) -> dict[str, Any]:
    """What settings came to mean here, and a resumed run goes on with, whatever the hub and the machine are
    then: the commit of a base model from the hub, the precision that `auto` is.
    """
    facts = dict[str, Any]()
    if session.commit_of_base:
        facts["base"] = {"name": session.base.name, "commit": session.base.commit}
    if session.config.precision == "auto":
        facts["precision"] = session.precision
    return facts


def _holds(file: Path, text: str) -> bool:
    return file.is_file() and file.read_bytes() == text.encode()


def train_stages(session: Session, stages: Sequence[str], *, compared: bool = False) -> None:
    """The base model from scratch if there is one, then the stages, each unless it is finished. `compared`:
    an evaluation follows.
    """
    check_base(session, stages, compared=compared)
    base = None if session.scratch else session.base
    for line in sizes(session.config, base, stages, session.dataset):
        session.console.line(line)
    names = [*session.scratch, *stages]
    for line in what_is_kept(session, names):
        session.console.line(line)
    for stage in map(session.stage, names):
        if is_main_process():
            _fetch(session, stage)
        _meet(session.config)
        with answering(session.config.process_timeout):
            is_new = _make(session, stage)
            if session.mirror is not None and is_main_process():
                session.mirror.put_stage(stage)
        if is_new:
            give_back_memory()
        if is_main_process():
            settle(session.run, stage)


def _make(session: Session, stage: Stage) -> bool:
    """Train or collect a stage unless it is finished; returns whether anything was done."""
    if not stage.makes_model:
        return collect_stage(session, stage)
    if stage.name != BASE and session.config.stage[stage.name].models > 1:
        return make_ensemble(session, stage, _fetch)
    return run_stage(session, stage)


def _fetch(session: Session, stage: Stage) -> None:
    """What there is of a stage in another run, or in the mirror."""
    if session.origin is not None:
        take(session, session.origin, stage)
    if session.mirror is not None:
        session.mirror.fetch(stage)


def check_base(session: Session, stages: Sequence[str], *, compared: bool = False) -> None:
    """DataError for a base model that a stage could not use, before any of them is trained, and what
    `_check_room` raises.
    """
    if session.config.model.lora.quantize != "none":
        backend()
    if session.config.model.scratch is not None:
        return
    unfinished = [name for name in stages if not is_finished(session.run, session.stage(name))]
    if not unfinished:
        return
    _check_room(session, unfinished, compared=compared)
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


def _check_room(session: Session, stages: Sequence[str], *, compared: bool) -> None:
    """ConfigError for replies that leave no room for a prompt in the base model's context. Where prompts
    become shorter than `data.max_prompt_length` by them, that is said.
    """
    config, context = session.config, context_length(session.base)
    if not context:
        return
    longest = {name: (f"stage.{name}.max_new_tokens", config.stage[name].new_tokens) for name in stages}
    evaluated = "evaluation.max_new_tokens", config.evaluation.max_new_tokens
    longest |= {n: evaluated for n in stages if config.stage[n].makes == "data" and not longest[n][1]}
    if compared:
        longest[EVALUATION] = evaluated
    for key, tokens in dict.fromkeys(longest.values()):
        room = context - tokens
        if room < 1:
            raise ConfigError(
                f"{key} = {tokens} leaves no room for a prompt: {config.model.base} reads {context} tokens",
                f"set it below {context}",
            )
        if room < min(config.data.max_prompt_length, context - 1):
            session.console.line(
                f"{key} = {tokens} of the {context} tokens that {config.model.base} reads: prompts are cut "
                f"to {room} tokens there (data.max_prompt_length = {config.data.max_prompt_length})"
            )


def _meet(config: RunConfig) -> None:
    """Wait until every process is here: the others go by the files that the main one has put in order."""
    with answering(config.process_timeout):
        Learner(config.precision, process_timeout=config.process_timeout).wait()
