"""The sampler: exact draws from softmax(logits / T), by a decoder that reads each prompt once.

No top-k and no top-p: a truncated sampler makes the importance ratio wrong. Each token is the inverse of the
cumulative distribution at a uniform number that depends on (seed of the prompt, which of its responses,
position) alone, so that a response does not change with its neighbours in the batch or the process that
samples it.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from preftune.data.batch import Prompts, Sequences, concatenate
from preftune.functional.masked import is_end
from preftune.models.adapter import merged
from preftune.models.fast.decode import decoder
from preftune.models.fast.head import after_head, for_sampling, next_logits
from preftune.models.fast.native import lacking
from preftune.models.fast.passing import PassingDecoder, passing_decoder
from preftune.models.fast.static import WARM_UP, StaticGrid, Step, recorder, refuse
from preftune.models.layers import language_head
from preftune.models.memory import give_back_memory
from preftune.models.roles import Policy, Reference, casting
from preftune.seeding import derive_seed
from preftune.stops import stopping_point

_BLOCK = 256  # tokens
# Tokens between looks at which rows have ended; where there is a device, it is waited for.
_ASK_EVERY = {"cpu": 1}
_ASK_EVERY_ELSEWHERE = 16
_ROUNDING = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # of the largest number
_WIDE = ("cpu", "cuda")  # devices with float64
seconds_without_kernel: list[float] = []  # of each call that a kernel would have made shorter


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
    keeps_states: bool = False,
) -> Sequences:
    """Draw responses up to and including an end token (`eos_id`: one, or all that the model declares), at
    most `max_new_tokens` long; temperature 0 is greedy. `keeps_states`: the policy's trunk, if it has one,
    keeps the states computed on the way.

    Returns right-padded rows, `responses_per_prompt` in succession for each prompt. Left padding ends here.
    Where memory runs out, half of the prompts are sampled at a time, with a warning: a response does not
    depend on its neighbours.
    """
    if not len(prompts):
        return Sequences(prompts.ids[:, :1], prompts.attention[:, :1], prompts.attention[:, :1])
    began = time.monotonic()
    try:
        return _sampled(
            policy, prompts, max_new_tokens, temperature, eos_id, responses_per_prompt, say, keeps_states
        )
    except torch.OutOfMemoryError:
        if len(prompts) == 1:
            raise
    finally:
        if prompts.ids.device.type == "cpu" and lacking():
            seconds_without_kernel.append(time.monotonic() - began)
    # Outside of `except`, where the error no longer keeps frames and tensors alive.
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
            keeps_states=keeps_states,
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
    say: Callable[[str], None] | None,
    keeps_states: bool,
) -> Sequences:
    """Responses to all prompts at once, k to each."""
    packed = _packed_prompts(prompts)
    device = packed.ids.device
    uniforms = _uniforms(prompts.seeds, k, max_new_tokens).to(device)
    ends = torch.as_tensor(eos_id, device=device)
    pad_id = eos_id if isinstance(eos_id, int) else eos_id[0]
    drawing = _Drawing(policy.model, packed, k, uniforms, ends, pad_id, temperature)
    with casting(policy), merged(policy.model):
        head = for_sampling(language_head(policy.model), device)
        record = recorder(policy.model, device)
        drawn = _by_recorded_steps(drawing, head, record, say) if record is not None else None
        if drawn is not None:
            return _join(packed, *drawn, pad_id)
        passing = passing_decoder(*drawing.to_decode(), say) if keeps_states else None
        sequences = _join(packed, *_by_token(drawing, head, passing), pad_id)
        if passing is not None:
            passing.hand_over(sequences.ids, sequences.attention)
    return sequences


class _Drawing(NamedTuple):
    """What is drawn: k rows for each prompt, uniforms (rows, limit)."""

    model: PreTrainedModel
    prompts: Sequences
    k: int
    uniforms: Tensor
    ends: Tensor
    pad_id: int
    temperature: float

    def nothing_yet(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (rows, limit), lengths (rows,), and whether rows have ended (rows,)."""
        rows, limit = self.uniforms.shape
        new = torch.full((rows, limit), self.pad_id, dtype=torch.long, device=self.uniforms.device)
        return new, torch.full_like(new[:, 0], limit), torch.zeros_like(new[:, 0], dtype=torch.bool)

    def to_decode(self) -> tuple[PreTrainedModel, Tensor, Tensor, int, int]:
        """What a decoder is made of."""
        prompts = self.prompts
        return self.model, prompts.ids, prompts.attention.sum(1), self.k, self.uniforms.shape[1]


