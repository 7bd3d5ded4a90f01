"""Token batches. The only place that pads.

Alignment: every per-token tensor is (B, T) and entry t is about token t of `ids`. Masks come from lengths,
never from `ids != pad`, since GPT-2's pad is its EOS.
"""

import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor


class Rows:
    """A dataclass whose fields hold B rows each. Indexing takes some of them, and cuts (B, T) tensors to the
    longest sequence that is left.
    """

    __slots__ = ()

    def __len__(self) -> int:
        return len(self._first)

    def __getitem__(self, rows: slice | Tensor) -> Self:
        first = self._first[rows]
        width = first.ids.shape[1] if isinstance(first, Sequences) else None

        def cut(value: object) -> object:
            if isinstance(value, Rows):
                return first if value is self._first else value[rows]
            if isinstance(value, dict):
                return {name: numbers[rows] for name, numbers in value.items()}
            if isinstance(value, tuple) and isinstance(rows, slice):
                return value[rows]
            if not isinstance(value, Tensor):
                return value
            return value[rows][:, :width] if value.dim() == 2 else value[rows]

        return self._map_fields(cut)

    def to(self, device: torch.device | str) -> Self:
        return self.map_tensors(lambda tensor: tensor.to(device))

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same with every tensor changed, in the order of the fields."""

        def map_field(value: object) -> object:
            if isinstance(value, dict):
                return {name: change(numbers) for name, numbers in value.items()}
            if isinstance(value, Rows):
                return value.map_tensors(change)
            return change(value) if isinstance(value, Tensor) else value

        return self._map_fields(map_field)

    @property
    def _first(self) -> Any:
        record: Any = self
        return getattr(self, fields(record)[0].name)

    def _map_fields(self, change: Callable[[object], object]) -> Self:
        record: Any = self
        return type(record)(**{f.name: change(getattr(self, f.name)) for f in fields(record)})


@dataclass(frozen=True, slots=True)
class Sequences(Rows):
    """Right-padded token rows.

    ids (B, T) int64 · attention (B, T) bool, true on real tokens · response (B, T) bool, true on tokens that
    the policy wrote (EOS included). Column 0 is never a response.
    """

    ids: Tensor
    attention: Tensor
    response: Tensor

    def __getitem__(self, rows: slice | Tensor) -> "Sequences":
        """The given rows, cut to the longest of them."""
        attention = self.attention[rows]
        width = max(int(attention.sum(1).max()), 1) if len(attention) else 1
        return Sequences(self.ids[rows][:, :width], attention[:, :width], self.response[rows][:, :width])


@dataclass(frozen=True, slots=True)
class Pairs(Rows):
    """Two batches that share their prompts row by row."""

    chosen: Sequences
    rejected: Sequences


@dataclass(frozen=True, slots=True)
class Unpaired(Rows):
    """Responses with a label, desirable bool (B,), and as many mismatched ones: in `mismatched`, prompt i is
    followed by the response before it in the global batch. They are made before the batch is shared among
    processes, so that the number of processes changes nothing.
    """

    sequences: Sequences
    desirable: Tensor
    mismatched: Sequences


@dataclass(frozen=True, slots=True)
class Prompts(Rows):
    """Left-padded prompts for sampling; some of them are taken by a slice.

    ids (B, P) int64 · attention (B, P) bool · seeds: one per prompt, from (run seed, stage, step, place), so
    that a response depends on nothing else, not on its neighbours in the batch nor on the process that
    samples it · rows: which data row each prompt comes from, for reward functions; none for prompts from
    elsewhere.
    """

    ids: Tensor
    attention: Tensor
    seeds: tuple[int, ...]
    rows: tuple[int, ...] = ()


def real_tokens(batch: Sequences | Pairs | Unpaired | Prompts) -> int:
    """How many tokens of a batch are not padding."""
    match batch:
        case Pairs():
            return real_tokens(batch.chosen) + real_tokens(batch.rejected)
        case Unpaired():
            return real_tokens(batch.sequences) + real_tokens(batch.mismatched)
        case _:
            return int(batch.attention.sum())


@dataclass(frozen=True, slots=True)
class PairIds:
    """The token ids of one pair, in arrays of four bytes an id, so that those of a whole data set fit in
    memory.
    """

    prompt: Sequence[int]
    chosen: Sequence[int]
    rejected: Sequence[int]

    @property
    def tokens(self) -> int:
        """Tokens of its two rows, each the prompt with one response."""
        return 2 * len(self.prompt) + len(self.chosen) + len(self.rejected)


def compact(ids: Sequence[int]) -> "array[int]":
    """The same ids in an array of four bytes each; a list takes up to 36."""
    return array("i", ids)


def concatenate(first: Sequences, second: Sequences) -> Sequences:
    """Stack two batches row-wise, padded to the wider of them."""
    width = max(first.ids.shape[1], second.ids.shape[1])

    def widened(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, width - x.shape[1]))

    return Sequences(
        *(torch.cat([widened(getattr(b, f.name)) for b in (first, second)]) for f in fields(Sequences))
    )


def content_keys(sequences: Sequences) -> list[bytes]:
    """A hash of each row's tokens and of which of them are the response, whatever the padding."""
    table, rows = torch.where(sequences.response, ~sequences.ids, sequences.ids).cpu().numpy(), []
    for ids, length in zip(table, sequences.attention.sum(1).tolist(), strict=True):
        rows.append(hashlib.sha256(ids[:length].tobytes()).digest())
    return rows


