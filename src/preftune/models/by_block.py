"""Reading a sharded model a block at a time: a block's weights are whole only while it computes.

Processes make unequal numbers of passes (replies end, a pair is known already), but gather together. So each
says before every pass whether it makes one. A process that has finished goes on gathering until all have; one
that broke a pass off (out of memory) first gathers for the blocks that remained.
"""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


class Turns:
    """The blocks of a plain copy in the order of a pass, each with its sharded block; those that are not
    sharded stay as they are.
    """

    def __init__(self, blocks: Iterable[tuple[nn.Module, nn.Module]]) -> None:
        self.blocks = [(plain, sharded) for plain, sharded in blocks if isinstance(sharded, FSDPModule)]
        self.inside = {parameter for plain, _ in self.blocks for parameter in plain.parameters()}
        self._next = 0  # the block that a pass comes to next; 0 where none is under way

    @contextlib.contextmanager
    def passes(self) -> Iterator[None]:
        """Within `with`, all processes make passes through the plain copy, each as many as it wants."""
        hooks = [
            hook
            for i, (block, _) in enumerate(self.blocks)
            for hook in (
                block.register_forward_pre_hook(lambda *_, i=i: self._enter(i)),
                block.register_forward_hook(lambda *_, i=i: self._free(i)),
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

    def _enter(self, i: int) -> None:
        if i == 0:
            self._make_up()
            self._any_makes(1)
        assert i == self._next, "a pass that left a block out would leave the other processes waiting"
        self._gather(i)
        self._next = (i + 1) % len(self.blocks)

    def _make_up(self) -> None:
        """Gather for the blocks that remained of a pass that was broken off."""
        self._free(self._next - 1)
        if self._next:
            self._through(self._next)
            self._next = 0

    def _through(self, start: int = 0) -> None:
        """Gather as the others do in a pass, from block `start` on."""
        for i in range(start, len(self.blocks)):
            self._gather(i)
            self._free(i)

    def _any_makes(self, count: int) -> bool:
        """Whether any process makes another pass; `count`: 1 if this one does, else 0."""
        passes = next(iter(self.inside)).new_tensor(count)
        torch.distributed.all_reduce(passes)
        return bool(passes)

    def _gather(self, i: int) -> None:
        plain, sharded = self.blocks[i]
        sharded.unshard()
        for parameter, weight in zip(plain.parameters(), sharded.parameters(), strict=True):
            parameter.data = weight.detach()

    def _free(self, i: int) -> None:
        plain, sharded = self.blocks[i]
        for parameter in plain.parameters():
            parameter.data = nothing(parameter)
        sharded.reshard()
        torch.clear_autocast_cache()  # it would keep a rounded copy of every block


def nothing(weight: Tensor) -> Tensor:
    """Stands for a weight that is not in memory: its shape with stride 0, which no kernel of ours accepts."""
    return weight.detach().new_zeros(()).expand(weight.shape)
