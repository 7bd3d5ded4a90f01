"""One more token as the same work on the same memory each time, which a CUDA graph repeats without Python.

A token of a small model is hundreds of kernels of microseconds: a card waits for the host that starts them. A
graph starts all of them at once. What is recorded must therefore not depend on numbers: how many tokens are
written is a number on the device, every token attends to all positions, and those not written yet are hidden.

**Never run on a GPU.** That a step can be recorded is shown on a CPU (tests/models/test_static.py).
"""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from preftune.models.fast.decode import GridDecoder
from preftune.models.fast.support import lays_out_trees
from preftune.models.fast.switch import Switch

Step = Callable[[], None]
WARM_UP = 2  # steps before one is recorded: kernels are loaded and workspaces made in them


class StaticGrid(GridDecoder):
    """A `GridDecoder` whose steps are all alike; no row drops out.

    now (1,): tokens written · unseen (limit,): -inf from there on, but for the token of this step.
    """

    def start(self) -> Tensor:
        states = super().start()
        device = states.device
        for new in (x for pair in self.new for x in pair):
            new.zero_()  # hidden means weight 0, and 0 times what lies in unused memory may be no number
        self.now = torch.zeros(1, dtype=torch.long, device=device)
        self.unseen = torch.full((self.limit,), -torch.inf, device=device)
        return states

    def step(self, tokens: Tensor) -> Tensor:
        assert self.unseen is not None
        self.unseen.index_fill_(0, self.now, 0.0)
        states = self._forward(tokens)
        self.positions.add_(1)
        self.now.add_(1)
        return states

    def keep(self, rows: Tensor) -> None:
        raise NotImplementedError("other rows are another shape")

    def _write(self, new: Tensor, x: Tensor) -> Tensor:
        return new.index_copy_(3, self.now, self._on_grid(x).to(new.dtype))


def recorded(step: Step) -> Step:
    """`step` as a CUDA graph: the same kernels on the same memory. It is recorded, not executed.

    What other threads ask of the card meanwhile (NCCL's watchdog does) is no error of the recording.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay


# How a step is recorded, by type of device; on others rows go by the plain decoders.
RECORDERS: dict[str, Callable[[Step], Step]] = {"cuda": recorded}
_refused: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()
_graphs = Switch()
without_graphs = _graphs.turned_off  # the plain decoder everywhere


def recorder(model: PreTrainedModel, device: torch.device) -> Callable[[Step], Step] | None:
    """What records this model's steps there; None where the plain decoder does them: on other devices, for
    models that may not be laid out as trees, those of which `refuse` was told, and those that are gathered a
    block at a time: what is done before a block is no work of the device, and would not be repeated.
    """
    record = None if _graphs.off or model in _refused else RECORDERS.get(device.type)
    if record is None or any(module._forward_pre_hooks for module in model.modules()):
        return None
    return record if lays_out_trees(model) else None


def refuse(model: PreTrainedModel) -> None:
    """The model's steps cannot be recorded: the plain decoder does them from now on."""
    _refused.add(model)
