"""The sampler: exact draws from softmax(logits / T), by a decoder that reads each prompt once.

No top-k and no top-p: a truncated sampler makes the importance ratio wrong. Each token is the inverse of the
cumulative distribution at a uniform number that depends on (seed of the prompt, which of its responses,
position) alone, so that a response does not change with its neighbours in the batch or the process that
samples it.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from preftune.data.batch import Prompts, Sequences, concatenate
from preftune.functional.masked import is_end
from preftune.models.adapter import merged
from preftune.models.fast.decode import decoder
from preftune.models.fast.head import after_head, for_sampling, next_logits
from preftune.models.fast.native import lacking
from preftune.models.memory import give_back_memory
from preftune.models.parts import language_head
from preftune.models.roles import Policy, Reference, casting
from preftune.seeding import derive_seed
from preftune.stops import stopping_point

_BLOCK = 256  # tokens
# Tokens between looks at which rows have ended; where there is a device, it is waited for.
_ASK_EVERY = {"cpu": 1}
_ASK_EVERY_ELSEWHERE = 16
_WIDE = ("cpu", "cuda")  # devices with float64
without_kernel: list[float] = []  # seconds of each call of this process that a kernel would have made shorter


@torch.no_grad()
def sample(
    policy: Policy | Reference,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    temperature: float,
    eos_id: int | Sequence[int],
    responses_per_prompt: int = 1,
    say: Callable[[str], None] | None = None,
) -> Sequences:
    """Draw responses up to and including an end token (`eos_id`: one, or all that the model declares), at
    most `max_new_tokens` long; temperature 0 is greedy.

    Returns right-padded rows, `responses_per_prompt` in succession for each prompt. Left padding ends here.
    Where memory runs out, half of the prompts are taken at a time, and `say` is told: a response does not
    know its neighbours.
    """
    if not len(prompts):
        return Sequences(prompts.ids[:, :1], prompts.attention[:, :1], prompts.attention[:, :1])
    began = time.monotonic()
    try:
        return _sampled(policy, prompts, max_new_tokens, temperature, eos_id, responses_per_prompt)
    except torch.OutOfMemoryError:
        if len(prompts) == 1:
            raise
    finally:
        if prompts.ids.device.type == "cpu" and lacking():
            without_kernel.append(time.monotonic() - began)
    # Out here, where the error no longer holds on to the frames and tensors that it passed.
    give_back_memory()
    half = len(prompts) // 2
    if say is not None:
        say(f"warning: out of memory sampling for {len(prompts)} prompts at a time; going on with {half}")
    halves = [
        sample(
            policy,
            prompts[rows],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            eos_id=eos_id,
            responses_per_prompt=responses_per_prompt,
            say=say,
        )
        for rows in (slice(0, half), slice(half, None))
    ]
    return concatenate(*halves)


def _sampled(
    policy: Policy | Reference,
    prompts: Prompts,
    max_new_tokens: int,
    temperature: float,
    eos_id: int | Sequence[int],
    k: int,
) -> Sequences:
    """Responses to all prompts at once, k to each."""
    packed = _packed_prompts(prompts)
    rows = len(prompts) * k
    uniforms = _uniforms(prompts.seeds, k, max_new_tokens).to(packed.ids.device)
    ends = torch.as_tensor(eos_id, device=packed.ids.device)
    pad_id = eos_id if isinstance(eos_id, int) else eos_id[0]
    new = torch.full((rows, max_new_tokens), pad_id, dtype=torch.long, device=packed.ids.device)
    lengths = torch.full((rows,), max_new_tokens, device=packed.ids.device)
    alive = torch.arange(rows, device=packed.ids.device)  # rows that are still computed
    done = torch.zeros(rows, dtype=torch.bool, device=packed.ids.device)  # of these, those that have ended
    ask_every = _ASK_EVERY.get(packed.ids.device.type, _ASK_EVERY_ELSEWHERE)
    after = after_head(policy.model)
    with casting(policy), merged(policy.model):
        head = for_sampling(language_head(policy.model), packed.ids.device)
        model = decoder(policy.model, packed.ids, packed.attention.sum(1), k, max_new_tokens)
        logits = next_logits(head, model.start(), after).repeat_interleave(k, 0)
        for t in range(max_new_tokens):
            stopping_point("rollout.token")
            token = _draw(logits, uniforms[alive, t], temperature)
            new[alive, t] = torch.where(done, pad_id, token)
            ending = is_end(token, ends) & ~done
            lengths[alive] = torch.where(ending, t + 1, lengths[alive])
            done = done | ending
            if t + 1 == max_new_tokens:
                break
            if (t + 1) % ask_every == 0 and (count := int(done.sum())):
                if count == len(done):
                    break
                kept = (~done).nonzero().squeeze(1)
                model.keep(kept)
                alive, token, done = alive[kept], token[kept], done[kept]
            logits = next_logits(head, model.step(token), after)
    return _joined(packed, new, lengths, pad_id)


def _draw(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Inverse-CDF draw, one token a row: (B, V), (B,) -> (B,).

    In two steps, a block of tokens and a token in it, so that no sum runs over the whole vocabulary: that
    takes longer, and its rounding would be as large as the probability of a rare token.
    """
    if temperature == 0:
        return logits.argmax(-1)
    weights = logits - logits.amax(-1, keepdim=True)
    weights = (weights if temperature == 1 else weights.div_(temperature)).exp_()
    whole = weights.shape[1] // _BLOCK * _BLOCK
    blocks = weights[:, :whole].unflatten(1, (-1, _BLOCK)).sum(-1)
    blocks = torch.cat([blocks, weights[:, whole:].sum(-1, keepdim=True)], -1)
    block, within = _invert(blocks, _widened(uniform))
    columns = block.unsqueeze(1) * _BLOCK + torch.arange(_BLOCK, device=logits.device)
    last = weights.shape[1] - 1
    inside = weights.gather(1, columns.clamp(max=last)).masked_fill(columns > last, 0)
    return block * _BLOCK + _invert(inside, within)[0]


