"""The training state: all that one step leaves behind for the next.

Random numbers are functions of (run seed, stage, step, purpose, row) and batches functions of the step, so
the state is weights, Adam's moments, the counts of what was skipped, the fp16 scaler, and the scalars of the
algorithm (the coefficient of a KL controller).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from preftune.models.shards import as_part, local, rows_of
from preftune.models.trunk import trunk_digest
from preftune.training.learner import Learner

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """Weights and moments by role; `moments` are called "<number of the parameter>.<kind>". Tensors lie where
    the learner's do; a copy lies on the CPU. Of sharded roles they are the parts of this process.
    """

    weights: Mapping[str, Tensors]
    moments: Mapping[str, Tensors]
    skipped: Mapping[str, int]
    bad_steps: int
    scaler: Mapping[str, Any]
    scalars: Mapping[str, float] = field(default_factory=dict)  # numbers of the algorithm (see Learner)
    trunks: Mapping[str, str] = field(default_factory=dict)  # of roles that share one: its hash
    device: str = "cpu"  # what computed it: the name of a card

    def copied(self, into: "TrainState | None" = None) -> "TrainState":
        """A copy on the CPU, in the memory of `into` where that has the same tensors."""
        weights, moments = (into.weights, into.moments) if into is not None else ({}, {})
        return replace(
            self,
            weights={name: _copied(tensors, weights.get(name, {})) for name, tensors in self.weights.items()},
            moments={name: _copied(tensors, moments.get(name, {})) for name, tensors in self.moments.items()},
        )


def capture(learner: Learner) -> TrainState:
    """The learner's state: its own tensors, to be used before it goes on."""
    return TrainState(
        weights={name: weights_of(trained.role.model) for name, trained in learner.trained.items()},
        moments={name: _moments(trained.optimizer) for name, trained in learner.trained.items()},
        skipped={name: trained.skipped for name, trained in learner.trained.items()},
        bad_steps=learner.bad_steps,
        scaler=learner.scaler_state(),
        scalars=dict(learner.scalars),
        trunks=trunks_of(learner),
        device=device_name(learner.device),
    )


def load_state(state: TrainState, learner: Learner) -> None:
    """Give the learner a state. KeyError if it lacks a weight."""
    for name, trained in learner.trained.items():
        with torch.no_grad():
            for key, parameter in _trained_parameters(trained.role.model):
                local(parameter).copy_(state.weights[name][key])
        restored = trained.optimizer.state_dict()
        restored["state"] = {}
        weights = _parameters(trained.optimizer)
        for key, value in state.moments[name].items():
            index, kind = key.split(".", 1)
            restored["state"].setdefault(int(index), {})[kind] = as_part(value.clone(), weights[int(index)])
        trained.optimizer.load_state_dict(restored)
        trained.skipped = state.skipped[name]
    learner.bad_steps = state.bad_steps
    learner.scalars = dict(state.scalars)
    learner.load_scaler_state(dict(state.scaler))


def device_name(device: torch.device) -> str:
    """The name of a card, on which the last bits depend; else the kind."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def trunks_of(learner: Learner) -> dict[str, str]:
    """The hash of what is frozen in each trained role that shares it."""
    digests = {name: trunk_digest(trained.role.model) for name, trained in learner.trained.items()}
    return {name: digest for name, digest in digests.items() if digest}


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """Trained parameters by name, tied ones once, where they lie; this process's part of sharded ones."""
    return {name: local(p.detach()).contiguous() for name, p in _trained_parameters(model)}


def rows_by_name(model: torch.nn.Module) -> dict[str, slice]:
    """Which rows of its trained parameters this process has."""
    return {name: rows_of(p) for name, p in _trained_parameters(model)}


def rows_by_moment(optimizer: torch.optim.Optimizer) -> dict[str, slice]:
    """The same for what an optimizer of AdamW's kind keeps of them."""
    weights = enumerate(_parameters(optimizer))
    return {f"{i}.{kind}": rows_of(p) for i, p in weights for kind in ("exp_avg", "exp_avg_sq", "step")}


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What an optimizer changes, in the order in which its state counts them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _trained_parameters(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def state_bytes(learner: Learner) -> int:
    """Bytes of a checkpoint: trained weights and AdamW's two moments of each."""
    weights = [p for trained in learner.trained.values() for _, p in _trained_parameters(trained.role.model)]
    return 3 * sum(p.numel() * p.element_size() for p in weights)


def _moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    states = optimizer.state_dict()["state"]
    return {
        f"{i}.{k}": local(v.detach()).contiguous() for i, state in states.items() for k, v in state.items()
    }


def _on_cpu(tensor: Tensor) -> Tensor:
    """A copy, in memory that a GPU can write to by itself."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
    return copy.copy_(tensor)


def _copied(tensors: Tensors, into: Tensors) -> Tensors:
    if into.keys() != tensors.keys():
        return {key: _on_cpu(tensor) for key, tensor in tensors.items()}
    for key, tensor in tensors.items():
        into[key].copy_(tensor)
    return into