def pad_sequences(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int
) -> Sequences:
    """Join prompt and response ids row by row and pad on the right with `pad_id`: any id, since only masks
    count.
    """
    rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    width = max(map(len, rows), default=1)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    column = torch.arange(width)
    lengths = torch.tensor([len(row) for row in rows]).unsqueeze(1)
    starts = torch.tensor([len(p) for p in prompts]).clamp(min=1).unsqueeze(1)  # column 0 has no prediction
    attention = column < lengths
    return Sequences(ids, attention, attention & (column >= starts))


def pad_pairs(pairs: Sequence[PairIds], pad_id: int) -> Pairs:
    """A batch of encoded pairs, (B, T) each."""
    prompts = [pair.prompt for pair in pairs]
    return Pairs(
        pad_sequences(prompts, [pair.chosen for pair in pairs], pad_id),
        pad_sequences(prompts, [pair.rejected for pair in pairs], pad_id),
    )


def pad_unpaired(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    desirable: Sequence[bool],
    pad_id: int,
    longest: int | None = None,
) -> Unpaired:
    """Labelled responses. If a prompt with its mismatched response is longer than `longest`, the prompt loses
    its beginning.

    Two successive rows should not have the same prompt: the mismatched response would then answer it.
    """
    shifted = [*responses[-1:], *responses[:-1]]
    room = [longest - len(r) if longest else len(p) for p, r in zip(prompts, shifted, strict=True)]
    cut = [prompt[-max(size, 1) :] for prompt, size in zip(prompts, room, strict=True)]
    return Unpaired(
        pad_sequences(prompts, responses, pad_id),
        torch.tensor(desirable, dtype=torch.bool),
        pad_sequences(cut, shifted, pad_id),
    )


def unpaired(pairs: Sequence[PairIds], pad_id: int, longest: int | None = None) -> Unpaired:
    """Two labelled responses of each pair, (2 B, T): all chosen ones, then all rejected ones, so that the
    two of a pair are no neighbours.
    """
    prompts = [pair.prompt for pair in pairs] * 2
    responses = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    labels = [True] * len(pairs) + [False] * len(pairs)
    return pad_unpaired(prompts, responses, labels, pad_id, longest)


def pad_prompts(
    prompts: Sequence[Sequence[int]], seeds: Sequence[int], pad_id: int, rows: Sequence[int] = ()
) -> Prompts:
    """Pad on the left, for the sampler only."""
    width = max(map(len, prompts), default=1)
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.long)
    attention = torch.zeros((len(prompts), width), dtype=torch.bool)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor([*prompt], dtype=torch.long)
        attention[i, width - len(prompt) :] = True
    return Prompts(ids, attention, tuple(seeds), tuple(rows))
