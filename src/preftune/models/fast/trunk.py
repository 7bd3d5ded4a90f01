"""The lower blocks that several models share, and the states kept of them.

Their weights never change, so the states of a token depend on the tokens up to it alone: a row that went
through once, for any of the models, serves all of them in every later pass. Models are attached by
`models.trunk`; here is what a forward pass needs.
"""

import hashlib
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from preftune.models.fast.cut import Cut
from preftune.models.kept import KeptStates

_ROOM = 1 << 30  # bytes of states in memory, at most


class Row(NamedTuple):
    """A row of T tokens: `states` (N, d) of its whole pass, `state_index` (T,) its own among them."""

    states: Tensor
    state_index: Tensor


def _single_row(states: Tensor) -> Row:
    """A row whose states are all of `states`, in order."""
    return Row(states, torch.arange(len(states), device=states.device))


def _packed(states: Tensor, dtype: "np.dtype[Any]") -> Tensor:
    """As it is written: float32, or bfloat16 as the 16-bit numbers that numpy knows."""
    return states.bfloat16().view(torch.int16) if dtype == np.int16 else states.float()


def _unpacked(numbers: Tensor) -> Tensor:
    return numbers.view(torch.bfloat16).float() if numbers.dtype == torch.int16 else numbers


# Rows ids (B, T), attention (B, T) through the lower blocks, each alone or all together
Pass = Callable[[Tensor, Tensor, bool], list[Row]]


@dataclass(eq=False, slots=True)
class Trunk:
    """The lower blocks of its `members`. `keeps`: whether rows stay in memory until `forget`; `disk`: where
    they stay for good, if other steps, stages or runs will use them again; `drawn`: whether a sampler
    computes the same states, to rounding; None while that has not been tried.
    """

    digest: str  # of all weights below the cut
    settings: str = ""  # the hash of how they are used
    members: "weakref.WeakSet[PreTrainedModel]" = field(default_factory=weakref.WeakSet)
    keeps: bool = True
    disk: KeptStates | None = None
    say: Callable[[str], None] = print
    drawn: bool | None = None
    _rows: dict[bytes, Row] = field(default_factory=dict)
    _passes: deque[tuple[list[bytes], int]] = field(default_factory=deque)  # oldest first: rows, bytes
    _bytes: int = 0

    def is_like(self, other: "Trunk") -> bool:
        """Whether both make the same states of a row."""
        return (self.digest, self.settings) == (other.digest, other.settings)

    def rows(self, ids: Tensor, attention: Tensor, through: Pass) -> list[Row]:
        """The states of all rows. Missing ones go `through` together; with a `disk` each alone, so that not
        even their last bits depend on the rows beside them.
        """
        alone = self.disk is not None
        if not alone and not self.keeps:
            return through(ids, attention, False)
        keys = row_keys(ids, attention)
        by_key = {key: row for key in keys if (row := self._lookup(key, ids.device)) is not None}
        missing = {key: i for i, key in enumerate(keys) if key not in by_key}
        if missing:
            index = torch.tensor(list(missing.values()), device=ids.device)
            width = int(attention[index].sum(1).max())
            rows = through(ids[index][:, :width], attention[index][:, :width], alone)
            new = {key: self._on_disk(key, row) for key, row in zip(missing, rows, strict=True)}
            for together in [{key: row} for key, row in new.items()] if alone else [new]:
                self._keep(together)
            by_key |= new
        return [by_key[key] for key in keys]

    def takes(self, size: int) -> bool:
        """Whether `size` bytes of states from elsewhere are kept, in memory alone and until `forget`."""
        return self.keeps and self.disk is None and size <= _ROOM

    def take(self, ids: Tensor, attention: Tensor, rows: Sequence[Row]) -> None:
        """Keep rows that have been through the lower blocks already, all in one pass."""
        self._keep(dict(zip(row_keys(ids, attention), rows, strict=True)))

    def _lookup(self, key: bytes, device: torch.device) -> Row | None:
        """A row in memory or on disk."""
        if key in self._rows or self.disk is None:
            return self._rows.get(key)
        states = self.disk.get(key)
        return None if states is None else _single_row(_unpacked(torch.from_numpy(states)).to(device))

    def _on_disk(self, key: bytes, row: Row) -> Row:
        """Write a row to the disk, if there is one; returns what will be read back. After an error nothing
        more is written; a directory that is full is said once.
        """
        if self.disk is None:
            return row
        packed = _packed(row.states.index_select(0, row.state_index), self.disk.dtype)
        was_full = self.disk.full
        try:
            self.disk.add(key, packed.cpu().numpy())
        except OSError as error:
            self.say(f"warning: no more states are kept on disk: {error.strerror}")
            self.disk = None
        if self.disk is not None and self.disk.full and not was_full:
            self.say(
                f"warning: {self.disk.directory} is full: further rows are computed in every pass; "
                "raise model.kept_gb, or empty it (preftune cache --empty)"
            )
        return _single_row(_unpacked(packed))

    def forget(self) -> None:
        """Drop what is in memory."""
        self._rows.clear()
        self._passes.clear()
        self._bytes = 0

    def _keep(self, rows: dict[bytes, Row]) -> None:
        states = next(iter(rows.values())).states
        self._rows |= rows
        self._passes.append((list(rows), states.nbytes))
        self._bytes += states.nbytes
        while self._bytes > _ROOM and len(self._passes) > 1:
            old, size = self._passes.popleft()
            self._bytes -= size
            for key in old:
                self._rows.pop(key, None)  # two halves of a rollout may have drawn the same row


