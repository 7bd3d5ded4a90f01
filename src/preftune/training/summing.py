"""Gradients summed over processes, after the last backward pass of an update.

Not by torch's own wrapper, which cannot repeat a pass where memory ran out. All processes sum in the same
order, from the last weight to the first.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from preftune.training.tally import Tally

_LARGE = 1 << 20  # numbers; a gradient of so many is summed where it lies, smaller ones are copied together


def fill(parameters: Sequence[nn.Parameter], sums: Tally, gather: Callable[[list[Any]], list[Any]]) -> None:
    """In a process without rows, set the gradients and metrics that the others have to zeros."""
    if not parameters:
        return
    processes = gather([(sums.kinds, [parameter.grad is not None for parameter in parameters])])
    kinds, has_grad = next(process for process in processes if process[0])
    if not sums.kinds:
        sums.fill(kinds)
        for parameter, has in zip(parameters, has_grad, strict=True):
            if has:
                parameter.grad = torch.zeros_like(parameter)


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace each gradient by its sum over all processes."""
    begun = list[tuple[list[nn.Parameter], Tensor, Any]]()
    for bucket in _buckets(parameters):
        with_grad = [parameter for parameter in bucket if parameter.grad is not None]
        if gradients := [parameter.grad.flatten() for parameter in with_grad if parameter.grad is not None]:
            flat = torch.cat(gradients) if len(gradients) > 1 else gradients[0]
            begun.append((with_grad, flat, torch.distributed.all_reduce(flat, async_op=True)))
    for with_grad, flat, work in begun:
        work.wait()
        totals = flat.split([parameter.numel() for parameter in with_grad])
        for parameter, total in zip(with_grad, totals, strict=True):
            parameter.grad = total.view_as(parameter)


def _buckets(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Large ones alone, small ones together until they are large."""
    buckets, small = list[list[nn.Parameter]](), list[nn.Parameter]()
    for parameter in reversed(parameters):
        if parameter.numel() >= _LARGE or parameter.dtype != torch.float32:
            buckets.append([parameter])
            continue
        small.append(parameter)
        if sum(p.numel() for p in small) >= _LARGE:
            buckets.append(small)
            small = []
    return [*buckets, small] if small else buckets
