"""A network cut in two between its blocks: the part below one of them, and what comes from there on.

The blocks are found in the module tree, and nothing else needs to be known of a family: below the cut, the
forward pass is ended where it reaches the block; above it, that block is given the states and the ones before
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

from preftune.models.parts import blocks_of


class _Reached(Exception):
    """The forward pass has come to the cut."""


@dataclass(frozen=True, slots=True)
class Cut:
    """The blocks of a model, the first of them that lies above, whether blocks return tuples, and d.

    They are held weakly: FSDP2's know the whole model, which a table of cuts by models would keep for good.
    """

    held: tuple["weakref.ref[nn.Module]", ...]
    at: int
    tuples: bool
    width: int

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        return tuple(block for each in self.held if (block := each()) is not None)

    def below(self, forward: Callable[[], object]) -> Tensor:
        """The states that `forward` brings to block `at`, without gradient: (., ., d)."""
        caught: list[Tensor] = []

        def stop(states: Tensor) -> None:
            caught.append(states)
            raise _Reached

        with torch.no_grad(), contextlib.suppress(_Reached), self.watched(stop):
            forward()
        return caught[0]

    @contextlib.contextmanager
    def watched(self, seen: Callable[[Tensor], None]) -> Iterator[None]:
        """Within `with`, `seen` is given the states (., ., d) that forward passes bring to block `at`."""

        def reached(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            seen(_states(args, named))

        # Before the block's other hooks: one of a sharded block would gather its weights, and wait for that.
        hook = self.blocks[self.at].register_forward_pre_hook(reached, prepend=True, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def given(self, states: Tensor) -> contextlib.AbstractContextManager[None]:
        """Forward passes begin at block `at`, with these states (., ., d)."""
        entry = self.blocks[self.at].forward

        def enter(*args: Any, **named: Any) -> Any:
            if args:
                return entry(states, *args[1:], **named)
            return entry(**{**named, "hidden_states": states})

        def nothing(*args: Any, **named: Any) -> Any:
            return (_states(args, named),) if self.tuples else _states(args, named)

        below = dict.fromkeys(self.blocks[: self.at], nothing)
        return instead({**below, self.blocks[self.at]: enter})


@torch.no_grad()
def cut_at(model: PreTrainedModel, at: int, ids: Tensor) -> Cut:
    """The model cut below block `at`; what its blocks return is checked on rows ids (B, T)."""
    blocks, seen = blocks_of(model), list[Any]()
    own = blocks[0].forward

    def watched(*args: Any, **named: Any) -> Any:
        seen.append(own(*args, **named))
        return seen[0]

    with instead({blocks[0]: watched}):
        model.base_model(ids, use_cache=False)
    tuples = isinstance(seen[0], tuple)
    return Cut(tuple(map(weakref.ref, blocks)), at, tuples, (seen[0][0] if tuples else seen[0]).shape[-1])


def _states(args: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
    """What a block is given, by place or by name."""
    return args[0] if args else named["hidden_states"]


@contextlib.contextmanager
def instead(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Other functions in the place of some modules' own."""
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
