"""Models of which every process holds a part of each weight: FSDP2, torch's `fully_shard`.

In training, weights are gathered a block at a time, and gradients are summed into parts; in between, weights,
gradients and moments lie in parts. Where a model is only read (sampling, scoring, the reference, the finished
model) all of it is gathered, one model at a time, into a plain copy that is empty otherwise: kernel, decoder
and merged adapters, which are made for plain models, work on it. All processes gather together, so each must
enter the same `unsharded` and make the same forward passes. Blocks that are frozen and shared
(`models.trunk`) stay whole, once for all roles: each process goes through them by itself.

Zhao et al., arXiv:2304.11277; Rajbhandari et al., arXiv:1910.02054 (stage 3).
"""

import contextlib
import copy
import weakref
from collections.abc import Collection, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from preftune.errors import ConfigError
from preftune.models.adapter import same_adapter, unmerged
from preftune.models.by_block import Turns, nothing
from preftune.models.fast.support import same_layout
from preftune.models.layers import blocks_of
from preftune.models.roles import Role, models_in, models_of
from preftune.models.trunk import below_cut, same_cut

_plain: "weakref.WeakKeyDictionary[nn.Module, nn.Module]" = weakref.WeakKeyDictionary()
_by_block: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def shard(role: Role, by_block: bool = False) -> None:
    """Leave each process its part of a role's weights: rows of dimension 0, as even as they come. `by_block`:
    where it is only read, too, a block at a time is whole (see `readable`).

    All processes call it, before the optimizer is made. ConfigError for a model that cannot be cut so.
    """
    shared = {parameter for model in models_of(role) for parameter in below_cut(model)}
    blocks = [block for block in _blocks(models_of(role)) if not shared.issuperset(block.parameters())]
    _refuse(role, blocks, shared)
    plain = _empty_copy(role, shared)
    mesh = _mesh(next(role.module.parameters()).device)
    for module in [*blocks, role.module]:
        sharded: FSDPModule = fully_shard(
            module, mesh=mesh, reshard_after_forward=True, ignored_params=shared
        )
        sharded.set_gradient_divide_factor(1.0)  # gradients are summed: weights of losses are global
        sharded.set_force_sum_reduction_for_comms(True)  # gloo knows no other way
    _plain[role.module] = plain
    if by_block and blocks:
        _by_block.add(role.module)


def _blocks(models: Sequence[PreTrainedModel]) -> list[nn.Module]:
    return [block for model in models for block in blocks_of(model)]


def is_sharded(role: Role) -> bool:
    return isinstance(role.module, FSDPModule)


@contextlib.contextmanager
def readable(role: Role) -> Iterator[None]:
    """Within `with`, passes without gradient may be made through a sharded role: all of it is gathered, or,
    if it was sharded `by_block`, one block at a time, with adapters unmerged. Any other role stays as it is.
    """
    if role.module not in _by_block:
        with unsharded(role):
            yield
        return
    # Made anew each time: FSDP2's blocks refer to the whole role, which would be kept alive with them.
    plain = _blocks(models_in(cast(Any, _plain[role.module])))
    turns = Turns(zip(plain, _blocks(models_of(role)), strict=True))
    with unsharded(role, turns.inside), turns.passes(), contextlib.ExitStack() as stack:
        for model in models_of(role):
            stack.enter_context(unmerged(model))
        yield


@contextlib.contextmanager
def unsharded(role: Role, but: Collection[nn.Parameter] = ()) -> Iterator[None]:
    """Within `with`, a sharded role is a plain one with all its weights, for reading, `but` for some that are
    gathered later. Any other role stays as it is.
    """
    holder: Any = role  # a role's class says which module it has, and the copy is of that class
    sharded = holder.module
    if (plain := _plain.get(sharded)) is None:
        yield
        return
    pairs = zip(plain.parameters(), sharded.parameters(), strict=True)
    parts = [(p, part) for p, part in pairs if isinstance(part, DTensor) and p not in but]
    for parameter, part in parts:
        parameter.data = cast(DTensor, part.detach()).full_tensor()
    holder.module = plain
    try:
        yield
    finally:
        holder.module = sharded
        for parameter, _ in parts:
            parameter.data = nothing(parameter)


def local(tensor: Tensor) -> Tensor:
    """This process's part, where it lies; a plain tensor is its own."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rows_of(tensor: Tensor) -> slice:
    """Which rows of the whole `local` gives; all of a plain tensor."""
    if not isinstance(tensor, DTensor):
        return slice(0, len(tensor) if tensor.dim() else 1)
    rows, mesh = len(tensor), tensor.device_mesh
    size = -(-rows // mesh.size())
    start = min(mesh.get_local_rank() * size, rows)
    return slice(start, min(start + size, rows))


def as_part(part: Tensor, of: Tensor) -> Tensor:
    """`part` as a part of the tensor `of`: one of a moment, like the weight's."""
    if not isinstance(of, DTensor) or not part.dim():
        return part
    return DTensor.from_local(
        part, of.device_mesh, of.placements, run_check=False, shape=of.shape, stride=of.stride()
    )


def number(tensor: Tensor) -> float:
    """A scalar, of which each process may have a part."""
    return float(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)


def _mesh(device: torch.device) -> DeviceMesh:
    return init_device_mesh(device.type, (torch.distributed.get_world_size(),))


def _refuse(role: Role, blocks: list[nn.Module], shared: set[nn.Parameter]) -> None:
    """ConfigError, with a message that helps, for what FSDP2 would fail at later."""
    kind, hint = type(role.model).__name__, "set parallel.shard=false"
    if not all(parameter.is_floating_point() for parameter in role.module.parameters()):
        raise ConfigError(f"{kind} has quantised weights, which cannot be sharded", hint)
    inside = {module for block in blocks for module in block.modules()}
    outside = [module for module in role.module.modules() if module not in inside]
    groups = [set(block.parameters()) - shared for block in blocks]
    groups.append({p for module in outside for p in module.parameters(recurse=False)} - shared)
    if len(set().union(*groups)) < sum(map(len, groups)):
        raise ConfigError(f"{kind} uses one weight in several blocks, and cannot be sharded", hint)


def _empty_copy(role: Role, shared: set[nn.Parameter]) -> nn.Module:
    """The same module without weights, tied where they were, but for the `shared` ones themselves."""
    weights = {
        id(p): p if p in shared else nn.Parameter(nothing(p), p.requires_grad)
        for p in role.module.parameters()
    }
    copied = cast(nn.Module, copy.deepcopy(role.module, cast(Any, weights)))
    for model, new in zip(models_of(role), models_in(cast(Any, copied)), strict=True):
        same_layout(model, new)
        same_adapter(model, new)
        same_cut(model, new)
    return copied
