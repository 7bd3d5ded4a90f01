"""The sampler: exact draws from softmax(logits / T), with a key-value cache.

No top-k and no top-p: a truncated sampler makes the importance ratio wrong. Each token is the inverse of the
cumulative distribution at a uniform number that depends on (seed of the prompt, which of its responses,
position) alone, so that a response does not change with its neighbours in the batch or the process that
samples it.
"""

import torch
from torch import Tensor
from transformers import DynamicCache

from preftune.data.batch import Prompts, Sequences
from preftune.models.roles import Policy, Reference, casting
from preftune.seeding import derive_seed
from preftune.stops import stopping_point


@torch.no_grad()
def sample(
    policy: Policy | Reference,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    temperature: float,
    eos_id: int,
    responses_per_prompt: int = 1,
) -> Sequences:
    """Draw responses up to and including EOS, at most `max_new_tokens` long; temperature 0 is greedy.

    Returns right-padded rows, `responses_per_prompt` in succession for each prompt. Left padding ends here.
    """
    k = responses_per_prompt
    ids, attention = prompts.ids.repeat_interleave(k, 0), prompts.attention.repeat_interleave(k, 0)
    uniforms = _uniforms(prompts.seeds, k, max_new_tokens).to(ids.device)
    new = torch.full((len(ids), max_new_tokens), eos_id, dtype=torch.long, device=ids.device)
    lengths = torch.full((len(ids),), max_new_tokens, device=ids.device)
    alive = torch.arange(len(ids), device=ids.device)  # rows still being written
    cache = DynamicCache(config=policy.model.config)
    step_ids, mask = ids, attention.long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for t in range(max_new_tokens):
        stopping_point("rollout.token")
        with casting(policy):
            logits = _next_logits(policy, step_ids, mask, positions, cache)
        token = _draw(logits, uniforms[alive, t], temperature)
        new[alive, t] = token
        going = token != eos_id
        lengths[alive[~going]] = t + 1
        if not going.any():
            break
        positions = positions[:, -1:] + 1
        if not going.all():
            kept = going.nonzero().squeeze(1)
            cache.batch_select_indices(kept)
            alive, mask, positions, token = alive[kept], mask[kept], positions[kept], token[kept]
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        step_ids = token.unsqueeze(1)
    return _repack(ids, attention, new, lengths, eos_id)


def _next_logits(
    policy: Policy | Reference, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache
) -> Tensor:
    """Logits after the last column: (B, V), float32. The head runs on that column only."""
    model = policy.model
    hidden = model.base_model(
        ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
    ).last_hidden_state
    return model.get_output_embeddings()(hidden[:, -1]).float()


def _draw(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Inverse-CDF draw, one token a row: (B, V), (B,) -> (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = torch.softmax(logits / temperature, -1).cumsum(-1)
    total = cumulative[:, -1:]  # not exactly 1 in float32
    below = torch.nextafter(total, torch.zeros_like(total))  # a token of probability 0 is never drawn
    target = torch.minimum(uniform.unsqueeze(1) * total, below)
    return torch.searchsorted(cumulative, target, right=True).squeeze(1)


def _uniforms(seeds: tuple[int, ...], k: int, count: int) -> Tensor:
    """Uniform numbers in [0, 1): (len(seeds) · k, count)."""
    rows = []
    for seed in seeds:
        for which in range(k):
            generator = torch.Generator().manual_seed(derive_seed(seed, which))
            rows.append(torch.rand(count, generator=generator))
    return torch.stack(rows)


def _repack(ids: Tensor, attention: Tensor, new: Tensor, lengths: Tensor, pad_id: int) -> Sequences:
    """Left-padded prompts + responses (B, R) -> right-padded rows without a gap."""
    prompt_lengths = attention.sum(1)
    totals = prompt_lengths + lengths
    width = int(totals.max())
    column = torch.arange(width, device=ids.device).unsqueeze(0)
    joined = torch.cat([ids, new], 1)
    offset = (ids.shape[1] - prompt_lengths).unsqueeze(1)
    source = (column + offset).clamp(max=joined.shape[1] - 1)
    real = column < totals.unsqueeze(1)
    packed = torch.where(real, joined.gather(1, source), torch.full_like(source, pad_id))
    return Sequences(packed, real, real & (column >= prompt_lengths.unsqueeze(1)))


def ended(sequences: Sequences, eos_id: int) -> Tensor:
    """Whether each response closes with EOS: bool (B,)."""
    last = (sequences.attention.sum(1) - 1).clamp(min=0).unsqueeze(1)
    return (sequences.ids.gather(1, last).squeeze(1) == eos_id) & sequences.response.any(1)
