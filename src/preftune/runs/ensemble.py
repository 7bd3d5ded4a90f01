"""A reward stage with several members: each is a stage of its own, "rm/member-0", and they are combined.

    stages/rm/member-0/...                as of any stage
    models/reward_model/member-0/...      a plain Hugging Face directory
    models/reward_model/                  tokenizer, config, and how the scores are combined (preftune.json)
    stages/rm/metrics.jsonl, ledger       the mean of the members' metrics by step, the rows of all of them

So a kill loses what it loses of a stage, and to add a member, or to combine them otherwise, trains no other.
"""

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any

from preftune.models.load import load_tokenizer, vocabulary_hash
from preftune.models.locate import Source
from preftune.rundir import RunDir, read_json, read_jsonl, write_json, write_jsonl, write_text
from preftune.runs.cards import model_card
from preftune.runs.experts import fitted_gate
from preftune.runs.provenance import peak_memory_mb, reset_peak_memory
from preftune.runs.roles import share
from preftune.runs.save import load_reward_model, normalised, settle
from preftune.runs.session import Session
from preftune.runs.stages import SIDE_FILE, OtherSettings, Stage, begin, finish, is_finished
from preftune.runs.train import run_stage
from preftune.training.learner import Learner

Json = dict[str, Any]
_OF_ALL = ("form", "template_arguments", "pooling")  # what is the same for all members


def make_ensemble(session: Session, stage: Stage, fetch: Callable[[Session, Stage], None]) -> bool:
    """Train the members that are missing (`fetch` looks for them elsewhere first) and combine them, unless
    that is done; returns whether anything was.
    """
    learner, done = session.learner(1), is_finished(session.run, stage)
    inner, members = (session, []) if done else refuse_changed_members(session, stage)
    learner.wait()  # every process has looked
    if done:
        session.console.say_skipped(stage.name)
        return False
    if learner.is_main:
        _begin(session.run, stage)
    session.say_left_out(stage.name)
    for member in members:
        if learner.is_main:
            fetch(inner, member)
        learner.wait()
        run_stage(inner, member)
        if learner.is_main and session.mirror is not None:
            session.mirror.put_stage(member)
    if learner.is_main:
        _finish(session, stage, members, learner)
    learner.wait()
    return True


def refuse_changed_members(session: Session, stage: Stage) -> tuple[Session, list[Stage]]:
    """The members of an ensemble that is to be made or combined, and a session that has them among its
    stages. OtherSettings, of the ensemble, if one was made with other settings.
    """
    inner = _with_members(session, stage.name)
    members = [inner.stage(name) for name in session.config.stage[stage.name].member_names(stage.name)]
    for member in members:
        try:
            is_finished(session.run, member)
        except OtherSettings as error:  # --redo takes the whole
            raise OtherSettings(stage.name, error.message, error.hint) from None
    return inner, members


def _with_members(session: Session, name: str) -> Session:
    """A copy of the session that has the members among its stages."""
    settings = session.config.stage[name]
    members = {member: settings.member(i) for i, member in enumerate(settings.member_names(name))}
    config = session.config.model_copy(update={"stage": {**session.config.stage, **members}})
    return replace(session, config=config)


def _begin(run: RunDir, stage: Stage) -> None:
    begin(run, stage)
    target = stage.model_dir(run)
    for file in target.glob("*"):  # of one model, or of an ensemble that was combined otherwise
        if file.is_file() and file.name != SIDE_FILE:
            file.unlink()
    write_json(target / SIDE_FILE, {"stage": stage.name, "key": stage.key})  # says that it is ours


def _finish(session: Session, stage: Stage, members: Sequence[Stage], learner: Learner) -> None:
    """The directory's own files, and the stage's record of all of them."""
    run, target, began = session.run, stage.model_dir(session.run), time.monotonic()
    reset_peak_memory()
    for folder in (target, run.stage_dir(stage.name)):
        for old in sorted(folder.glob("member-*")):
            if old.name not in {member.name.partition("/")[2] for member in members}:
                shutil.rmtree(old)
    facts = _combine(session, stage, members, learner)
    records = [read_json(run.stage_json(member.name)) for member in members]
    _logs(run, stage, members)
    seconds = [float(record["seconds"]) for record in records]
    learners = records[: len(session.config.stage[stage.name].learners())]  # experts; members are alike
    steps = [int(record["steps"]) for record in learners]
    states = {
        f"{member.name.partition('/')[2]}/{file}": digest
        for member, record in zip(members, records, strict=True)
        for file, digest in record.get("state_sha256", {}).items()
    }
    facts |= {
        "steps": max(steps),
        "rejected": dict(sum((Counter(record["rejected"]) for record in learners), Counter[str]())),
        "seconds": sum(seconds) + time.monotonic() - began,
        "peak_memory_mb": max(
            [peak_memory_mb() or 0, *(record["peak_memory_mb"] or 0 for record in records)]
        ),
        "state_sha256": states,
    }
    finish(run, stage, facts)
    counts = " and ".join(map(str, steps))
    session.console.line(f"{stage.name:<12} {len(members)} members of {counts} steps combined")


def _combine(session: Session, stage: Stage, members: Sequence[Stage], learner: Learner) -> Json:
    """Write what makes the members one reward model: how they are combined, and mean and sd of the result."""
    target, settings = stage.model_dir(session.run), session.config.stage[stage.name]
    first = Source(str(members[0].model_dir(session.run)))
    tokenizer = load_tokenizer(first)
    shutil.copyfile(Path(first.path) / "config.json", target / "config.json")
    tokenizer.save_pretrained(target)
    sides = [read_json(member.model_dir(session.run) / SIDE_FILE) for member in members]
    side = {key: value for key, value in sides[0].items() if key in _OF_ALL} | {
        "stage": stage.name,
        "key": stage.key,
        "vocabulary_sha256": vocabulary_hash(tokenizer),
        **{key: getattr(settings, key) for key in settings.combining},
        "members": [{"mean": unit["mean"], "std": unit["std"]} for unit in sides],
    }
    write_json(target / SIDE_FILE, side)
    source = Source(str(target))
    if settings.kinds:
        fitted_gate(session, stage, first, learner).save(target)
    model = load_reward_model(source)
    share(model, session.config.shared_blocks())  # what lies below is computed once for all members
    mean, std = normalised(session, stage.name, model, session.encoder(source))
    unit: Json = {"mean": mean, "std": std}
    write_json(target / SIDE_FILE, side | unit)
    write_text(target / "README.md", model_card(session, stage))
    settle(target, target.glob("*"))
    return unit


def _logs(run: RunDir, stage: Stage, members: Sequence[Stage]) -> None:
    """One row a step for all members together, of experts for those that have so many."""
    metrics = [read_jsonl(run.metrics(member.name)) for member in members]
    write_jsonl(run.metrics(stage.name), map(_mean, _by_step(metrics)))
    ledgers = [read_jsonl(run.ledger(member.name)) for member in members]
    write_jsonl(
        run.ledger(stage.name),
        [
            {"step": rows[0]["step"], "rows": [row for entry in rows for row in entry["rows"]]}
            for rows in _by_step(ledgers)
        ],
    )


def _by_step(logs: Sequence[Sequence[Json]]) -> Iterator[list[Json]]:
    """The rows of each step: fewer where some of the logs have ended."""
    for rows in zip_longest(*logs):
        yield [row for row in rows if row is not None]


def _mean(rows: Sequence[Mapping[str, Any]]) -> Json:
    return {"step": rows[0]["step"]} | {
        name: fmean(float(row[name]) for row in rows if name in row) for name in rows[0] if name != "step"
    }
