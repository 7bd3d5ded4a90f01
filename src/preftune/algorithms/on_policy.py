"""What on-policy algorithms share: collecting a rollout, passes of updates over it, numbers about it."""

import time
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from preftune.algorithms.base import Learner, Metrics, Roles, averaged
from preftune.config import OnlineConfig
from preftune.data.batch import Prompts, Rows
from preftune.errors import UsageError
from preftune.functional.advantages import centred_groups, importance_weights
from preftune.functional.masked import zero_off
from preftune.models.roles import Critic
from preftune.rollout.collect import collect
from preftune.rollout.rollout import Rollout, of_all
from preftune.rollout.sampler import check_agreement, sampler_metrics
from preftune.rollout.score import Scorer
from preftune.seeding import derive_seed

R = TypeVar("R", bound=Rows)


def sampled(
    batch: Prompts,
    config: OnlineConfig,
    roles: Roles,
    scorer: Scorer | None,
    learner: Learner,
    critic: Critic | None = None,
) -> Rollout:
    """Responses of the policy to the prompts, with scores, and with log-probs and values under reference and
    critic: those of all processes, each of which samples for its own prompts.
    """
    if scorer is None:
        raise UsageError(f"nothing scores the responses of {config.algorithm}", "give the algorithm a scorer")
    began = time.monotonic()
    local_rollout = collect(
        batch,
        policy=roles.policy,
        reference=roles.reference,
        critic=critic,
        scorer=scorer,
        responses_per_prompt=config.items_per_row,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        missing_eos_score=config.missing_eos_score,
        batch_size=config.microbatch_size,
        say=learner.say_once,
    )
    learner.note("sampling_seconds", torch.tensor(time.monotonic() - began))
    rollout = of_all(local_rollout, learner.gather, config.items_per_row)
    if scorer.sampler is not None:
        check_agreement(rollout, scorer.sampler.max_kl)
    return rollout


class Sampling(Protocol):
    """What `sampled_step` asks of an algorithm."""

    @property
    def learner(self) -> Learner: ...
    def rollout(self, batch: Prompts) -> Rollout: ...
    def improve(self, rollout: Rollout, seed: int = 0) -> Metrics: ...


class Grouped(Protocol[R]):
    """What `group_updates` asks of an algorithm."""

    @property
    def config(self) -> OnlineConfig: ...
    @property
    def learner(self) -> Learner: ...
    def experience(self, rollout: Rollout) -> R: ...
    def update(self, batch: R) -> Metrics: ...
    def report(self, rollout: Rollout) -> Metrics: ...


def sampled_step(algorithm: Sampling, batch: Prompts) -> Metrics:
    """Sample and score, then all updates on that, in an order drawn from the seeds of the prompts."""
    rollout = algorithm.rollout(batch)
    return algorithm.improve(rollout, seed=order_seed(batch, algorithm.learner))


def group_updates(algorithm: Grouped[R], rollout: Rollout, seed: int) -> Metrics:
    """All updates of the policy on one rollout, that of all processes: their mean metrics, and the report."""
    algorithm.learner.note("rewards", rollout.scores)
    experience, learner = algorithm.experience(rollout), algorithm.learner
    updates = passes(experience, algorithm.config, seed, learner, algorithm.update)
    return {**averaged(updates), **algorithm.report(rollout)}


def corrected(advantages: Tensor, rollout: Rollout, level: str = "token") -> Tensor:
    """Advantages (B,) or (B, T) times the importance weights of what another sampler drew, a token or (level
    "sequence_sum") a response at a time; as they are where the sampler here did.
    """
    if rollout.sampler_logprobs is None or rollout.cap is None:
        return advantages
    weights = importance_weights(
        rollout.logprobs, rollout.sampler_logprobs, rollout.cap, level=level, mask=rollout.sequences.response
    )
    return weights * (advantages if advantages.dim() == 2 else advantages.unsqueeze(1))


def order_seed(batch: Prompts, learner: Learner) -> int:
    """What the order of minibatches is drawn from: the seeds of all prompts of the step."""
    seeds = learner.gather(torch.tensor(batch.seeds, dtype=torch.long, device=batch.ids.device))
    return derive_seed("minibatches", *seeds.tolist())


