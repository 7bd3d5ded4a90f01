"""From prompts to a `Rollout`: sample, score, evaluate the responses under policy, reference, critic."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from preftune.data.batch import Prompts, Sequences
from preftune.faults import faultpoint
from preftune.models.roles import Critic, Policy, Reference, Role
from preftune.models.shards import readable, unsharded
from preftune.rollout.functions import masked
from preftune.rollout.rollout import Rollout
from preftune.rollout.sample import ended, sample
from preftune.rollout.score import Scorer


@torch.no_grad()
def collect(
    prompts: Prompts,
    *,
    policy: Policy,
    reference: Reference,
    scorer: Scorer,
    critic: Critic | None = None,
    responses_per_prompt: int = 1,
    max_new_tokens: int,
    temperature: float,
    missing_eos_score: float | None,
    batch_size: int,
    say: Callable[[str], None] | None = None,
) -> Rollout:
    """Sample and evaluate responses.

    Old log-probs come from a pass of their own through the training forward, not from the sampler's logits,
    so that the first ratio is 1 to rounding.
    """
    draw = scorer.sampler or _own_sampler
    with readable(policy) if scorer.sampler is None else unsharded(policy):
        sequences, sampler_logprobs = draw(
            policy,
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            eos_id=scorer.encoder.ends,
            responses_per_prompt=responses_per_prompt,
            say=say,
        )
    rows = [row for row in prompts.rows for _ in range(responses_per_prompt)]
    scored = scorer.shaped(sequences, missing_eos_score, rows)
    scores, valid = masked(scored.scores)
    scores = faultpoint("rewards", scores)

    def in_batches(role: Role, function: Callable[[Sequences], Tensor]) -> Tensor:
        with readable(role):
            return by_batches(function, sequences, batch_size)

    return Rollout(
        sequences=sequences,
        logprobs=in_batches(policy, lambda s: policy.logprobs(s, temperature)),
        reference_logprobs=in_batches(reference, lambda s: reference.logprobs(s, temperature)),
        values=None if critic is None else in_batches(critic, critic.values),
        scores=scores,
        group=torch.arange(len(prompts), device=sequences.ids.device).repeat_interleave(responses_per_prompt),
        ended=ended(sequences, scorer.encoder.ends),
        valid=valid,
        by_function=scored.by_function,
        sampler_logprobs=sampler_logprobs,
        cap=None if scorer.sampler is None else scorer.sampler.cap,
    )


def _own_sampler(policy: Policy, prompts: Prompts, **how: Any) -> tuple[Sequences, None]:
    """The sampler of this process. It draws from the policy itself, so a trunk may keep the states."""
    return sample(policy, prompts, keeps_states=True, **how), None


def by_batches(function: Callable[[Sequences], Tensor], sequences: Sequences, batch_size: int) -> Tensor:
    """A per-token function (B, T) evaluated `batch_size` rows at a time, each batch cut to its own width."""
    batches = []
    for start in range(0, max(len(sequences), 1), batch_size):
        values = function(sequences[slice(start, start + batch_size)])
        batches.append(torch.nn.functional.pad(values, (0, sequences.ids.shape[1] - values.shape[1])))
    return torch.cat(batches)
