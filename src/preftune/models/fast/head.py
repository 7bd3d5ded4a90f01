"""From hidden states to log-probabilities of chosen tokens, in tiles of the logits.

The logits of a batch are its largest tensor by far. Here they are computed one tile at a time, small enough
to stay in the cache. The first tiles are saved for the backward pass, up to a fixed size in all; the others
are computed again.
"""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from preftune.functional.logprobs import categorical_entropy, gather_logprobs
from preftune.models.fast.native import layer_product

_ROWS = 1024  # positions in a tile, at most
_ENTRIES = {"cpu": 1 << 20}  # logits in a tile: 4 MB
_ENTRIES_ELSEWHERE = 1 << 26
_SAVED = 1 << 25  # logits saved for the backward pass, at most: 128 MB
_SHARE = 16  # on a GPU more: one in 16 bytes of its memory
_FEW = 64  # rows


class After(NamedTuple):
    """What a family does to the logits z after its head: scale · z, then cap · tanh(z / cap)."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def back(self, slope: Tensor, after: Tensor) -> Tensor:
        """The gradient with respect to the head's own logits. `slope` is that with respect to the logits
        `after` this.
        """
        slope = slope if self.cap is None else slope * (1 - (after / self.cap).square_())
        return slope if self.scale == 1 else slope * self.scale


NOTHING = After()


def after_head(model: Any) -> After:
    """Read from the config: Cohere multiplies by `logit_scale`, Granite divides by `logits_scaling`, Gemma 2
    and 3 cap. `models.check` compares with the model's own logits: another family that does more is refused.
    """
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
        getattr(config, "logits_scaling", None) or 1.0
    )
    return After(scale, getattr(config, "final_logit_softcapping", None) or None)


def logprobs_and_entropy(
    head: nn.Module, states: Tensor, targets: Tensor, temperature: float, after: After = NOTHING
) -> tuple[Tensor, Tensor]:
    """log softmax(after(head(states)) / temperature)[targets] and, without gradient, the entropy in nats.

    states (n, d), targets (n,) -> two (n,), float32.
    """
    if _is_plain(head):
        trained = torch.is_grad_enabled() and (states.requires_grad or head.weight.requires_grad)
        room = _room(states.device) if trained else 0
        return _TiledLogprobs.apply(states, head.weight, head.bias, targets, temperature, room, after)
    logits = after(whole_logits(head, states))  # adapted or sharded heads
    with torch.no_grad():
        entropy = categorical_entropy(logits, temperature)
    return gather_logprobs(logits, targets, temperature), entropy


def _is_plain(head: nn.Module) -> TypeGuard[nn.Linear]:
    """Neither adapted nor sharded nor quantised: a matrix that may be read without the module."""
    return type(head) is nn.Linear and type(head.weight.data) is Tensor


def uncast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Without autocast, where the device knows it."""
    has_autocast = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if has_autocast else contextlib.nullcontext()


def compute_dtype(device: torch.device, otherwise: torch.dtype) -> torch.dtype:
    """What products are computed in here and now."""
    has_autocast = torch.amp.is_autocast_available(device.type)
    mixed = has_autocast and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if mixed else otherwise


def product(states: Tensor, weight: Tensor) -> Tensor:
    """states (n, d) @ weight (V, d).T -> (n, V), float32, of factors in one precision.

    The factors may be half, the sums are not: GPT-2's logits lie near -100, where bfloat16 has steps of 0.5
    and float16 of 0.06.
    """
    if weight.dtype in (torch.float32, torch.float64):
        return torch.mm(states, weight.t()).float()
    if states.device.type == "cuda":
        return torch.mm(states, weight.t(), out_dtype=torch.float32)
    return torch.mm(states.float(), weight.float().t())


def whole_logits(head: nn.Module, states: Tensor) -> Tensor:
    """All logits of any head, in float32 whatever the precision around it."""
    with uncast(states.device):
        return head(states.float()).float()


