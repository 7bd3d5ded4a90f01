"""Masks and statistics over them: the ground on which the other formulas stand.

Off the mask an input is ignored *before* it enters any arithmetic, since 0 * NaN is NaN, in the backward pass
too. Shapes: B rows, T columns. Masks are bool or 0/1.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def promote(*inputs: Any) -> list[Any]:
    """Tensors in the dtype of the maths: float64 if any of them is, else float32; the rest passes through."""
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    return [x.to(dtype) if isinstance(x, Tensor) else x for x in inputs]


def as_mask(mask: Tensor) -> Tensor:
    """Bool from bool or 0/1 of any dtype."""
    return mask if mask.dtype == torch.bool else mask != 0


def or_all(mask: Tensor | None, x: Tensor) -> Tensor:
    """The mask as bool; without one, all of `x`."""
    return torch.ones_like(x, dtype=torch.bool) if mask is None else as_mask(mask)


def zero_off(x: Tensor, mask: Tensor) -> Tensor:
    """x on the mask, exactly 0 with gradient exactly 0 off it. `mask` is bool and broadcasts against `x`."""
    return torch.where(mask, x, 0.0)


def is_end(ids: Tensor, eos_id: int | Sequence[int] | Tensor) -> Tensor:
    """Where `ids` is an end token: one id, or any of several. Any shape -> bool of that shape."""
    ends = torch.as_tensor(eos_id, device=ids.device)
    return ids == ends if ends.dim() == 0 else torch.isin(ids, ends)


def response_mask(ids: Tensor, eos_id: int | Sequence[int] | Tensor, start: int | Tensor = 0) -> Tensor:
    """True from column `start` to the first EOS at or after it, that EOS included: writing it is an action.

    Not `ids != pad`: where pad is EOS that rule would drop the EOS itself. Several ids may end a response.
    ids (B, T), start int or (B,) -> bool (B, T). ValueError: another number of starts than of rows.
    """
    columns = torch.arange(ids.shape[1], device=ids.device)
    starts = torch.as_tensor(start, device=ids.device).reshape(-1, 1)
    if len(starts) not in (1, len(ids)):
        raise ValueError(f"{len(starts)} starts for {len(ids)} rows")
    started = columns >= starts
    eos = is_end(ids, eos_id) & started  # (B, T)
    return started & (eos.cumsum(1) - eos.long() == 0)  # no EOS strictly before this column


def last_response_index(response: Tensor) -> Tensor:
    """Column of the last response token of each row, -1 where there is none. (B, T) -> int64 (B,)."""
    columns = torch.arange(response.shape[1], device=response.device)
    return torch.where(as_mask(response), columns, -1).amax(1)


def _with_mask(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """x in the dtype of the maths, and the mask as bool of its shape. The mask may be the smaller, not x: a
    mask (B, 1) would take all of x (B,) in every row.
    """
    x, values = promote(x, mask)
    try:
        return x, as_mask(values).expand_as(x)
    except RuntimeError as error:
        raise ValueError(f"a mask {tuple(mask.shape)} does not fit {tuple(x.shape)}") from error


def masked_mean(x: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Mean of x over the mask, along `dim` or over everything; 0 where the mask is empty.

    ValueError: a mask that does not broadcast to x.
    """
    x, active = _with_mask(x, mask)
    dims = tuple(range(x.dim())) if dim is None else dim
    return zero_off(x, active).sum(dims) / active.sum(dims).clamp(min=1)


def masked_var(x: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Variance of x over the mask, divided by n - 1 (`unbiased`) or n; 0 for fewer than two entries.

    ValueError as `masked_mean`.
    """
    x, active = _with_mask(x, mask)
    squares = zero_off(x - masked_mean(x, active), active).square().sum()
    return squares / (active.sum() - int(unbiased)).clamp(min=1)


def masked_whiten(
    x: Tensor, mask: Tensor, shift_mean: bool = True, unbiased: bool = True, eps: float = 1e-8
) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the mask, 0 off it; `shift_mean=False` adds the mean back.

    TRL and verl divide the variance by n - 1, OpenAI's code by n (`unbiased=False`). Same shape as x.
    ValueError as `masked_mean`.
    """
    x, active = _with_mask(x, mask)
    x = zero_off(x, active)
    mean = masked_mean(x, active)
    whitened = (x - mean) * torch.rsqrt(masked_var(x, active, unbiased) + eps)
    return zero_off(whitened if shift_mean else whitened + mean, active)