def passes(
    experience: R, config: OnlineConfig, seed: int, learner: Learner, update: Callable[[R], Metrics]
) -> list[Metrics]:
    """`epochs` passes of updates over `minibatches` minibatches; the metrics of each update. Minibatches are
    cut from the experience of all processes, and each is split among them.
    """
    return [
        update(learner.share(minibatch))
        for epoch in range(config.epochs)
        for minibatch in minibatches(experience, config.minibatches, derive_seed(seed, epoch))
    ]


def minibatches(experience: R, count: int, seed: int) -> Iterator[R]:
    """`count` minibatches of nearly equal size in an order drawn from `seed`; one alone is not shuffled."""
    if count == 1:
        yield experience
        return
    order = torch.randperm(len(experience), generator=torch.Generator().manual_seed(seed))
    for rows in order.tensor_split(count):
        yield experience[rows]


def response_metrics(rollout: Rollout, config: OnlineConfig) -> Metrics:
    """Lengths in tokens (EOS counted) and the share of responses that were cut: without EOS where that is on
    record, else as long as the limit. Tokens sampled, and tokens of prompt and response that the step's
    updates pass through the policy; the share of responses left out because a reward function failed.
    """
    tokens = rollout.sequences.attention.sum().item()
    lengths = rollout.sequences.response.sum(1).float()
    cut = lengths >= config.max_new_tokens if rollout.ended is None else ~rollout.ended
    return {
        "completions/mean_length": lengths.mean().item(),
        "completions/max_length": lengths.max().item(),
        "completions/min_length": lengths.min().item(),
        "completions/clipped_ratio": cut.float().mean().item(),
        "tokens/sampled": lengths.sum().item(),
        "tokens/trained": config.epochs * tokens,
        "frac_reward_masked": 1 - len(rollout.valid_scores) / len(rollout),
        **sampler_metrics(rollout),
        **function_metrics(rollout),
    }


def function_metrics(rollout: Rollout) -> Metrics:
    """Mean and standard deviation of what each reward function gave, where it gave a number: of no response
    none.
    """
    metrics = {}
    for name, numbers in rollout.by_function.items():
        values = numbers[~numbers.isnan()]
        if len(values):
            metrics[f"rewards/{name}/mean"] = values.mean().item()
            metrics[f"rewards/{name}/std"] = values.std().item() if len(values) > 1 else 0.0
    return metrics


def kl_per_sequence(rollout: Rollout) -> Tensor:
    """k1 summed over each response as it was sampled: (B,)."""
    return zero_off(rollout.logprobs - rollout.reference_logprobs, rollout.sequences.response).sum(1)


def group_metrics(rollout: Rollout, size: int) -> Metrics:
    """Scores within groups, before the updates."""
    valid = scored_rows(rollout, size)
    centred = centred_groups(rollout.scores, size, valid)
    variance = centred.square().sum(1) / (valid.view_as(centred).sum(1) - 1).clamp(min=1)
    return {
        "reward": rollout.valid_scores.mean().item(),
        "reward_std": variance.sqrt().mean().item(),
        "frac_reward_zero_std": (centred == 0).all(1).float().mean().item(),
        "kl_per_sequence": kl_per_sequence(rollout).mean().item(),
    }


def scored_rows(rollout: Rollout, size: int) -> Tensor:
    """1 for rows that may be learnt from, else 0: (B,). ValueError: rows of a group that do not follow each
    other.
    """
    if rollout.group is not None and (rollout.group.view(-1, size) != rollout.group[::size, None]).any():
        raise ValueError(f"rows of a group must follow each other, {size} at a time")
    return rollout.learnable.response.any(1).to(rollout.scores)


def clip_metrics(
    ratio: Tensor, advantages: Tensor, low: float, high: float, response: Tensor
) -> dict[str, Tensor]:
    """Where the clipped objective is flat, by side: ratio (B, T) or (B, 1), advantages (B,), (B, 1) or (B, T)
    -> (B, T).
    """
    sign = advantages.sign() if advantages.dim() == 2 else advantages.sign().unsqueeze(1)
    below = (ratio < 1 - low) & (sign < 0) & response
    above = (ratio > 1 + high) & (sign > 0) & response
    return {
        "clip_ratio/low_mean": below.to(ratio.dtype),
        "clip_ratio/high_mean": above.to(ratio.dtype),
        "clip_ratio/region_mean": (below | above).to(ratio.dtype),
        "ratio": ratio * response,
    }
