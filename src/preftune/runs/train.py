"""Training one stage: models into roles, rows into batches, the loop, and the finished model on disk."""

import math
import time
from collections.abc import Sequence
from typing import Any

from preftune.algorithms import ALGORITHMS, GRPO, PPO, SFT
from preftune.config import DPOConfig, GRPOConfig, PPOConfig, RewardConfig, SFTConfig
from preftune.data import (
    Encoder,
    Pairs,
    Preference,
    Prompts,
    Sequences,
    distinct_prompts,
    first_encoded,
    first_usable,
    pad_pairs,
    pad_prompts,
    pad_sequences,
    rows_at,
)
from preftune.data.corpus import LONGEST_TOKEN
from preftune.evaluation.policy import response_nll
from preftune.models.load import context_length, load_causal_lm, load_tokenizer, scratch_gpt2
from preftune.models.roles import Critic, ImplicitReward, Policy, Reference, RewardModel, Role
from preftune.models.scalar import init_scalar_model, load_scalar_model, score_head
from preftune.rollout.functions import OnError, RewardFunctions, load_functions
from preftune.rollout.score import Scorer, same_vocabulary
from preftune.rundir import BASE
from preftune.runs.job import Job
from preftune.runs.provenance import peak_memory_mb, reset_peak_memory
from preftune.runs.save import finished_model
from preftune.runs.scoring import reward_model_of
from preftune.runs.session import Session
from preftune.runs.sources import load_corpus, make_tokenizer
from preftune.runs.stages import Stage, begin, finish, is_finished
from preftune.seeding import derive_seed
from preftune.training.checkpoint import check_space, checkpoint_at, digests
from preftune.training.loop import Plan, train

_VALIDATION_ROWS = 256


def run_stage(session: Session, stage: Stage) -> bool:
    """Train a stage unless it is finished; returns whether anything was done."""
    if is_finished(session.run, stage):
        session.console.skipped(stage.name)
        return False
    reset_peak_memory()
    began = time.monotonic()
    job = _prepare(session, stage.name)
    check_space(session.run.checkpoints(stage.name), job.learner)
    if job.learner.is_main:
        begin(session.run, stage)
    plan = _plan(session, stage, job)
    with session.console.progress(stage.name, stage.algorithm, job.steps) as on_step:
        train(job.algorithm, job.learner, lambda step: job.learner.place(job.batch_at(step)), plan, on_step)
    if job.learner.is_main:
        facts = finished_model(session, stage, job)
        facts |= {"steps": job.steps, "rejected": job.rejected, **_validation(session, job)}
        facts |= {"seconds": time.monotonic() - began, "peak_memory_mb": peak_memory_mb()}
        last = checkpoint_at(plan.checkpoints, job.steps)
        facts |= {"state_sha256": digests(last)} if last.is_dir() else {}
        finish(session.run, stage, facts)
        if session.mirror is not None:
            session.mirror.put_stage(stage)
        session.console.finished(stage.name, facts)
    job.learner.wait()
    return True


def _plan(session: Session, stage: Stage, job: Job) -> Plan:
    run, mirror = session.run, session.mirror
    return Plan(
        steps=job.steps,
        metrics=run.metrics(stage.name),
        checkpoints=run.checkpoints(stage.name),
        checkpoint_every=session.config.checkpoint.every,
        keep=session.config.checkpoint.keep,
        updates=job.updates,
        ledger=run.ledger(stage.name),
        rows_at=job.rows_at,
        on_saved=(lambda path: None) if mirror is None else lambda path: mirror.put_checkpoint(stage, path),
        say=session.console.line,
    )


def _validation(session: Session, job: Job) -> dict[str, Any]:
    """For a language model trained by imitation: its loss on held-out chosen responses."""
    if not isinstance(job.algorithm, SFT) or not isinstance(job.model, Policy):
        return {}
    if not session.dataset.validation:
        return {}
    rows, _ = first_usable(job.encoder, session.shuffled(session.dataset.validation), _VALIDATION_ROWS)
    batches = [job.encoder.sequences([(row.prompt, row.chosen)]).to(job.learner.device) for row in rows]
    return {"validation": response_nll(job.model, batches)}


def _prepare(session: Session, name: str) -> Job:
    if name == BASE:
        return _pretraining(session)
    config = session.config.stage[name]
    if isinstance(config, PPOConfig | GRPOConfig):
        return _online(session, name, config)
    return _offline(session, name)


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
        part = [documents[i] for i in batches[step]]
        return pad_sequences([[]] * len(part), part, encoder.pad_id)

    learner = session.learner(scratch.microbatch_size)
    learner.train("policy", policy, scratch.optimizer, scratch.learning_rate)
    return Job(
        algorithm=SFT(SFTConfig(batch_size=scratch.batch_size), {"policy": policy}, learner),
        learner=learner,
        batch_at=batch_at,
        steps=scratch.steps,
        encoder=encoder,
        model=policy,
        rows_at=lambda step: [f"document {i}" for i in batches[step]],
    )