def _invert(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Where the cumulative sum of weights (B, n) passes `uniform` (B,) of its total, and at which share of
    that weight: both (B,). A weight of 0 is never hit.
    """
    cumulative = _widened(weights).cumsum(-1)
    total = cumulative[:, -1]
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total))).unsqueeze(1)
    index = torch.searchsorted(cumulative, target, right=True)
    before = torch.where(index > 0, cumulative.gather(1, (index - 1).clamp(min=0)), 0)
    share = (target - before) / (cumulative.gather(1, index) - before)
    return index.squeeze(1), share.squeeze(1)


def _widened(x: Tensor) -> Tensor:
    """In float64 where the device has it; sums over a block and over blocks are fair without it, too."""
    return x.double() if x.device.type in _WIDE else x


def _uniforms(seeds: tuple[int, ...], k: int, count: int) -> Tensor:
    """Uniform numbers in [0, 1): (len(seeds) · k, count)."""
    rows = []
    for seed in seeds:
        for which in range(k):
            generator = torch.Generator().manual_seed(derive_seed(seed, which))
            rows.append(torch.rand(count, generator=generator))
    return torch.stack(rows)


def _packed_prompts(prompts: Prompts) -> Sequences:
    """Left-padded prompts -> right-padded rows without a response."""
    lengths = prompts.attention.sum(1, keepdim=True)
    width = int(lengths.max())
    column = torch.arange(width, device=prompts.ids.device).unsqueeze(0)
    source = (column + prompts.ids.shape[1] - lengths).clamp(max=prompts.ids.shape[1] - 1)
    real = column < lengths
    return Sequences(prompts.ids.gather(1, source), real, torch.zeros_like(real))


def _joined(prompts: Sequences, new: Tensor, lengths: Tensor, pad_id: int) -> Sequences:
    """Prompts (G, P) and k responses to each (G · k, R) -> right-padded rows without a gap."""
    k = len(new) // len(prompts)
    starts = prompts.attention.sum(1).repeat_interleave(k).unsqueeze(1)
    ends = starts + lengths.unsqueeze(1)
    column = torch.arange(int(ends.max()), device=new.device).unsqueeze(0)
    joined = torch.cat([prompts.ids.repeat_interleave(k, 0), new], 1)
    source = torch.where(column < starts, column, column - starts + prompts.ids.shape[1])
    real = column < ends
    packed = joined.gather(1, source.clamp(max=joined.shape[1] - 1)).masked_fill(~real, pad_id)
    return Sequences(packed, real, real & (column >= starts))


def ended(sequences: Sequences, eos_id: int | Sequence[int]) -> Tensor:
    """Whether each response closes with an end token: bool (B,)."""
    last = (sequences.attention.sum(1) - 1).clamp(min=0).unsqueeze(1)
    return is_end(sequences.ids.gather(1, last).squeeze(1), eos_id) & sequences.response.any(1)
