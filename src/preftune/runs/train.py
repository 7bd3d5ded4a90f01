"""Training one stage: models into roles, rows into batches, the loop, and the finished model on disk."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, cast

from preftune.algorithms import ALGORITHMS
from preftune.algorithms.base import Algorithm, Roles
from preftune.algorithms.sft import SFT
from preftune.config import OnlineConfig, SFTConfig, StageSettings
from preftune.config.base import words_in
from preftune.data import Encoder, Preference, Sequences, first_encoded, pad_sequences
from preftune.data.corpus import LONGEST_TOKEN
from preftune.evaluation.policy import response_nll
from preftune.models.load import context_length, declared_ends, load_tokenizer, scratch_gpt2
from preftune.models.roles import Policy, RewardModel, Role
from preftune.models.shards import unsharded
from preftune.records.stage import NotTheLast
from preftune.rollout.functions import OnError, RewardFunctions, load_functions
from preftune.rollout.sampler import Sampler
from preftune.rollout.score import Scorer, read_alike
from preftune.rundir import BASE
from preftune.runs.feed import Feed, make_feed
from preftune.runs.head import fitted_head
from preftune.runs.job import Job
from preftune.runs.onlookers import onlookers
from preftune.runs.provenance import peak_memory_mb, reset_peak_memory
from preftune.runs.roles import keep_rows, make_roles
from preftune.runs.save import chosen_batches, finished_model
from preftune.runs.scoring import judge_encoder, reward_model_of
from preftune.runs.session import Session
from preftune.runs.sources import load_corpus, make_tokenizer
from preftune.runs.stages import Stage, begin, drop_checkpoints, finish, goes_on, is_finished
from preftune.runs.vllm import server_of
from preftune.seeding import derive_seed
from preftune.training.checkpoint import check_space, checkpoint_at, digests
from preftune.training.learner import Learner
from preftune.training.loop import EarlierState, Plan, Worth, train
from preftune.training.metrics import seconds_until

_VALIDATION_ROWS = 256


def run_stage(session: Session, stage: Stage) -> bool:
    """Train a stage unless it is finished; returns whether anything was done."""
    keeps = session.config.checkpoint.keep_last
    if is_finished(session.run, stage):
        drop_checkpoints(session.run, stage, keep_last=keeps)
        session.console.say_skipped(stage.name)
        return False
    reset_peak_memory()
    began = time.monotonic()
    job: Job = session.cut(stage.name, _prepare(session, stage.name))
    check_space(session.run.checkpoints(stage.name), job.learner)
    if job.learner.is_main:
        if longer := goes_on(session.run, stage):
            session.console.line(f"{stage.name:<12} {longer}")
        begin(session.run, stage)
    job.learner.wait()  # what the others look for now is in order
    plan = _plan(session, stage, job)
    with (
        session.console.progress(stage.name, stage.algorithm, job.steps) as on_step,
        onlookers(session, stage, job, on_step) as looks,
    ):
        first: int | None = None

        def batch_at(step: int) -> Any:
            nonlocal first
            first = step if first is None else first
            return job.learner.place(job.batch_at(step))

        ended = train(job.algorithm, job.learner, batch_at, plan, looks)
    before = seconds_until(plan.metrics, job.steps if first is None else first)
    with unsharded(job.model):
        _finish(session, stage, job, plan, began - before, ended)
    job.learner.wait()
    return True


def _finish(
    session: Session, stage: Stage, job: Job, plan: Plan, began: float, ended: EarlierState | None
) -> None:
    """In the main process, write the model and the facts about the stage. `began`: as if what earlier
    attempts have trained had been trained just before this one.
    """
    if job.learner.is_main:
        facts = finished_model(session, stage, job)
        steps = job.steps if ended is None else ended.kept
        facts |= {"steps": steps, "rejected": job.rejected, **_validation(session, stage.name, job)}
        facts |= {"world_size": job.learner.world}
        facts |= {"seconds": time.monotonic() - began, "peak_memory_mb": peak_memory_mb()}
        facts |= {ended.why: asdict(ended)} if ended is not None else {}
        last = checkpoint_at(plan.checkpoints, steps)
        facts |= {"state_sha256": digests(last)} if last.is_dir() else {}
        finish(session.run, stage, facts, keep_last=session.config.checkpoint.keep_last)
        session.console.say_finished(stage.name, facts)
        if ended is not None:
            session.console.line(NotTheLast(**asdict(ended)).words(stage.name))


def _plan(session: Session, stage: Stage, job: Job) -> Plan:
    run, mirror = session.run, session.mirror
    return Plan(
        steps=job.steps,
        metrics=run.metrics(stage.name),
        checkpoints=run.checkpoints(stage.name),
        checkpoint_every=session.config.checkpoint.every,
        keep=session.config.checkpoint.keep,
        updates=job.updates,
        budget=job.budget,
        worth=job.worth,
        begin=job.begin,
        ledger=run.ledger(stage.name),
        rows_at=job.rows_at,
        on_saved=(lambda path: None) if mirror is None else lambda path: mirror.put_checkpoint(stage, path),
        say=session.console.line,
    )


def _validation(session: Session, name: str, job: Job) -> dict[str, Any]:
    """For a language model trained by imitation: its loss on held-out chosen responses."""
    replies = [row for row in session.dataset.validation if row.chosen]  # data of prompts alone has none
    if not job.imitates or not isinstance(job.model, Policy) or not replies:
        return {}
    rows, *_ = first_encoded(job.encoder, session.shuffled(replies), _VALIDATION_ROWS)
    policy = job.model

    def loss(groups: Sequence[Sequence[Preference]]) -> dict[str, Any]:
        batches = chosen_batches(job.encoder, groups[0], 1)
        return response_nll(policy, [batch.to(job.learner.device) for batch in batches])

    return {"validation": session.go_over(name, [rows], loss, trained_on=False)}


def _prepare(session: Session, name: str) -> Job:
    """Put models into the roles that the algorithm needs, and rows into its kind of batch."""
    if name == BASE:
        return _pretraining(session)
    config = session.config.stage[name]
    kind, learner = ALGORITHMS[config.algorithm], session.learner(config.microbatch_size)
    tokenizer = load_tokenizer(source := session.source(config.init))
    server = server_of(session, name, tokenizer, learner) if config.online else None
    judge = None if config.scored_by is None else reward_model_of(session, config.scored_by, learner)
    models = make_roles(session, name, kind, tokenizer, judge)
    for role, model in models.items():
        if role in kind.trains:
            learner.train(role, model, config.optimizer, config.rate_of(role))
        elif model is not judge:  # that is frozen where it was made
            learner.freeze(model)
    frozen = [model for role, model in models.items() if role not in kind.trains and model is not judge]
    learner.shard_frozen([*frozen, judge] if judge is not None else frozen)
    encoder = session.encoder_of(tokenizer, context_length(source), config.new_tokens, declared_ends(source))
    feed = make_feed(session, name, encoder)
    keep_rows(session, models.values(), feed.tokens)
    scorer = [_scorer(session, config, encoder, judge, feed, learner, server)] if config.online else []
    algorithm = kind(config, models, learner, *scorer)
    return Job(
        algorithm=algorithm,
        learner=learner,
        batch_at=feed.batch_at,
        steps=feed.steps,
        encoder=encoder,
        model=models[kind.trains[0]],
        imitates=config.imitates,
        rows_at=feed.names_at,
        updates=config.updates_per_step * len(kind.trains),
        budget=config.budget,
        begin=_first_head(session, name, models, learner, feed) if config.head.fitted else None,
        worth=_worth(session, name, algorithm, learner, feed) if session.config.checkpoint.best else None,
        rows=len(feed.rows),
        tokens=feed.tokens * feed.rows_per_step / len(feed.rows) if feed.tokens else None,
        rows_per_step=feed.rows_per_step,
        rejected=feed.rejected,
    )


def _first_head(
    session: Session, name: str, models: Mapping[str, Role], learner: Learner, feed: Feed
) -> Callable[[], None]:
    """What fits a reward model's head before its first step."""

    def say(text: str) -> None:
        session.console.line(f"{name}: {text}")

    return lambda: fitted_head(Roles(models).reward_model, feed, learner, say)