def _offline(session: Session, name: str) -> Job:
    """SFT, reward model, DPO: batches of encoded training rows."""
    config = session.config.stage[name]
    assert not isinstance(config, PPOConfig | GRPOConfig)
    source = session.source(config.init)
    tokenizer = load_tokenizer(source)
    models: dict[str, Role] = {}
    if isinstance(config, RewardConfig):
        head_seed = derive_seed(session.config.seed, name, "head")
        models["reward_model"] = RewardModel(init_scalar_model(source, tokenizer, head_seed))
    else:
        models["policy"] = Policy(load_causal_lm(source))
    if isinstance(config, DPOConfig):
        models["reference"] = Reference(load_causal_lm(source))
    kind = ALGORITHMS[config.algorithm]
    (trained,) = kind.trains
    learner = session.learner(config.microbatch_size)
    learner.train(trained, models[trained], config.optimizer, config.learning_rate)
    for role in set(models) - {trained}:
        learner.freeze(models[role])
    encoder = session.encoder_of(tokenizer, context_length(source))
    part = config.part if isinstance(config, RewardConfig) else "all"
    rows, encoded, rejected = first_encoded(encoder, session.training_rows(part), config.rows)

    def numbers_at(step: int) -> list[int]:
        return rows_at(step, config.batch_size, len(rows), session.config.seed, name)

    def batch_at(step: int) -> Sequences | Pairs:
        pairs = [encoded[i] for i in numbers_at(step)]
        if isinstance(config, SFTConfig):
            return pad_sequences([p.prompt for p in pairs], [p.chosen for p in pairs], encoder.pad_id)
        return pad_pairs(pairs, encoder.pad_id)

    return Job(
        algorithm=kind(config, models, learner),
        learner=learner,
        batch_at=batch_at,
        steps=math.ceil(config.epochs * len(rows) / config.batch_size),
        encoder=encoder,
        model=models[trained],
        rows_at=lambda step: [_row_name(rows[i]) for i in numbers_at(step)],
        rejected=rejected,
    )


def _online(session: Session, name: str, config: PPOConfig | GRPOConfig) -> Job:
    """PPO and GRPO: batches of distinct training prompts."""
    source = session.source(config.init)
    learner = session.learner(config.microbatch_size)
    policy, reference = Policy(load_causal_lm(source)), Reference(load_causal_lm(source))
    models: dict[str, Role] = {"policy": policy, "reference": reference}
    reward_model = None
    if config.reward_model is not None:
        reward_model = reward_model_of(session, config.reward_model, learner)
        models["reward_model"] = reward_model
    if isinstance(config, PPOConfig):
        models["critic"] = critic_of(session, config, reward_model)
        learner.train("critic", models["critic"], config.optimizer, config.critic_learning_rate)
    learner.train("policy", policy, config.optimizer, config.learning_rate)
    learner.freeze(reference)
    encoder = session.encoder(source, config.max_new_tokens)
    rows, prompts = distinct_prompts(encoder, session.dataset.train)
    functions = reward_functions(
        config.reward_functions, encoder, rows, session.config.reward_timeout, config.on_reward_error
    )
    per_step = config.batch_size // (config.group_size if isinstance(config, GRPOConfig) else 1)

    def numbers_at(step: int) -> list[int]:
        return rows_at(step, per_step, len(prompts), session.config.seed, name)

    def batch_at(step: int) -> Prompts:
        seeds = [derive_seed(session.config.seed, name, step, "sample", i) for i in range(per_step)]
        numbers = numbers_at(step)
        return pad_prompts([prompts[i] for i in numbers], seeds, encoder.pad_id, numbers)

    scorer = scorer_for(
        session, encoder, reward_model, config.reward_model, config.microbatch_size, functions
    )
    return Job(
        algorithm=PPO(config, models, learner, scorer)
        if isinstance(config, PPOConfig)
        else GRPO(config, models, learner, scorer),
        learner=learner,
        batch_at=batch_at,
        steps=config.steps,
        encoder=encoder,
        model=policy,
        rows_at=lambda step: [_row_name(rows[i]) for i in numbers_at(step)],
        updates=config.epochs * config.minibatches * len(ALGORITHMS[config.algorithm].trains),
    )


def _row_name(row: Preference) -> str:
    """Where a pair came from, for people: "harmless-base:17"."""
    return f"{row.source}:{row.row}" if row.source else str(row.row)


def critic_of(session: Session, config: PPOConfig, reward_model: RewardModel | None) -> Critic:
    """Backbone and head of the reward model (Stiennon et al., arXiv:2009.01325). Without a scalar head: the
    policy's backbone and a head of zeros, so that the first values are 0 and say nothing wrong.
    """
    scalar = None if isinstance(reward_model, ImplicitReward) else reward_model
    if scalar is not None and config.reward_model is not None:
        model = load_scalar_model(session.source(config.reward_model))
        return Critic(model, scalar.mean, scalar.std)
    source = session.source(config.init)
    critic = Critic(init_scalar_model(source, load_tokenizer(source), seed=0))
    score_head(critic.model).weight.data.zero_()
    return critic


def reward_functions(
    terms: str | None,
    encoder: Encoder,
    rows: Sequence[Preference],
    seconds: float,
    on_error: OnError = "stop",
) -> RewardFunctions | None:
    """The functions of a setting, with the data rows of the prompts that they will be asked about, and the
    seconds that one call may take.
    """
    if terms is None:
        return None
    functions = load_functions(terms, seconds)
    return RewardFunctions(functions=functions, encoder=encoder, rows=rows, on_error=on_error)


def scorer_for(
    session: Session,
    encoder: Encoder,
    reward_model: RewardModel | None,
    stage: str | None,
    batch_size: int,
    functions: RewardFunctions | None = None,
) -> Scorer:
    """A scorer by token ids if the reward model shares the policy's vocabulary, else by text."""
    theirs = session.encoder(session.source(stage)) if stage is not None else encoder
    return Scorer(
        reward_model=reward_model,
        encoder=encoder,
        translate=None if same_vocabulary(encoder, theirs) else theirs,
        batch_size=batch_size,
        functions=functions,
    )
