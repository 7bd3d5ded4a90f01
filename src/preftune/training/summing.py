"""Gradients summed over processes while the backward pass still computes others: Li et al., arXiv:2006.15704.

Not by torch's own wrapper, which cannot repeat a pass. Here, if memory runs out in the last pass, the sums
that have begun stay, since their gradients were complete, and the others follow when the pass is repeated.
All processes sum in the same order, from the last weight to the first, whatever order the gradients come in.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from preftune.training.tally import Tally

_LARGE = 1 << 20  # numbers; a gradient of so many is summed where it lies, smaller ones are copied together


class Summing:
    """The sums of one update."""

    def __init__(self, parameters: Iterable[nn.Parameter], along: bool = True) -> None:
        """`along`: sums may begin before the backward pass ends, because every process makes one."""
        self.along = along
        self._ahead = _buckets([parameter for parameter in parameters if parameter.requires_grad])
        self._come: set[nn.Parameter] = set()  # gradients that are whole
        self._begun: list[tuple[list[nn.Parameter], Tensor, Any]] = []

    @contextlib.contextmanager
    def backward_pass(self, last: bool) -> Iterator[None]:
        """Within `with` a backward pass; in the `last`, sums begin as its gradients come, unless all are in
        one bucket, which is complete only at the end.
        """
        if not (last and self.along and len(self._ahead) > 1):
            yield
            return
        self._come.clear()  # of a pass that was broken off
        all_ahead = [parameter for bucket in self._ahead for parameter in bucket]
        hooks = [parameter.register_post_accumulate_grad_hook(self._note) for parameter in all_ahead]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def fill(self, sums: Tally, together: Callable[[list[Any]], list[Any]]) -> None:
        """In a process without rows, set the gradients and metrics that the others have to zeros."""
        ahead = [parameter for bucket in self._ahead for parameter in bucket]
        if not ahead:
            return
        processes = together([(sums.kinds, [parameter.grad is not None for parameter in ahead])])
        kinds, has_grad = next(process for process in processes if process[0])
        if not sums.kinds:
            sums.fill(kinds)
            for parameter, has in zip(ahead, has_grad, strict=True):
                if has:
                    parameter.grad = torch.zeros_like(parameter)

    def finish(self) -> None:
        """Begin the remaining sums, and replace each gradient by its sum."""
        while self._ahead:
            self._begin()
        for bucket, flat, work in self._begun:
            work.wait()
            totals = flat.split([parameter.numel() for parameter in bucket])
            for parameter, total in zip(bucket, totals, strict=True):
                parameter.grad = total.view_as(parameter)

    def _note(self, parameter: Tensor) -> None:
        self._come.add(cast(nn.Parameter, parameter))
        while self._ahead and self._come.issuperset(self._ahead[0]):
            self._begin()

    def _begin(self) -> None:
        with_grad = [parameter for parameter in self._ahead[0] if parameter.grad is not None]
        if gradients := [parameter.grad.flatten() for parameter in with_grad if parameter.grad is not None]:
            flat = torch.cat(gradients) if len(gradients) > 1 else gradients[0]
            self._begun.append((with_grad, flat, torch.distributed.all_reduce(flat, async_op=True)))
        del self._ahead[0]  # not before: memory may have run out


def _buckets(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
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
