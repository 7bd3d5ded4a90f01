"""What a trained policy did, token by token: its replies to a prompt of the training data, looked up again.

Replies are sampled anew by the finished policy, as its stage samples; no training is repeated.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from preftune.algorithms import ALGORITHMS
from preftune.algorithms.base import OnPolicy
from preftune.config import OnlineConfig
from preftune.data import Encoder, Preference, Prompts, Sequences, pad_prompts
from preftune.data.pieces import pieces
from preftune.evaluation.divergence import token_divergences
from preftune.models.load import load_causal_lm
from preftune.models.roles import Policy, Reference, RewardModel, Role
from preftune.rollout.sample import ended, sample
from preftune.rollout.score import Scorer
from preftune.runs.feed import row_name
from preftune.runs.roles import critic_of
from preftune.runs.scoring import reward_model_of
from preftune.runs.session import Session
from preftune.runs.train import scorer_for
from preftune.seeding import derive_seed
from preftune.training.learner import Learner

GROUP = 4  # replies at least, over which an advantage is taken
SHOWN = 2  # of them
CRITIC = "advantages are by the critic that the stage began with: the trained one is not kept"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sampled:
    """Replies (B, T) with their scores (B,), and advantages (B, T) where the stage has any."""

    sequences: Sequences
    scores: Tensor | None = None
    advantages: Tensor | None = None


def token_rows(session: Session, stage: str, row: Preference) -> list[dict[str, Any]]:
    """The first replies of a stage's policy to the prompt of a row, as `records.run.TokenRow`."""
    config = session.config.stage[stage]
    learner = session.learner(config.microbatch_size)
    source, scored_by = session.source(stage), config.scored_by or session.judge
    if scored_by is not None and not session.is_trained(scored_by):
        scored_by = None
    encoder = session.encoder(source, config.new_tokens or session.config.evaluation.max_new_tokens)
    policy, reference = (
        Policy(load_causal_lm(source)),
        Reference(load_causal_lm(session.source(config.reference_stage))),
    )
    judge = reward_model_of(session, scored_by, learner) if scored_by else None
    for role in (policy, reference):
        learner.freeze(role)
    size, terms = config.microbatch_size, config.functions()
    scorer = scorer_for(session, encoder, judge, scored_by, size, [row], terms)
    prompts = learner.place(_prompts(session, stage, encoder, row))
    if config.online:
        sampled = _as_trained(session, stage, policy, reference, judge, scorer, prompts, learner)
    else:
        sampled = _as_measured(session, policy, scorer, prompts)
    sampling = cast(OnlineConfig, config) if config.online else session.config.evaluation
    log_ratio, kl = token_divergences(policy, reference, sampled.sequences, sampling.temperature)
    by_token: dict[str, Tensor | None] = {"log_ratio": log_ratio, "kl": kl, "advantage": sampled.advantages}
    by_token["score"] = _score_so_far(judge, scorer, sampled.sequences)
    common = {"stage": stage, "key": session.stage(stage).key, "reference": config.reference_stage}
    common |= {"row": row_name(row), "prompt": encoder.readable_prompt(row.prompt)}
    return [common | reply for reply in _described(sampled, by_token, encoder)]


def _prompts(session: Session, stage: str, encoder: Encoder, row: Preference) -> Prompts:
    """The same prompt as often as it takes for GROUP replies, with a seed each."""
    times = (
        -(-GROUP // session.config.stage[stage].items_per_row)
        if session.config.stage[stage].online
        else GROUP
    )
    seeds = [derive_seed(session.config.seed, stage, "inspect", row.row, i) for i in range(times)]
    return pad_prompts([encoder.prompt(row.prompt)] * times, seeds, encoder.pad_id, [0] * times)


def _as_trained(
    session: Session,
    stage: str,
    policy: Policy,
    reference: Reference,
    judge: RewardModel | None,
    scorer: Scorer,
    prompts: Prompts,
    learner: Learner,
) -> _Sampled:
    """A rollout and its advantages by the stage's own algorithm."""
    config = session.config.stage[stage]
    kind = ALGORITHMS[config.algorithm]
    roles: dict[str, Role] = {"policy": policy, "reference": reference}
    if "critic" in kind.needs:
        roles["critic"] = critic_of(session, config, judge)
        learner.freeze(roles["critic"])
    algorithm = kind(config, roles, learner, *[scorer])
    if not isinstance(algorithm, OnPolicy):
        return _as_measured(session, policy, scorer, prompts)
    with torch.no_grad():
        rollout = algorithm.rollout(prompts)
        advantages = algorithm.experience(rollout).advantages
    response = rollout.sequences.response
    spread = advantages if advantages.dim() == 2 else advantages.unsqueeze(1).expand(response.shape)
    return _Sampled(sequences=rollout.sequences, scores=rollout.scores, advantages=spread)


def _as_measured(session: Session, policy: Policy, scorer: Scorer, prompts: Prompts) -> _Sampled:
    settings = session.config.evaluation
    sequences = sample(
        policy,
        prompts,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        eos_id=scorer.encoder.ends,
        say=session.console.line,
    )
    silent = scorer.reward_model is None and scorer.functions is None
    return _Sampled(sequences=sequences, scores=None if silent else scorer.scores(sequences, prompts.rows))


@torch.no_grad()
def _score_so_far(judge: RewardModel | None, scorer: Scorer, sequences: Sequences) -> Tensor | None:
    """The normalised score that a reply would have if it ended at each of its tokens: (B, T); None where the
    judge reads other tokens.
    """
    if judge is None or scorer.translate is not None:
        return None
    return judge.normalised(judge.per_position(sequences, sequences.response))


def _described(
    sampled: _Sampled, by_token: dict[str, Tensor | None], encoder: Encoder
) -> Iterator[dict[str, Any]]:
    sequences, closed = sampled.sequences.to("cpu"), ended(sampled.sequences, encoder.ends).tolist()
    for i in range(min(SHOWN, len(sequences))):
        at = sequences.response[i]
        real = sequences.ids[i][sequences.attention[i]].tolist()
        numbers = {
            name: [] if values is None else values[i].cpu()[at].tolist() for name, values in by_token.items()
        }
        texts = pieces(encoder, real)[len(real) - int(at.sum()) :]
        score = None if sampled.scores is None else float(sampled.scores[i])
        yield {"texts": texts, **numbers, "reply_score": score, "ended": closed[i]}


def note_of(session: Session, stage: str) -> str:
    """What to know of a stage's advantages; "" where there is nothing."""
    config = session.config.stage[stage]
    return f"{stage}: {CRITIC}" if "critic" in ALGORITHMS[config.algorithm].needs else ""


def trained_policies(session: Session, stages: Sequence[str]) -> list[str]:
    """Stages whose policy is there."""
    return [name for name in stages if session.config.stage[name].trains_policy and session.is_trained(name)]