class _HalfHead(nn.Module):
    """A head whose weights have been rounded once, for many tokens."""

    def __init__(self, head: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.bias = head.weight.detach().to(dtype), head.bias

    def forward(self, states: Tensor) -> Tensor:
        with uncast(states.device):
            logits = product(states.to(self.weight.dtype), self.weight)
            return logits if self.bias is None else logits.add_(self.bias.detach())


def for_sampling(head: nn.Module, device: torch.device) -> nn.Module:
    """The head as `next_logits` takes it for many tokens: rounded once where products are half."""
    dtype = compute_dtype(device, torch.float32)
    if dtype == torch.float32 or not _is_plain(head):
        return head
    return _HalfHead(head, dtype)


def next_logits(head: nn.Module, states: Tensor, after: After = NOTHING) -> Tensor:
    """Logits of the next token for some rows: states (n, d) -> (n, V), float32, without gradient.

    For few rows a CPU takes half the time with the large matrix on the left.
    """
    few = states.device.type == "cpu" and len(states) <= _FEW
    if few and (by_kernel := layer_product(head)) is not None:
        return after(by_kernel(states))
    if few and _is_plain(head) and not torch.is_autocast_enabled("cpu"):
        logits = torch.mm(head.weight.detach(), states.t()).t().contiguous().float()
        return after(logits if head.bias is None else logits.add_(head.bias.detach()))
    return after(head(states) if isinstance(head, _HalfHead) else whole_logits(head, states))


def _room(device: torch.device) -> int:
    """How many logits are saved for the backward pass. By the memory that a GPU has, not by what is free:
    which ones are computed twice must not depend on the moment.
    """
    if device.type != "cuda":
        return _SAVED
    return max(_SAVED, torch.cuda.get_device_properties(device).total_memory // (4 * _SHARE))


class _Tile(NamedTuple):
    """Some columns of the logits of a block of rows, and whether they are saved for the backward pass."""

    columns: slice
    saved: bool


def _blocks_and_tiles(
    rows: int, vocabulary: int, device: torch.device, room: int
) -> list[tuple[slice, list[_Tile]]]:
    """Rows x vocabulary in blocks of rows, each with the tiles that its logits are cut into. Each tile that
    still fits into `room` logits is saved.
    """
    blocks: list[tuple[slice, list[_Tile]]] = []
    for first_row in range(0, rows, _ROWS):
        height = min(_ROWS, rows - first_row)
        width = max(_ENTRIES.get(device.type, _ENTRIES_ELSEWHERE) // height, 256)
        tiles: list[_Tile] = []
        for first_column in range(0, vocabulary, width):
            columns = slice(first_column, min(first_column + width, vocabulary))
            entries = height * (columns.stop - columns.start)
            saved = entries <= room
            room -= entries if saved else 0
            tiles.append(_Tile(columns, saved))
        blocks.append((slice(first_row, first_row + height), tiles))
    return blocks


class _Head(NamedTuple):
    """Logits of some columns, in the precision of the forward pass they belong to."""

    weight: Tensor
    bias: Tensor | None
    temperature: float
    dtype: torch.dtype
    after: After

    def logits(self, states: Tensor, columns: slice) -> Tensor:
        """(rows, columns), float32."""
        logits = product(states, self.weight[columns].to(self.dtype))
        if self.bias is not None:
            logits += self.bias[columns]
        logits = self.after(logits)
        return logits if self.temperature == 1 else logits.div_(self.temperature)


class _TiledLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        room: int,
        after: After,
    ) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(states.device, weight.dtype)
        head = _Head(weight, bias, temperature, dtype, after)
        blocks = _blocks_and_tiles(len(states), len(weight), states.device, room)
        logprobs, entropy, normaliser = (states.new_empty(len(states), dtype=torch.float32) for _ in range(3))
        saved_logits: list[Tensor] = []
        with uncast(states.device):
            for rows, tiles in blocks:
                out = _one_pass(head, states[rows].to(dtype), targets[rows], tiles)
                logprobs[rows], entropy[rows], normaliser[rows], saved = out
                saved_logits += saved
        ctx.save_for_backward(states, weight, bias, targets, normaliser, *saved_logits)
        ctx.temperature, ctx.dtype, ctx.blocks, ctx.after = temperature, dtype, blocks, after
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grads[0])


@once_differentiable
def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """d logp_i / d logits_i = (onehot(target_i) - softmax_i) / temperature."""
    states, weight, bias, targets, normaliser, *saved_logits = ctx.saved_tensors
    next_saved = iter(saved_logits)  # they were saved in the order of the tiles
    head = _Head(weight, bias, ctx.temperature, ctx.dtype, ctx.after)
    grad_states = torch.zeros_like(states)
    fresh = torch.empty_like if len(states) else torch.zeros_like  # the first block of rows fills it
    grad_weight = fresh(weight) if ctx.needs_input_grad[1] else None
    grad_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
    for rows, tiles in ctx.blocks:
        h, share = states[rows].to(ctx.dtype), (grad[rows] / ctx.temperature).unsqueeze(1)
        for columns, saved in tiles:
            logits = next(next_saved) if saved else head.logits(h, columns)
            slope = logits.sub(normaliser[rows].unsqueeze(1)).exp_().mul_(-share)
            index, inside = _within(targets[rows], columns)
            slope.scatter_add_(1, index, share * inside)
            if ctx.after != NOTHING:
                slope = ctx.after.back(slope, logits * ctx.temperature)
            slope = slope.to(ctx.dtype)
            grad_states[rows] += slope @ weight[columns].to(ctx.dtype)
            if grad_weight is not None and rows.start == 0:
                grad_weight[columns] = slope.t() @ h
            elif grad_weight is not None:
                grad_weight[columns] += slope.t() @ h
            if grad_bias is not None:
                grad_bias[columns] += slope.sum(0)
    return grad_states, grad_weight, grad_bias, None, None, None, None


def _one_pass(
    head: _Head, states: Tensor, targets: Tensor, tiles: Sequence[_Tile]
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """A block's log-probs, entropies and normalisers log Σ exp(logits), all (n,), and the logits of the tiles
    to be saved. One look at every logit, with a running maximum and running sums relative to it.
    """
    peak = torch.full((len(states), 1), -torch.inf, device=states.device)
    total, moment, target_logit = (torch.zeros_like(peak) for _ in range(3))  # Σ e, Σ e · (logit - peak), ...
    saved_logits: list[Tensor] = []
    for columns, saved in tiles:
        logits = head.logits(states, columns)
        index, inside = _within(targets, columns)
        target_logit = torch.where(inside, logits.gather(1, index), target_logit)
        higher = torch.maximum(peak, logits.amax(1, keepdim=True))
        moved = torch.where(total > 0, peak - higher, 0)
        if saved:
            saved_logits.append(logits)
        shifted = logits - higher if saved else logits.sub_(higher)
        weights = shifted.exp()
        moment = (moment + total * moved) * moved.exp() + torch.linalg.vecdot(weights, shifted).unsqueeze(1)
        total = total * moved.exp() + weights.sum(1, keepdim=True)
        peak = higher
    normaliser = peak + total.log()
    logprobs, entropy = target_logit - normaliser, total.log() - moment / total
    return logprobs.squeeze(1), entropy.squeeze(1), normaliser.squeeze(1), saved_logits


def _within(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """The column of each target in a tile (clamped), and whether it lies inside: both (n, 1)."""
    index, width = (targets - columns.start).unsqueeze(1), columns.stop - columns.start
    return index.clamp(0, width - 1), (index >= 0) & (index < width)