def _by_token(drawing: _Drawing, head: nn.Module, passing: PassingDecoder | None) -> tuple[Tensor, Tensor]:
    """The rows' tokens and lengths. Rows that have ended drop out; with `passing` one step later, so that the
    states of their last token are computed, too.
    """
    uniforms, ends, pad_id, temperature = drawing.uniforms, drawing.ends, drawing.pad_id, drawing.temperature
    limit, device = uniforms.shape[1], uniforms.device
    new, lengths, done = drawing.nothing_yet()  # done[i]: has row computed[i] ended?
    computed = torch.arange(len(new), device=device)
    ask_every = _ASK_EVERY.get(device.type, _ASK_EVERY_ELSEWHERE)
    after, model = after_head(drawing.model), passing or decoder(*drawing.to_decode())
    logits = next_logits(head, model.start(), after).repeat_interleave(drawing.k, 0)
    for t in range(limit):
        stopping_point("rollout.token")
        token = _draw(logits, uniforms[computed, t], temperature)
        new[computed, t] = torch.where(done, pad_id, token)
        ending = is_end(token, ends) & ~done
        lengths[computed] = torch.where(ending, t + 1, lengths[computed])
        before, done = done, done | ending
        count = int(done.sum()) if (t + 1) % ask_every == 0 else 0
        if t + 1 == limit or count == len(done):
            if passing is not None:
                passing.end(token)
            break
        if count:
            rows = (~(done if passing is None else before)).nonzero().squeeze(1)
            model.keep(rows)
            computed, token, done = computed[rows], token[rows], done[rows]
        logits = next_logits(head, model.step(token), after)
    return new, lengths


class _FixedSteps:
    """As `_by_token`, by steps that repeat the same work on the same memory, so that one can be recorded: the
    state is tensors, changed in place. Rows that have ended go on; their tokens are dropped.

    now (1,): tokens drawn · token (rows,): the last of each.
    """

    def __init__(self, drawing: _Drawing, head: nn.Module) -> None:
        self.drawing, self.head, self.after = drawing, head, after_head(drawing.model)
        self.new, self.lengths, self.done = drawing.nothing_yet()
        self.token, self.now = torch.zeros_like(self.lengths), torch.zeros_like(self.lengths[:1])
        self.grid = StaticGrid(*drawing.to_decode())
        self._take(next_logits(head, self.grid.start(), self.after).repeat_interleave(drawing.k, 0))

    def step(self) -> None:
        self._take(next_logits(self.head, self.grid.step(self.token), self.after))

    def _take(self, logits: Tensor) -> None:
        uniform = self.drawing.uniforms.index_select(1, self.now).squeeze(1)
        token = _draw(logits, uniform, self.drawing.temperature)
        self.new.index_copy_(1, self.now, torch.where(self.done, self.drawing.pad_id, token).unsqueeze(1))
        self.now.add_(1)
        ending = is_end(token, self.drawing.ends) & ~self.done
        self.lengths.copy_(torch.where(ending, self.now, self.lengths))
        self.done.logical_or_(ending)
        self.token.copy_(token)

    @contextlib.contextmanager
    def undone(self) -> Iterator[None]:
        """After `with`, the state is that from before it."""
        state = (self.now, self.token, self.done, self.lengths, self.grid.now, self.grid.positions)
        before = [x.clone() for x in state]
        yield
        for x, old in zip(state, before, strict=True):
            x.copy_(old)

    def recorded(self, record: Callable[[Step], Step]) -> Step | None:
        """A step as `record` records it, once one step done both ways gave the same; None where they differ:
        by more than rounding in what the last layer has written, or in a tenth of the tokens.
        """
        step, written = record(self.step), self.grid.new[-1][0]
        with self.undone():
            step()
            token, keys, now = (x.clone() for x in (self.token, written, self.now))
        self.step()
        bound = _ROUNDING[written.dtype] * written.abs().max()
        alike = ((keys - written).abs().max() <= bound) & (now == self.now).all()
        return step if bool(alike & ((token == self.token).float().mean() > 0.9)) else None


