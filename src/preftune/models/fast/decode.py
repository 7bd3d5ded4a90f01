"""One more token for many rows: what the sampler needs of a model, without computing anything twice.

Responses to one prompt share its keys and values: the prompt goes through the network once, by tree (see
`layout`). Every step attends to the shared prompt and to the row's own tokens, in tensors allocated once. For
models that cannot be laid out as trees, `CachedDecoder` does the same with transformers' cache and a copy of
the prompt for each row.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel

from preftune.models.fast.layout import attending, grow, tree_states
from preftune.models.fast.native import FewRows, attention_kernel
from preftune.models.fast.support import lays_out_trees

NAME = "preftune_grid"  # of the attention function below, in transformers' register
_WORTH_MOVING = 0.75  # finished rows are removed when the others need at most this share of the slots


class Decoder(Protocol):
    """G prompts with k rows each, in succession; rows drop out as they finish. `node` (G, P), known after
    `start`: where in its pass each token of the right-padded prompts lies.
    """

    node: Tensor

    def start(self) -> Tensor:
        """Last hidden state of each prompt: (G, d)."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """The last hidden state of each of n rows after one more token, (n,) -> (n, d)."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Go on with these of the n rows only, given in ascending order."""
        ...


def decoder(model: PreTrainedModel, ids: Tensor, lengths: Tensor, k: int, limit: int) -> Decoder:
    """For right-padded prompts ids (G, P) of `lengths` (G,), k rows each, up to `limit` new tokens."""
    decoder_class = GridDecoder if lays_out_trees(model) else CachedDecoder
    return decoder_class(model, ids, lengths, k, limit)