def _worth(session: Session, name: str, algorithm: Algorithm, learner: Learner, feed: Feed) -> Worth | None:
    """How checkpoints are compared: by the mean loss on held-out rows; where a stage samples, by what its
    steps measure anyway, on training prompts. None, with a warning, where no row can be held out for it;
    DataError where none is.
    """
    config = session.config.stage[name]
    if config.online:
        return Worth(of_step=cast(OnlineConfig, config).worth)
    if (batch := feed.held_out()) is None:
        session.console.line(
            f"warning: {name} ends with its last checkpoint, not with its best (checkpoint.best): it learns "
            "from labelled replies, and no pairs are held out to compare checkpoints on"
        )
        return None
    held_out = learner.share(batch).to(learner.device)

    def measure() -> float:
        with learner.measuring():
            return -algorithm.step(held_out)["loss"]

    return Worth(measure=measure)


def _scorer(
    session: Session,
    settings: StageSettings,
    encoder: Encoder,
    judge: RewardModel | None,
    feed: Feed,
    learner: Learner,
    server: Sampler | None,
) -> Scorer:
    """What scores the responses of a stage that samples: its judge, its reward functions, or both; and the
    server that draws them, if one does.
    """
    config = cast(OnlineConfig, settings)
    scorer = scorer_for(
        session,
        encoder,
        judge,
        config.scored_by,
        config.microbatch_size,
        feed.rows,
        config.reward_functions,
        watched=config.watched_functions,
        on_error=config.on_reward_error,
    )
    functions = scorer.functions and replace(scorer.functions, total=learner.total)
    return replace(scorer, functions=functions, sampler=server)