def _by_recorded_steps(
    drawing: _Drawing, head: nn.Module, record: Callable[[Step], Step], say: Callable[[str], None] | None
) -> tuple[Tensor, Tensor] | None:
    """As `_by_token`, by a step that is recorded and repeated: the same to rounding (sums have more terms).
    None where it cannot be recorded: the reason is said, and this model is not recorded again.
    """
    limit, why = drawing.uniforms.shape[1], "it gives other tokens than the step that was recorded"
    rows = _FixedSteps(drawing, head)
    step: Step | None = rows.step
    for t in range(1, limit):
        stopping_point("rollout.token")
        if t % _ASK_EVERY_ELSEWHERE == 0 and bool(rows.done.all()):
            break
        if t != WARM_UP + 1:
            step()
            continue
        try:
            step = rows.recorded(record)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # whatever a model does that cannot be recorded
            step, why = None, str(error).split("\n")[0]
        if step is None:
            refuse(drawing.model)
            if say is not None:
                say(f"sampling goes on without a recorded step (a CUDA graph): {why}")
            return None
    return rows.new, rows.lengths


def _draw(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Inverse-CDF draw, one token a row: (B, V), (B,) -> (B,).

    In two steps, a block of tokens and a token in it, so that no sum runs over the whole vocabulary: that
    takes longer, and its rounding would be as large as the probability of a rare token.
    """
    if temperature == 0:
        return logits.argmax(-1)
    weights = logits - logits.amax(-1, keepdim=True)
    weights = (weights if temperature == 1 else weights.div_(temperature)).exp_()
    full = weights.shape[1] // _BLOCK * _BLOCK
    blocks = weights[:, :full].unflatten(1, (-1, _BLOCK)).sum(-1)
    blocks = torch.cat([blocks, weights[:, full:].sum(-1, keepdim=True)], -1)
    block, within = _invert(blocks, _widened(uniform))
    columns = block.unsqueeze(1) * _BLOCK + torch.arange(_BLOCK, device=logits.device)
    last = weights.shape[1] - 1
    inside = weights.gather(1, columns.clamp(max=last)).masked_fill(columns > last, 0)
    return (block * _BLOCK + _invert(inside, within)[0]).clamp(max=last)


def _invert(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Where the cumulative sum of weights (B, n) passes `uniform` (B,) of its total, and at which share of
    that weight: both (B,). A weight of 0 is never hit; NaN gives the last one: its log-prob tells.
    """
    cumulative = _widened(weights).cumsum(-1)
    total = cumulative[:, -1]
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total))).unsqueeze(1)
    index = torch.searchsorted(cumulative, target, right=True).clamp(max=cumulative.shape[-1] - 1)
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
        for index in range(k):
            generator = torch.Generator().manual_seed(derive_seed(seed, index))
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


def _join(prompts: Sequences, new: Tensor, lengths: Tensor, pad_id: int) -> Sequences:
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


def as_lists(sequences: Sequences, eos_id: int | Sequence[int]) -> list[tuple[list[int], list[int], bool]]:
    """Of each row the ids of the prompt, those of the response, and whether that closes with an end token."""
    sequences = sequences.to("cpu")  # once, not row by row
    closed = ended(sequences, eos_id).tolist()
    return [
        (ids[real & ~written].tolist(), ids[written].tolist(), end)
        for ids, real, written, end in zip(
            sequences.ids, sequences.attention, sequences.response, closed, strict=True
        )
    ]


def ended(sequences: Sequences, eos_id: int | Sequence[int]) -> Tensor:
    """Whether each response closes with an end token: bool (B,)."""
    last = (sequences.attention.sum(1) - 1).clamp(min=0).unsqueeze(1)
    return is_end(sequences.ids.gather(1, last).squeeze(1), eos_id) & sequences.response.any(1)
