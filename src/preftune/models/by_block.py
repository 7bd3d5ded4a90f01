"""Reading a model that lies in parts a block at a time: a block's weights are whole while it computes only.

Processes make unequal numbers of passes (replies end, a pair is known already), and gather together. So all
say before each pass whether they make one; who is through goes on to gather for the others until none does,
and who broke one off (for want of memory) first gathers what was left of it.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


class Turns:
    """The blocks of a plain copy, in the order in which a pass comes to them, each with the one that has its
    parts; those that have none stay as they are.
    """

    def __init__(self, blocks: Iterable[tuple[nn.Module, nn.Module]]) -> None:
        self.blocks = [(plain, part) for plain, part in blocks if isinstance(part, FSDPModule)]
        self.inside = {parameter for plain, _ in self.blocks for parameter in plain.parameters()}
        self._next = 0  # the block that a pass comes to next; 0 where none is under way

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Within `with`, all processes make passes through the plain copy, each as many as it wants."""
        hooks = [
            hook
            for i, (block, _) in enumerate(self.blocks)
            for hook in (
                block.register_forward_pre_hook(self._then(self._enter, i)),
                block.register_forward_hook(self._then(self._free, i)),
            )
        ]
        try:
            yield
            self._make_up()
            while self._any_makes(0):
                self._through()
        finally:
            self._free(self._next - 1)
            self._next = 0
            for hook in hooks:
                hook.remove()

    @staticmethod
    def _then(what: Callable[[int], None], i: int) -> Callable[..., None]:
        return lambda *_: what(i)

    def _enter(self, i: int) -> None:
        if i == 0:
            self._make_up()
            self._any_makes(1)
        assert i == self._next, "a pass that left a block out would leave the other processes waiting"
        self._gather(i)
        self._next = (i + 1) % len(self.blocks)

    def _make_up(self) -> None:
        """What is left of a pass that was broken off."""
        self._free(self._next - 1)
        if self._next:
            self._through(self._next)
            self._next = 0

    def _through(self, start: int = 0) -> None:
        """A pass of the others."""
        for i in range(start, len(self.blocks)):
            self._gather(i)
            self._free(i)

    def _any_makes(self, own: int) -> bool:
        passes = next(iter(self.inside)).new_tensor(own)
        torch.distributed.all_reduce(passes)
        return bool(passes)

    def _gather(self, i: int) -> None:
        plain, part = self.blocks[i]
        part.unshard()
        for parameter, whole in zip(plain.parameters(), _parameters(part), strict=True):
            parameter.data = whole.detach()

    def _free(self, i: int) -> None:
        plain, part = self.blocks[i]
        for parameter in plain.parameters():
            parameter.data = nothing(parameter)
        part.reshard()
        torch.clear_autocast_cache()  # it would keep every block's, rounded


def _parameters(part: Any) -> Iterator[nn.Parameter]:
    return part.parameters()


def nothing(weight: Tensor) -> Tensor:
    """In the place of a weight that is not there: its shape, of one number, which no kernel takes for one."""
    return weight.detach().new_zeros(()).expand(weight.shape)
