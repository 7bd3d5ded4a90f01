"""Rows laid out as a tree, so that no token is computed twice and none is padding.

A batch of pairs or groups repeats every prompt, and ragged rows are half padding. Here each distinct prefix
of the rows is one node; all nodes go through the network side by side as one row of N tokens with position
ids. Only attention needs to know which token belongs to which row: it gathers queries, keys and values of
whole rows, in lanes of rows of about one length, runs plain causal attention on them, and takes each node's
output from one of the rows that contain it. Shared prefixes are found by content.

Exact up to rounding wherever attention goes through transformers' AttentionInterface and nothing else mixes
positions; `support.takes_trees` tries this for each model, and `plain_layout` switches all of this off.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.activations import GELUTanh, NewGELUActivation

NAME = "preftune_tree"  # of the attention function below, in transformers' register
_SAME_LENGTH = 0.75  # a shorter row than this share of the longest gets a lane of its own


@dataclass(frozen=True, slots=True)
class Lane:
    """Rows of about one length, as attention sees them: their nodes, row by row, (rows · width,)."""

    rows: int
    nodes: Tensor


@dataclass(frozen=True, slots=True)
class Tree:
    """N nodes, each a distinct prefix of some row.

    ids, positions (1, N) · node (B, T): the node of each token of the batch, 0 where there is none · lanes ·
    lane_index (N,): where each node lies in the lanes' outputs, one lane after the other.
    """

    ids: Tensor
    positions: Tensor
    node: Tensor
    lanes: tuple[Lane, ...]
    lane_index: Tensor


def grow(ids: Tensor, lengths: Tensor) -> Tree:
    """The tree of the first `lengths` (B,) tokens of each row of ids (B, T)."""
    packed = torch.cat([ids, lengths.unsqueeze(1)], 1).cpu().numpy()  # a device is waited for once
    return _grown(packed[:, :-1], packed[:, -1].tolist(), ids.device)[0]


def grow_to(ids: Tensor, read: Tensor) -> tuple[Tree, Tensor, list[int]]:
    """The tree of each row up to the last position under `read` (B, T), the nodes (n,) of what is read in the
    order of rows, and how many tokens of each row it holds.
    """
    packed = torch.where(read, ~ids, ids).cpu().numpy()  # ids are never negative: both in one transfer
    is_read = packed < 0
    sizes = (is_read * np.arange(1, ids.shape[1] + 1)).max(1, initial=0).tolist()
    return _grown(np.where(is_read, ~packed, packed), sizes, ids.device, is_read)


def _grown(
    table: np.ndarray, sizes: list[int], device: torch.device, is_read: np.ndarray | None = None
) -> tuple[Tree, Tensor, list[int]]:
    """Tree, nodes under `is_read` and sizes.

    In lexicographic order a row has with the row before it at least as many tokens in common as with any
    earlier one.
    """
    if not any(sizes):
        sizes = [1, *sizes[1:]]  # a network needs one token
    node = np.zeros(table.shape, dtype=np.int64)
    sorted_rows = sorted(range(len(sizes)), key=lambda i: _sort_key(table[i, : sizes[i]]))
    fresh: dict[int, int] = {}  # row -> the first column that is not shared; none for a row that adds nothing
    tokens, columns, count, before = [], [], 0, sorted_rows[0]
    for i in sorted_rows:
        shared = _common(table[i, : sizes[i]], table[before, : sizes[before]]) if count else 0
        node[i, :shared] = node[before, :shared]
        if shared < sizes[i]:
            new = sizes[i] - shared
            node[i, shared : sizes[i]] = np.arange(count, count + new)
            tokens.append(table[i, shared : sizes[i]])
            columns.append(np.arange(shared, sizes[i]))
            fresh[i], count = shared, count + new
        before = i
    lane_nodes, lane_index = _lanes(node, sizes, fresh, count)
    chosen = node[is_read] if is_read is not None else node[:0, 0]
    arrays = [np.concatenate(tokens)[None], np.concatenate(columns)[None], node, lane_index, chosen]
    tensors = _on(device, [*arrays, *(nodes for _, nodes in lane_nodes)])
    flat_ids, positions, node_of, index, chosen_nodes = tensors[: len(arrays)]
    lanes = tuple(Lane(rows, at) for (rows, _), at in zip(lane_nodes, tensors[len(arrays) :], strict=True))
    return Tree(flat_ids, positions, node_of, lanes, index), chosen_nodes, sizes


def _sort_key(ids: np.ndarray) -> bytes:
    """Bytes that sort as the ids do, one comparison for the whole row.

    The most significant byte stands first (big-endian), and ids are never negative: the first byte in which
    two rows differ then decides as the first token does.
    """
    return ids.astype(">i8").tobytes()


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """The length of the common prefix."""
    length = min(len(a), len(b))
    differ = a[:length] != b[:length]
    return int(differ.argmax()) if differ.any() else length


def _lanes(
    node: np.ndarray, sizes: list[int], fresh: dict[int, int], count: int
) -> tuple[list[tuple[int, np.ndarray]], np.ndarray]:
    """Rows sorted by length and cut into lanes, (rows, nodes) each; and `Tree.lane_index`."""
    groups: list[list[int]] = []
    for i in sorted(fresh, key=lambda i: -sizes[i]):
        if not groups or sizes[i] < _SAME_LENGTH * sizes[groups[-1][0]]:
            groups.append([])
        groups[-1].append(i)
    lanes, lane_index, start = [], np.zeros(count, dtype=np.int64), 0
    for rows in groups:
        width = sizes[rows[0]]
        for i in rows:
            lane_index[node[i, fresh[i] : sizes[i]]] = np.arange(start + fresh[i], start + sizes[i])
            start += width
        lanes.append((len(rows), node[rows, :width].reshape(-1)))
    return lanes, lane_index


def _on(device: torch.device, arrays: list[np.ndarray]) -> list[Tensor]:
    """Whole numbers on the device, moved in one transfer that does not wait for a GPU."""
    if device.type == "cpu":
        return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    flat = torch.from_numpy(np.concatenate([array.reshape(-1) for array in arrays]))
    flat = flat.pin_memory() if device.type == "cuda" else flat
    chunks = flat.to(device, non_blocking=device.type == "cuda").split([array.size for array in arrays])
    return [chunk.view(array.shape) for chunk, array in zip(chunks, arrays, strict=True)]


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    tree: Tree | None = None,
    keys_values: list[tuple[Tensor, Tensor]] | None = None,
    sliding_window: int | None = None,
    **_: Any,  # transformers hands every attention function all that any of them may want
) -> tuple[Tensor, None]:
    """Causal attention within the rows of a tree: query (1, H, N, D), key and value (1, H_kv, N, D) ->
    (1, N, H, D).

    Padding stands at the right of a lane's rows, so that causality alone hides it. Raises NotImplementedError
    where the model asks for more than that.
    """
    if tree is None or attention_mask is not None or sliding_window is not None:
        raise NotImplementedError("this attention is causal and without a window, over a tree")
    if keys_values is not None:
        keys_values.append((key, value))
    repeats = query.shape[1] // key.shape[1]
    flat = [(x[0].transpose(0, 1).flatten(1), x.shape) for x in (query, key, value)]  # (N, H · D) each
    outputs = []
    for lane in tree.lanes:
        q, k, v = (
            x.index_select(0, lane.nodes).view(lane.rows, -1, heads, width).transpose(1, 2)
            for x, (_, heads, _, width) in flat
        )
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
        outputs.append(out.transpose(1, 2).flatten(0, 1).flatten(1))  # (rows · width, H · D)
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return joined.index_select(0, tree.lane_index).view(1, query.shape[2], query.shape[1], -1), None


AttentionInterface.register(NAME, tree_attention)


def fuse_activations(model: PreTrainedModel) -> PreTrainedModel:
    """Put one kernel in the place of the eight that "gelu_new" takes; the same function up to rounding.

    The config keeps its name for it. Changes the model in place and returns it.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is NewGELUActivation:
                module.register_module(name, GELUTanh())
    return model


def tree_states(
    model: PreTrainedModel, tree: Tree, keys_values: list[tuple[Tensor, Tensor]] | None = None
) -> Tensor:
    """Last hidden states of all nodes: (N, d). Each layer's keys and values are added to `keys_values`."""
    with attending(model, NAME):
        states = model.base_model(
            tree.ids, position_ids=tree.positions, use_cache=False, tree=tree, keys_values=keys_values
        ).last_hidden_state
    return states.squeeze(0)


@contextlib.contextmanager
def attending(model: PreTrainedModel, name: str) -> Iterator[None]:
    """The model's layers look their attention function up by the name in its config. Nothing here is padding:
    without its id there, no device is waited for to warn of it.
    """
    config = model.config
    usual = config._attn_implementation, config.pad_token_id
    config._attn_implementation, config.pad_token_id = name, None
    try:
        yield
    finally:
        config._attn_implementation, config.pad_token_id = usual
