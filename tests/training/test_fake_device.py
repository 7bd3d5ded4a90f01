"""Every update on a device without numbers: the meta device inside torch's fake-tensor mode.

Mixed devices raise there. A mode above it answers and counts what a GPU would have to be waited for, and
refuses copies to the CPU and float64, which MPS lacks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from preftune.algorithms import ALGORITHMS
from preftune.algorithms.base import Metrics
from preftune.config import OptimizerConfig, build
from preftune.models.fast import support
from preftune.models.fast.layout import Lane, Tree, grow
from preftune.models.roles import models_of
from preftune.training.learner import Learner
from tiny import GROUP, TRAINED, batch_for, grouped, online, roles

META = torch.device("meta")


class Strict(TorchDispatchMode):
    """Above the fake device. `chosen`: how many positions a mask picks, which only the numbers would say."""

    def __init__(self, chosen: int, width: int) -> None:
        super().__init__()
        self.chosen, self.width, self.inside, self.waits = chosen, width, False, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.name()
        on_device = any(isinstance(x, Tensor) and x.device == META for x in args)
        if name == "aten::_local_scalar_dense" and on_device:
            self.waits += self.inside
            return False if args[0].dtype == torch.bool else self.width
        if name.startswith("aten::_to_copy") and on_device and str(kwargs.get("device")) == "cpu":
            raise AssertionError("a hidden copy to the CPU")
        if name == "aten::nonzero":
            self.waits += self.inside
            return torch.empty(self.chosen, args[0].dim(), dtype=torch.long, device=META)
        if name == "aten::index.Tensor" and args[1][0] is not None and args[1][0].dtype == torch.bool:
            self.waits += self.inside
            rest = args[0].shape[args[1][0].dim() :]
            return args[0].new_empty(self.chosen, *rest)
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and out.device == META:
            assert out.dtype != torch.float64, f"{name} makes float64 on the device"
        return out


class FakeLearner(Learner):
    """On the meta device; an update is backward pass, clipping and step, without a look at the numbers."""

    mode: Strict

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.device = META

    def _take(self, role: Any) -> None:
        """Models are made there: parameters that are fake cannot be moved."""

    def update(self, role: str, batch: Any, weights: Tensor, loss: Any) -> Metrics:
        trained, self.mode.inside = self.trained[role], True
        sums = self._backward(trained, batch, weights, loss, len(batch))
        parameters = list(trained.role.model.parameters())
        assert all(p.grad is not None and p.grad.device == META for p in parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        trained.optimizer.step()
        self.mode.inside = False
        return dict.fromkeys([*sums.values, "grad_norm"], 0.0)


def on_meta(value: Any) -> Any:
    """The same record with tensors that have no numbers."""
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device=META)
    if not is_dataclass(value):
        return value
    return type(value)(**{f.name: on_meta(getattr(value, f.name)) for f in fields(value)})


def tree_of_any(chosen: int, ids: Tensor) -> tuple[Tree, Tensor, list[int]]:
    """A tree for as many rows, all different and of whole width: the numbers do not matter here."""
    with unset_fake_temporarily():
        rows, width = ids.shape
        real = torch.arange(rows * width).view(rows, width)
        tree = grow(real, torch.full((rows,), width))
    lanes = tuple(Lane(lane.rows, on_meta(lane.nodes)) for lane in tree.lanes)
    parts = (on_meta(x) for x in (tree.ids, tree.positions, tree.node))
    nodes = torch.empty(chosen, dtype=torch.long, device=META)
    return Tree(*parts, lanes, on_meta(tree.lane_index)), nodes, [width] * rows


@contextmanager
def fake(chosen: int, width: int) -> Iterator[Strict]:
    with FakeTensorMode(), Strict(chosen, width) as mode:
        yield mode


@pytest.mark.parametrize(("name", "by_tree"), [(name, tree) for name, _ in TRAINED for tree in (True, False)])
@pytest.mark.parametrize("precision", ["float32"])
def test_updates_need_no_number_of_the_device(
    name: str, by_tree: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = ALGORITHMS[name]
    batch = batch_for(name)
    sequences = next(
        (getattr(batch, part) for part in ("sequences", "chosen") if hasattr(batch, part)), batch
    )
    chosen = len(sequences) if name == "reward" else int(sequences.response.sum())
    more = {"epochs": 1, "minibatches": 1} if online(name) else {}
    more |= {"group_size": GROUP} if grouped(name) else {}
    config = build(kind.Config, {"algorithm": name, "batch_size": len(batch), **more}, name)
    monkeypatch.setattr(support, "grow_to", lambda ids, read: tree_of_any(chosen, ids))
    learner = FakeLearner()
    with fake(chosen, sequences.ids.shape[1]) as mode:
        learner.mode = mode
        with META:
            models = roles(name)
        for part, role in models.items():
            for model in models_of(role):
                monkeypatch.setitem(support._allowed, model, by_tree)
            if part in kind.trains:
                optimizer = torch.optim.AdamW(role.model.parameters(), lr=1e-3, foreach=True)
                for parameter in role.model.parameters():
                    # As a capturable AdamW keeps it, which needs a device that torch can capture.
                    optimizer.state[parameter] = {}
                learner.adopt(part, role, optimizer, OptimizerConfig())
            else:
                learner.freeze(role)
        runner: Any = kind(config, models, learner)  # type: ignore[call-arg]
        given = on_meta(batch)
        runner.improve(given) if online(name) else runner.step(given)
    updates = len(kind.trains)
    assert mode.waits <= 8 * updates
