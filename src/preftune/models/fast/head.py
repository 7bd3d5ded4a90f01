"""From hidden states to log-probabilities of chosen tokens, in tiles of the logits.

The logits of a batch are its largest tensor by far. Here they are worked on one tile at a time, small enough
to stay in the cache. For the backward pass the first tiles are kept, up to a fixed size in all; it computes
the others again.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from preftune.functional.logprobs import categorical_entropy, gather_logprobs
from preftune.models.fast.native import layer_product

_ROWS = 1024  # positions in a tile, at most
_ENTRIES = {"cpu": 1 << 20}  # logits in a tile: 4 MB
_ENTRIES_ELSEWHERE = 1 << 26
_KEPT = 1 << 25  # logits that wait for the backward pass, at most: 128 MB
_FEW = 64  # rows


class After(NamedTuple):
    """What a family does to the logits z after its head: scale · z, then cap · tanh(z / cap)."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def back(self, slope: Tensor, after: Tensor) -> Tensor:
        """The slope by the head's own logits, from that by what became of them, `after`."""
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
    if type(head) is nn.Linear and type(head.weight.data) is Tensor:
        trained = torch.is_grad_enabled() and (states.requires_grad or head.weight.requires_grad)
        room = _KEPT if trained else 0
        return _TiledLogprobs.apply(states, head.weight, head.bias, targets, temperature, room, after)
    logits = after(head(states).float())  # adapted or sharded heads
    with torch.no_grad():
        entropy = categorical_entropy(logits, temperature)
    return gather_logprobs(logits, targets, temperature), entropy


def next_logits(head: nn.Module, states: Tensor, after: After = NOTHING) -> Tensor:
    """Logits of the next token for some rows: states (n, d) -> (n, V), float32, without gradient.

    For few rows a CPU takes half the time with the large matrix on the left.
    """
    product = layer_product(head) if len(states) <= _FEW else None
    if product is not None:
        return after(product(states))
    kind = states.device.type
    few = kind == "cpu" and len(states) <= _FEW and not torch.is_autocast_enabled(kind)
    if not (few and type(head) is nn.Linear and type(head.weight.data) is Tensor):
        return after(head(states).float())
    logits = torch.mm(head.weight.detach(), states.t()).t().contiguous().float()
    return after(logits if head.bias is None else logits.add_(head.bias.detach()))


class _Tiles:
    """The logits of rows of states, tile by tile, in the precision of the forward pass they belong to."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        temperature: float,
        dtype: torch.dtype,
        after: After = NOTHING,
    ) -> None:
        self.weight, self.bias, self.temperature, self.dtype = weight, bias, temperature, dtype
        self.after = after

    def columns(self, rows: int) -> list[slice]:
        width = max(_ENTRIES.get(self.weight.device.type, _ENTRIES_ELSEWHERE) // max(rows, 1), 256)
        return [slice(i, i + width) for i in range(0, len(self.weight), width)]

    def logits(self, states: Tensor, columns: slice) -> Tensor:
        """(rows, columns), float32."""
        logits = torch.mm(states, self.weight[columns].to(self.dtype).t()).float()
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
        kind = states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        tiles = _Tiles(weight, bias, temperature, dtype, after)
        kept: list[Tensor | None] = []
        with torch.autocast(kind, enabled=False):
            parts = [
                _one_pass(tiles, rows.to(dtype), wanted, kept, room)
                for rows, wanted in zip(states.split(_ROWS), targets.split(_ROWS), strict=True)
            ]
        logprobs, entropy, normaliser = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.save_for_backward(states, weight, bias, targets, normaliser, *kept)
        ctx.temperature, ctx.dtype, ctx.after = temperature, dtype, after
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """d logp_i / d logits_i = (onehot(target_i) - softmax_i) / temperature."""
        grad = grads[0]
        states, weight, bias, targets, normaliser, *kept = ctx.saved_tensors
        in_turn = iter(kept)
        tiles = _Tiles(weight, bias, ctx.temperature, ctx.dtype, ctx.after)
        grad_states = torch.zeros_like(states)
        fresh = torch.empty_like if len(states) else torch.zeros_like  # the first block of rows fills it
        grad_weight = fresh(weight) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        for start in range(0, len(states), _ROWS):
            rows = slice(start, start + _ROWS)
            h, share = states[rows].to(ctx.dtype), (grad[rows] / ctx.temperature).unsqueeze(1)
            for columns in tiles.columns(len(h)):
                logits = next(in_turn)
                logits = tiles.logits(h, columns) if logits is None else logits
                slope = logits.sub(normaliser[rows].unsqueeze(1)).exp_().mul_(-share)
                place, here = _within(targets[rows], columns, slope.shape[1])
                slope.scatter_add_(1, place, share * here)
                if ctx.after != NOTHING:
                    slope = ctx.after.back(slope, logits * ctx.temperature)
                slope = slope.to(ctx.dtype)
                grad_states[rows] += slope @ weight[columns].to(ctx.dtype)
                if grad_weight is not None and start == 0:
                    grad_weight[columns] = slope.t() @ h
                elif grad_weight is not None:
                    grad_weight[columns] += slope.t() @ h
                if grad_bias is not None:
                    grad_bias[columns] += slope.sum(0)
        return grad_states, grad_weight, grad_bias, None, None, None, None


def _one_pass(
    tiles: _Tiles, states: Tensor, targets: Tensor, kept: list[Tensor | None], room: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropies and normalisers log Σ exp(logits) of one block of rows, all (n,).

    Each tile of logits is added to `kept`, or None where there is no room for it.
    """
    peak = torch.full((len(states), 1), -torch.inf, device=states.device)
    total, moment, wanted = (torch.zeros_like(peak) for _ in range(3))  # Σ e, Σ e · (logit - peak), logit
    for columns in tiles.columns(len(states)):
        logits = tiles.logits(states, columns)
        fits = logits.numel() + sum(tile.numel() for tile in kept if tile is not None) <= room
        kept.append(logits if fits else None)
        place, here = _within(targets, columns, logits.shape[1])
        wanted = torch.where(here, logits.gather(1, place), wanted)
        higher = torch.maximum(peak, logits.amax(1, keepdim=True))
        moved = torch.where(total > 0, peak - higher, 0)
        logits = logits - higher if fits else logits.sub_(higher)
        weights = logits.exp()
        moment = (moment + total * moved) * moved.exp() + torch.linalg.vecdot(weights, logits).unsqueeze(1)
        total = total * moved.exp() + weights.sum(1, keepdim=True)
        peak = higher
    normaliser = peak + total.log()
    return (wanted - normaliser).squeeze(1), (total.log() - moment / total).squeeze(1), normaliser.squeeze(1)


def _within(targets: Tensor, columns: slice, width: int) -> tuple[Tensor, Tensor]:
    """Where in a tile each target lies, and whether it does: both (n, 1)."""
    place = (targets - columns.start).unsqueeze(1)
    return place.clamp(0, width - 1), (place >= 0) & (place < width)
