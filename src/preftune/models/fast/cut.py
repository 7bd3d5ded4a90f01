"""A network cut in two at one of its blocks: the part below it, and the part that begins with it.

The blocks are found in the module tree; nothing else depends on the family. For the lower part the forward
pass ends where it reaches the block; for the upper part that block is given the states, and the blocks before
it do nothing. Position ids, masks and the layout are the caller's, the same for both parts.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from preftune.models.layers import blocks_of


class _Reached(Exception):
    """The forward pass has come to the cut, with these states."""

    def __init__(self, states: Tensor) -> None:
        self.states = states


@dataclass(frozen=True, slots=True)
class Cut:
    """The blocks of a model, the first of them above the cut (`at`), whether blocks return tuples, and d.

    Weak references: FSDP2's blocks refer to the whole model, which a table of cuts would keep alive.
    """

    block_refs: tuple["weakref.ref[nn.Module]", ...]
    at: int
    tuples: bool
    width: int

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        return tuple(block for ref in self.block_refs if (block := ref()) is not None)

    def below(self, forward: Callable[[], object]) -> Tensor:
        """The states that `forward` brings to block `at`, without gradient: (., ., d)."""
        with self.stopping():
            return self.caught(forward)

    def stopping(self) -> contextlib.AbstractContextManager[None]:
        """Within `with`, forward passes end at block `at`, those of several threads too; see `caught`."""

        def stop(states: Tensor) -> None:
            raise _Reached(states)

        return self.watched(stop)

    def caught(self, forward: Callable[[], object]) -> Tensor:
        """What `below` returns, within `stopping`."""
        try:
            with torch.no_grad():
                forward()
        except _Reached as reached:
            return reached.states
        raise RuntimeError(f"the forward pass did not come to block {self.at}")

    @contextlib.contextmanager
    def watched(self, observe: Callable[[Tensor], None]) -> Iterator[None]:
        """Within `with`, `observe` is given the states (., ., d) that forward passes bring to block `at`."""

        def reached(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            observe(_states(args, named))

        # First of the block's hooks: FSDP's would gather the block's weights, and wait for other processes.
        hook = self.blocks[self.at].register_forward_pre_hook(reached, prepend=True, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def resumed_from(self, states: Tensor) -> contextlib.AbstractContextManager[None]:
        """Forward passes begin at block `at`, with these states (., ., d)."""
        entry = self.blocks[self.at].forward

        def enter(*args: Any, **named: Any) -> Any:
            if args:
                return entry(states, *args[1:], **named)
            return entry(**{**named, "hidden_states": states})

        def skip(*args: Any, **named: Any) -> Any:
            return (_states(args, named),) if self.tuples else _states(args, named)

        below = dict.fromkeys(self.blocks[: self.at], skip)
        return instead({**below, self.blocks[self.at]: enter})


@torch.no_grad()
def cut_at(model: PreTrainedModel, at: int, ids: Tensor) -> Cut:
    """The model cut below block `at`; what its blocks return is checked on rows ids (B, T)."""
    blocks, outputs = blocks_of(model), list[Any]()
    forward = blocks[0].forward

    def recording(*args: Any, **named: Any) -> Any:
        outputs.append(forward(*args, **named))
        return outputs[0]

    with instead({blocks[0]: recording}):
        model.base_model(ids, use_cache=False)
    tuples = isinstance(outputs[0], tuple)
    states = outputs[0][0] if tuples else outputs[0]
    return Cut(tuple(map(weakref.ref, blocks)), at, tuples, states.shape[-1])


def _states(args: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
    """The states that a block is given, by position or by name."""
    return args[0] if args else named["hidden_states"]


@contextlib.contextmanager
def instead(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Within `with`, these functions are called in place of the modules' own forward."""
    usual = [(vars(module), vars(module).get("forward")) for module in forwards]
    for module, forward in forwards.items():
        vars(module)["forward"] = forward
    try:
        yield
    finally:
        for attributes, forward in usual:
            del attributes["forward"]
            if forward is not None:
                attributes["forward"] = forward