class GridDecoder:
    """Rows lie on a grid of G prompts by k slots.

    prompts, new: keys and values by layer, (G, H_kv, P, D) and (G, H_kv, k, limit, D) · hidden
    (G, 1, 1, 1, P): -inf where a prompt has ended · slots (n,): where on the grid each row lies ·
    positions (n,).
    """

    def __init__(self, model: PreTrainedModel, ids: Tensor, lengths: Tensor, k: int, limit: int) -> None:
        self.model, self.ids, self.lengths, self.k, self.limit = model, ids, lengths, k, limit
        self.prompts: list[tuple[Tensor, Tensor]] = []
        self.new: list[tuple[Tensor, Tensor]] = []
        column = torch.arange(ids.shape[1], device=ids.device)
        ended = column >= lengths.view(-1, 1, 1, 1, 1)
        self.hidden = torch.zeros(ended.shape, device=ids.device).masked_fill(ended, -torch.inf)
        self.slots = torch.arange(len(ids) * k, device=ids.device)
        self.positions = lengths.repeat_interleave(k)
        self.written, self.layer = 0, 0
        self.few_rows = FewRows(model)
        # -inf where nothing is written yet; None: only what is written is read.
        self.unseen: Tensor | None = None

    def start(self) -> Tensor:
        tree, keys_values = grow(self.ids, self.lengths), []
        states = tree_states(self.model, tree, keys_values)
        for pair in keys_values:  # (1, H_kv, N, D) each
            key, value = (x[0].transpose(0, 1)[tree.node].transpose(1, 2).contiguous() for x in pair)
            self.prompts.append((key, value))
            room = (key.shape[0], key.shape[1], self.k, self.limit)
            self.new.append((key.new_empty(*room, key.shape[-1]), value.new_empty(*room, value.shape[-1])))
        self.node = tree.node
        last = tree.node.gather(1, (self.lengths - 1).unsqueeze(1)).squeeze(1)
        return states[last]

    def step(self, tokens: Tensor) -> Tensor:
        with self.few_rows(len(tokens)):
            states = self._forward(tokens)
        self.positions = self.positions + 1
        self.written += 1
        return states

    def _forward(self, tokens: Tensor) -> Tensor:
        """The last hidden states of one more token (n,) of each row: (n, d)."""
        self.layer = 0
        with attending(self.model, NAME):
            states = self.model.base_model(
                tokens.unsqueeze(1), position_ids=self.positions.unsqueeze(1), use_cache=False, grid=self
            ).last_hidden_state
        return states.squeeze(1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """One layer's attention of n rows to their prompts and to what they have written: (n, 1, H, D)."""
        (keys, values), (new_keys, new_values) = self.prompts[self.layer], self.new[self.layer]
        self.layer += 1
        attend = attention_kernel(query, keys, values) if self.unseen is None else None
        if attend is not None:
            token, written = (query, key, value), (new_keys, new_values)
            return attend(token, (keys, values), written, self.slots, self.lengths, self.written, scaling)
        width = keys.shape[2]
        new_keys, new_values = self._write(new_keys, key), self._write(new_values, value)
        queries = self._on_grid(query * scaling)  # (G, H_kv, k, H / H_kv, D)
        to_prompt = queries.flatten(2, 3) @ keys.transpose(-1, -2)
        to_prompt = to_prompt.view(*queries.shape[:-1], width) + self.hidden
        to_response = queries @ new_keys.transpose(-1, -2)
        if self.unseen is not None:
            to_response = to_response + self.unseen
        weights = torch.softmax(torch.cat([to_prompt, to_response], -1), -1)
        out = weights[..., width:] @ new_values
        out += (weights[..., :width].flatten(2, 3) @ values).view(out.shape)
        rows = out.transpose(1, 2).reshape(-1, 1, query.shape[1], out.shape[-1])  # (G · k, 1, H, D)
        return rows if len(rows) == len(query) else rows[self.slots]

    def _write(self, new: Tensor, x: Tensor) -> Tensor:
        """Write the rows' keys or values; returns all written so far: (G, H_kv, k, so far, D)."""
        new[:, :, :, self.written] = self._on_grid(x).squeeze(3)
        return new[:, :, :, : self.written + 1]

    def _on_grid(self, x: Tensor) -> Tensor:
        """(n, H, 1, D) -> (G, H_kv, k, H / H_kv, D); slots without a row hold zeros."""
        groups, heads = self.prompts[0][0].shape[:2]
        if len(x) < groups * self.k:
            x = x.new_zeros(groups * self.k, *x.shape[1:]).index_copy_(0, self.slots, x)
        return x.view(groups, self.k, heads, -1, x.shape[-1]).transpose(1, 2)

    def keep(self, rows: Tensor) -> None:
        self.slots, self.positions = self.slots[rows], self.positions[rows]
        groups, group, count = torch.unique(self.slots // self.k, return_inverse=True, return_counts=True)
        k = int(count.max())
        if len(groups) * k > _WORTH_MOVING * self.hidden.shape[0] * self.k:
            return
        rank = torch.arange(len(group), device=group.device) - (count.cumsum(0) - count)[group]
        slots = group * k + rank
        source = self.slots.new_zeros(len(groups) * k).index_copy_(0, slots, self.slots)
        self.prompts = [(key[groups], value[groups]) for key, value in self.prompts]
        self.new = [(self._moved(key, source, k), self._moved(value, source, k)) for key, value in self.new]
        self.hidden, self.lengths, self.slots, self.k = self.hidden[groups], self.lengths[groups], slots, k

    def _moved(self, new: Tensor, source: Tensor, k: int) -> Tensor:
        """Rows in slots `source` of the old grid, on a new one of k slots: (G', H_kv, k, limit, D)."""
        rows = new.transpose(1, 2)[source // self.k, source % self.k]
        return rows.view(-1, k, *rows.shape[1:]).transpose(1, 2).contiguous()


def grid_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    grid: GridDecoder | None = None,
    **_: Any,  # transformers hands every attention function all that any of them may want
) -> tuple[Tensor, None]:
    """Attention of the next token of each row: query (n, H, 1, D), key and value (n, H_kv, 1, D) ->
    (n, 1, H, D).
    """
    if grid is None or attention_mask is not None:
        raise NotImplementedError("this attention is that of a GridDecoder")
    return grid.attend(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling), None


AttentionInterface.register(NAME, grid_attention)


class CachedDecoder:
    """The same for any model: left-padded rows, a mask, and a cache that grows."""

    def __init__(self, model: PreTrainedModel, ids: Tensor, lengths: Tensor, k: int, limit: int) -> None:
        self.model, self.k = model, k
        column = torch.arange(ids.shape[1], device=ids.device)
        shift = (ids.shape[1] - lengths).unsqueeze(1)
        self.ids = ids.gather(1, (column - shift) % ids.shape[1])
        first = torch.arange(len(ids), device=ids.device).unsqueeze(1) * ids.shape[1] + shift
        self.node = (first + column).clamp(max=ids.numel() - 1)
        self.mask = (column >= shift).long()
        self.positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        # Not of the config, which may name a window that the model does not have: masks know the windows.
        self.cache = DynamicCache()

    def start(self) -> Tensor:
        states = self._forward(self.ids)
        self.cache.batch_repeat_interleave(self.k)
        self.mask = self.mask.repeat_interleave(self.k, 0)
        self.positions = self.positions[:, -1:].repeat_interleave(self.k, 0)
        return states

    def step(self, tokens: Tensor) -> Tensor:
        self.mask, self.positions = nn.functional.pad(self.mask, (0, 1), value=1), self.positions + 1
        return self._forward(tokens.unsqueeze(1))

    def keep(self, rows: Tensor) -> None:
        self.cache.batch_select_indices(rows)
        self.mask, self.positions = self.mask[rows], self.positions[rows]

    def _forward(self, ids: Tensor) -> Tensor:
        return self.model.base_model(
            ids,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