def _pretraining(session: Session) -> Job:
    """A GPT-2 from random weights: next-token prediction on whole documents."""
    scratch, seed, name = session.config.model.scratch, session.config.seed, str(session.config.data.name)
    assert scratch is not None
    tokenizer = make_tokenizer(name, session.dataset.train, scratch.vocab_size)
    policy = Policy(
        scratch_gpt2(
            tokenizer,
            layers=scratch.layers,
            width=scratch.width,
            heads=scratch.heads,
            positions=scratch.positions,
            seed=derive_seed(seed, BASE, "weights"),
        )
    )
    encoder = session.encoder_of(tokenizer, scratch.positions)
    texts = load_corpus(name, session.dataset.train, seed, scratch.steps * scratch.batch_size)
    enough = scratch.positions * LONGEST_TOKEN  # characters: the rest of a megabyte is not looked at
    documents = [
        [*encoder.text(text[:enough]), encoder.eos_id][: scratch.positions] for text in texts.documents
    ]
    batches = texts.batches([len(d) for d in documents], scratch.batch_size, scratch.steps, seed)

    def batch_at(step: int) -> Sequences:
        rows = [documents[i] for i in batches[step]]
        return pad_sequences([[]] * len(rows), rows, encoder.pad_id)

    learner = session.learner(scratch.microbatch_size)
    learner.train("policy", policy, scratch.optimizer, scratch.learning_rate)
    return Job(
        algorithm=SFT(SFTConfig(batch_size=scratch.batch_size), {"policy": policy}, learner),
        learner=learner,
        batch_at=batch_at,
        steps=scratch.steps,
        encoder=encoder,
        model=policy,
        imitates=True,
        tokens=sum(map(len, documents)) / len(documents) * scratch.batch_size,
        rows_at=lambda step: [f"document {i}" for i in batches[step]],
    )


def scorer_for(
    session: Session,
    encoder: Encoder,
    reward_model: RewardModel | None,
    stage: str | None,
    batch_size: int,
    rows: Sequence[Preference],
    terms: str | None = None,
    *,
    watched: str | None = None,
    on_error: OnError = "stop",
) -> Scorer:
    """A scorer by the reward model of `stage`, by the functions of the setting `terms`, or both; those of
    `watched` are called and do not count. By token ids if the reward model shares the policy's vocabulary,
    else by text: `rows` are those that prompts come from.
    """
    functions, seconds = None, session.config.reward_timeout
    if terms is not None or watched is not None:
        functions = RewardFunctions(
            functions=load_functions(terms, seconds) if terms else (),
            watched=load_functions(" + ".join(words_in(watched)), seconds) if watched else (),
            encoder=encoder,
            rows=rows,
            on_error=on_error,
        )
    reader = judge_encoder(session, stage) if stage is not None else encoder
    return Scorer(
        reward_model=reward_model,
        encoder=encoder,
        translate=None if read_alike(encoder, reader) else reader,
        batch_size=batch_size,
        functions=functions,
        rows=rows,
        say=session.console.line,
    )
