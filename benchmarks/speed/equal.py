"""That both sides do the same work where their random numbers differ: checks on fixed or recorded tokens.

* `drift`: log-probs at which the sampler drew, against a plain Hugging Face forward over what it wrote
* `grpo_loss`: the loss on fixed completions to prompts of one length (TRL gives ragged ones no position ids),
  of a policy that is neither the reference nor the one that sampled
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from preftune.algorithms.grpo import GRPO, Experience
from preftune.data import Prompts, pad_sequences
from preftune.functional import weighted_sum
from preftune.models.roles import Policy
from preftune.rollout import sample as sampler
from work import EOS, NEW_TOKENS, SHIFT, fixed


@torch.no_grad()
def drift(policy: Policy, prompts: Prompts, k: int, plain_model: str) -> dict[str, float]:
    """Largest differences of log-probs, on the tokens drawn and over the vocabulary."""
    seen: list[Tensor] = []
    usual = sampler._draw

    def recording(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
        seen.append(torch.log_softmax(logits, -1))
        return usual(logits, uniform, temperature)

    sampler._draw = recording
    try:
        out = sampler.sample(
            policy, prompts, max_new_tokens=NEW_TOKENS, temperature=1.0, eos_id=-1, responses_per_prompt=k
        )
    finally:
        sampler._draw = usual
    model = AutoModelForCausalLM.from_pretrained(plain_model, dtype=torch.float32).eval()
    drawn = everywhere = 0.0
    for i in range(len(out)):
        ids, start = out.ids[i, out.attention[i]], int((out.attention[i] & ~out.response[i]).sum())
        ours = torch.stack([step[i] for step in seen])
        theirs = torch.log_softmax(model(ids[None]).logits[0, start - 1 : -1], -1)
        difference = (ours - theirs).abs()
        everywhere = max(everywhere, difference.max().item())
        drawn = max(drawn, difference.gather(1, ids[start:, None]).max().item())
    return {"drift_drawn": drawn, "drift_vocabulary": everywhere}


@torch.no_grad()
def grpo_loss(algorithm: GRPO, work: dict[str, Any]) -> dict[str, float]:
    """The loss of fixed pairs of responses with advantages of ± ½; `theirs.py` computes the same."""
    prompts, responses = fixed(work)
    sequences = pad_sequences(prompts, responses, EOS)
    before = algorithm.roles.reference.logprobs(sequences)
    for parameter in algorithm.policy.model.parameters():
        parameter.mul_(SHIFT)
    advantages = torch.tensor([0.5, -0.5]).repeat(len(prompts) // 2)
    experience = Experience(
        sequences=sequences, logprobs=before, reference_logprobs=before, advantages=advantages
    )
    terms = algorithm.loss(experience).terms
    return {"loss": float(weighted_sum(terms, algorithm.weights(experience)))}
