"""A sampler outside of this process: what it returns, and how far it is from the policy.

It has other kernels, another precision, and weights that may be some steps old. So the learner computes log π
of its tokens again; the KL between the two is measured in every step, and if it exceeds `max_kl`, the stage
ends before anything is learnt from what was sampled.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from preftune.data.batch import Prompts, Sequences
from preftune.errors import SamplerDisagrees
from preftune.functional import kl_estimate
from preftune.functional.advantages import importance_weights
from preftune.models.roles import Policy
from preftune.rollout.rollout import Rollout


class Sampler(Protocol):
    """Draws responses as `rollout.sample.sample` does, all weights of `policy` being there when it is called.

    `max_kl`: nats per token between it and the policy. `cap`: where importance weights are cut off; None
    corrects nothing.
    """

    @property
    def max_kl(self) -> float: ...

    @property
    def cap(self) -> float | None: ...

    def __call__(
        self,
        policy: Policy,
        prompts: Prompts,
        *,
        max_new_tokens: int,
        temperature: float,
        eos_id: Sequence[int],
        responses_per_prompt: int,
        say: Callable[[str], None] | None,
    ) -> tuple[Sequences, Tensor]:
        """The responses, and log-probabilities of their tokens by its own account: (B, T), 0 elsewhere."""
        ...


def sampler_metrics(rollout: Rollout) -> dict[str, float]:
    """KL(sampler, policy) by k1 and k3, and the truncated importance weights, over the tokens of all
    responses; {} where the sampler here drew them.
    """
    if rollout.sampler_logprobs is None:
        return {}
    response = rollout.sequences.response
    sampler_logprobs, policy_logprobs = rollout.sampler_logprobs[response], rollout.logprobs[response]
    k1, k3 = (kl_estimate(sampler_logprobs, policy_logprobs, kind) for kind in ("k1", "k3"))
    weights = importance_weights(policy_logprobs, sampler_logprobs, rollout.cap or float("inf"))
    numbers = {
        "sampling/kl": k1.mean(),
        "sampling/kl_k3": k3.mean(),
        "sampling/kl_k3_max": k3.max(),
        "sampling/sampling_logp_difference/mean": k1.abs().mean(),
        "sampling/sampling_logp_difference/max": k1.abs().max(),
        "sampling/importance_sampling_ratio/min": weights.min(),
        "sampling/importance_sampling_ratio/mean": weights.mean(),
        "sampling/importance_sampling_ratio/max": weights.max(),
    }
    return {name: number.item() for name, number in numbers.items()}


def check_agreement(rollout: Rollout, max_kl: float) -> None:
    """SamplerDisagrees where the policy and the sampler are further apart than `max_kl` (k3)."""
    kl = sampler_metrics(rollout)["sampling/kl_k3"]
    if not kl <= max_kl:
        raise SamplerDisagrees(
            f"the server samples from another policy than is trained: KL {kl:.3g} nats a token, where "
            f"sampler.max_kl = {max_kl:g}; nothing was learnt from it",
            "it has stale weights, another model, a lower precision, or other log-probs than those of "
            "stage.NAME.temperature (--logprobs-mode processed_logprobs); see docs/vllm.md, then run the "
            "same command again",
        )