class Branch(NamedTuple):
    """A model as one of those that share a trunk; `frozen`: names in its base model of what lies below."""

    cut: Cut
    frozen: tuple[str, ...]
    trunk: Trunk


_branches: "weakref.WeakKeyDictionary[PreTrainedModel, Branch]" = weakref.WeakKeyDictionary()


def attach(model: PreTrainedModel, branch: Branch) -> None:
    """From now on the model's states are computed in two parts."""
    detach(model)
    _branches[model] = branch
    branch.trunk.members.add(model)


def detach(model: PreTrainedModel) -> None:
    """The model shares nothing any more."""
    if (branch := _branches.pop(model, None)) is not None:
        branch.trunk.members.discard(model)


def branch_of(model: PreTrainedModel) -> Branch | None:
    """The model's trunk and where it is cut; None for one that shares nothing."""
    return _branches.get(model)


def trunks() -> set[Trunk]:
    """Those that models are attached to."""
    return {branch.trunk for branch in _branches.values()}


def row_keys(ids: Tensor, attention: Tensor) -> list[bytes]:
    """A hash of the tokens of each row, whatever the padding, and of the precision of the pass."""
    device = ids.device.type
    mixed = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
    table, lengths, salt = ids.cpu().numpy(), attention.sum(1).tolist(), str(mixed).encode()
    return [
        hashlib.blake2b(row[:n].tobytes(), digest_size=16, key=salt).digest()
        for row, n in zip(table, lengths, strict=True)
    ]


def on_nodes(rows: Sequence[Row], node: Tensor, lengths: Sequence[int], count: int) -> Tensor:
    """States of the first `lengths` tokens of each row at their nodes (B, T) of a tree: (1, count, d)."""
    states = rows[0].states.new_zeros(1, count, rows[0].states.shape[1])
    for row, nodes, length in zip(rows, node, lengths, strict=True):
        states[0].index_copy_(0, nodes[:length], row.states.index_select(0, row.state_index[:length]))
    return states


def padded(rows: Sequence[Row], width: int) -> Tensor:
    """States of whole rows, side by side: (B, width, d), 0 where a row has ended."""
    states = rows[0].states.new_zeros(len(rows), width, rows[0].states.shape[1])
    for i, row in enumerate(rows):
        states[i, : len(row.state_index)] = row.states.index_select(0, row.state_index)
    return states
