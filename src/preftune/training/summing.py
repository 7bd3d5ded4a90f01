"""Gradients summed over processes while the backward pass still makes others: Li et al., arXiv:2006.15704.

Not torch's own wrapper, which cannot repeat a pass: here, where memory runs out in the last one, what is
being summed stays, since those gradients were whole, and the others follow when the pass is made again. All
processes sum the same in the same order, from the last weight to the first, whenever the gradients come.
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
        self._ahead = _buckets([each for each in parameters if each.requires_grad])
        self._come: set[nn.Parameter] = set()  # gradients that are whole
        self._begun: list[tuple[list[nn.Parameter], Tensor, Any]] = []

    @contextlib.contextmanager
    def whole(self, last: bool) -> Iterator[None]:
        """Within `with` a backward pass; sums begin as its gradients come, if it is the `last`."""
        if not (last and self.along):
            yield
            return
        self._come.clear()  # of a pass that was broken off
        all_ahead = [each for bucket in self._ahead for each in bucket]
        hooks = [each.register_post_accumulate_grad_hook(self._note) for each in all_ahead]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def fill(self, sums: Tally, together: Callable[[list[Any]], list[Any]]) -> None:
        """Give a process without any rows zeros for the gradients and metrics of the others."""
        ahead = [each for bucket in self._ahead for each in bucket]
        if not ahead:
            return
        had = together([(sums.kinds, [each.grad is not None for each in ahead])])
        kinds, given = next(each for each in had if each[0])
        if not sums.kinds:
            sums.fill(kinds)
            for parameter in (each for each, has in zip(ahead, given, strict=True) if has):
                parameter.grad = torch.zeros_like(parameter)

    def finish(self) -> None:
        """Begin what is left, and give each weight that has a gradient the sum in its place."""
        while self._ahead:
            self._begin()
        for bucket, flat, work in self._begun:
            work.wait()
            for each, total in zip(bucket, flat.split([each.numel() for each in bucket]), strict=True):
                each.grad = total.view_as(each)

    def _note(self, parameter: Tensor) -> None:
        self._come.add(cast(nn.Parameter, parameter))
        while self._ahead and self._come.issuperset(self._ahead[0]):
            self._begin()

    def _begin(self) -> None:
        given = [each for each in self._ahead[0] if each.grad is not None]
        if gradients := [each.grad.flatten() for each in given if each.grad is not None]:
            flat = torch.cat(gradients) if len(gradients) > 1 else gradients[0]
            self._begun.append((given, flat, torch.distributed.all_reduce(flat, async_op=True)))
        del self._ahead[0]  # not before: memory may have run out


def _buckets(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Large ones alone, small ones together until they are large."""
    buckets, small = list[list[nn.Parameter]](), list[nn.Parameter]()
    for each in reversed(parameters):
        if each.numel() >= _LARGE or each.dtype != torch.float32:
            buckets.append([each])
            continue
        small.append(each)
        if sum(other.numel() for other in small) >= _LARGE:
            buckets.append(small)
            small = []
    return [*buckets, small] if small else buckets
