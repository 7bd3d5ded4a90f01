"""Hidden states where they are read: by tree where the model allows it, else by a plain padded forward.

Whether it does is found out once for each model, on a few short rows: attention of another kind (windows,
ALiBi), or anything else by which tokens could reach their neighbours in the layout, shows in the numbers.
"""

import contextlib
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from preftune.models.fast.cut import Cut, cut_at
from preftune.models.fast.head import uncast
from preftune.models.fast.layout import NAME, attending, grow, grow_to, tree_states
from preftune.models.fast.side_by_side import side_by_side
from preftune.models.fast.switch import Switch
from preftune.models.fast.trunk import Row, branch_of, on_nodes, padded
from preftune.models.layers import token_embedding

_TOLERANCE = 2e-5  # of the largest hidden state; float32 rounding stays below a tenth of it
_allowed: weakref.WeakKeyDictionary[PreTrainedModel, bool] = weakref.WeakKeyDictionary()
_cuts: weakref.WeakKeyDictionary[PreTrainedModel, Cut] = weakref.WeakKeyDictionary()
_trees, _divided = Switch(), Switch()
plain_layout = _trees.turned_off  # padded forwards for all models
undivided = _divided.turned_off  # every model goes through whole, as one that shares nothing


def hidden_at(model: PreTrainedModel, ids: Tensor, attention: Tensor, read: Tensor) -> Tensor:
    """Last hidden states at the positions under `read` (B, T), row by row: (n, d).

    ids (B, T), attention (B, T) bool, true on the tokens of right-padded rows. By tree, what follows the last
    position that is read in a row never enters the network.
    """
    branch, by_tree = None if _divided.off else branch_of(model), lays_out_trees(model)
    if branch is None and by_tree:
        tree, nodes, _ = grow_to(ids, read)
        return tree_states(model, tree).index_select(0, nodes)
    if branch is None:
        return _plain_states(model, ids, attention)[read]
    rows = branch.trunk.rows(ids, attention, lambda *rows: rows_below(model, branch.cut, *rows))
    if not by_tree:
        with branch.cut.resumed_from(padded(rows, ids.shape[1])):
            return _plain_states(model, ids, attention)[read]
    tree, nodes, sizes = grow_to(ids, read)
    with branch.cut.resumed_from(on_nodes(rows, tree.node, sizes, tree.ids.shape[1])):
        return tree_states(model, tree).index_select(0, nodes)


def rows_below(
    model: PreTrainedModel, cut: Cut, ids: Tensor, attention: Tensor, alone: bool = False
) -> list[Row]:
    """All tokens of some rows through the blocks below the cut: in one pass, or each row `alone`."""
    by_tree = lays_out_trees(model)  # tried on first use, by passes that go on to the end
    with cut.stopping():
        if not alone:
            return _rows_below(model, cut, ids, attention)
        lengths = attention.sum(1).tolist()

        def row_alone(number: int) -> Row:
            row = slice(number, number + 1), slice(lengths[number])
            return _rows_below(model, cut, ids[row], attention[row])[0]

        # around all passes: the end of one would take the attention function from the others
        with attending(model, NAME) if by_tree else contextlib.nullcontext():
            return side_by_side(row_alone, range(len(ids)), ids.device)


def _rows_below(model: PreTrainedModel, cut: Cut, ids: Tensor, attention: Tensor) -> list[Row]:
    lengths = attention.sum(1)
    if lays_out_trees(model):
        tree = grow(ids, lengths)
        states, index = cut.caught(lambda: tree_states(model, tree)).squeeze(0), tree.node
    else:
        states = cut.caught(lambda: _plain_states(model, ids, attention)).flatten(0, 1)
        index = torch.arange(ids.numel(), device=ids.device).view_as(ids)
    return [Row(states, row[:n]) for row, n in zip(index, lengths.tolist(), strict=True)]


def states_below(model: PreTrainedModel, blocks: int, ids: Tensor, attention: Tensor, read: Tensor) -> Tensor:
    """The states after a model's first `blocks` blocks at the last position under `read` in each row, the
    first one where there is none: (B, d). What a shared trunk keeps is looked up. All (B, T), as in
    `hidden_at`; without gradient.
    """
    last = (torch.arange(1, read.shape[1] + 1, device=read.device) * read).amax(1).clamp(min=1)
    branch = None if _divided.off else branch_of(model)
    if branch is not None and branch.cut.at == blocks:
        rows = branch.trunk.rows(ids, attention, lambda *rows: rows_below(model, branch.cut, *rows))
    else:  # what follows does not matter, and is not kept
        up_to = torch.arange(ids.shape[1], device=ids.device) < last.unsqueeze(1)
        rows = rows_below(model, _cut_after(model, blocks), ids, up_to)
    ends = [row.state_index[n - 1] for row, n in zip(rows, last.tolist(), strict=True)]
    return torch.stack([row.states[end] for row, end in zip(rows, ends, strict=True)])


def _cut_after(model: PreTrainedModel, blocks: int) -> Cut:
    """The cut at which to read a model that shares no blocks up to there."""
    cut = _cuts.get(model)
    if cut is None or cut.at != blocks:
        token = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
        cut = _cuts[model] = cut_at(model, blocks, token)
    return cut


def _plain_states(model: PreTrainedModel, ids: Tensor, attention: Tensor) -> Tensor:
    """A padded forward: (B, T, d)."""
    return model.base_model(ids, attention_mask=attention.long(), use_cache=False).last_hidden_state


def scatter_masked(values: Tensor, mask: Tensor) -> Tensor:
    """Values (n,) at the columns under the mask: (B, T), 0 elsewhere. The inverse of `gather_masked`. No
    shape depends on the mask's content, forwards or backwards, since that would make the host wait for a GPU.
    """
    rank = (mask.flatten().cumsum(0) - 1).clamp(min=0)
    back = torch.nn.functional.pad(values, (0, 1)).index_select(0, rank)
    return torch.where(mask, back.view(mask.shape), 0)


def gather_masked(mask: Tensor, values: Tensor, count: int) -> Tensor:
    """values[mask], (count,), for a mask that is known to be true `count` times: so nothing waits for a GPU.
    RuntimeError if it is not; on a GPU at its next synchronisation.
    """
    chosen = mask.flatten()
    if mask.device.type != "mps":
        torch.ops.aten._assert_async.msg(chosen.sum() == count, "column 0 of a batch cannot be a response")
    rank = torch.where(chosen, chosen.cumsum(0) - 1, count)
    return values.new_zeros(count + 1).scatter_(0, rank, values.flatten())[:count]


def lays_out_trees(model: PreTrainedModel) -> bool:
    """Whether the model's forward passes go by tree here and now."""
    return not _trees.off and takes_trees(model)


def takes_trees(model: PreTrainedModel) -> bool:
    """Whether the model's hidden states are the same by tree and by a plain forward; tried on first use."""
    if model not in _allowed:
        _allowed[model] = _full_attention(model) and _same_states(model)
    return _allowed[model]


def same_layout(model: PreTrainedModel, copied: PreTrainedModel) -> None:
    """Let a copy of a model go by tree if the original does: it has no weights yet to try it with."""
    _allowed[copied] = takes_trees(model)


def _full_attention(model: PreTrainedModel) -> bool:
    """Whether no layer has a window: short rows would not show it."""
    config = model.config.to_dict()
    kinds = set(config.get("layer_types") or ["full_attention"])
    return kinds == {"full_attention"} and not config.get("sliding_window")


@torch.no_grad()
def _same_states(model: PreTrainedModel) -> bool:
    device = next(model.parameters()).device
    try:
        with uncast(device), _all_digits():
            ids, lengths = trial(model)
            real = torch.arange(ids.shape[1], device=device) < lengths.unsqueeze(1)
            plain = _plain_states(model, ids, real)[real]
            tree = grow(ids, lengths)
            by_tree = tree_states(model, tree)[tree.node[real]]
    except torch.OutOfMemoryError:  # says nothing about the model
        raise
    except Exception:  # a model does something that trees do not support: it keeps its plain forward
        return False
    return near(by_tree, plain)


@contextlib.contextmanager
def _all_digits() -> Iterator[None]:
    """Products in whole float32: with TF32's ten bits a tree differs from a plain forward by 4e-4."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def near(states: Tensor, plain: Tensor) -> bool:
    """Whether states are those of a plain forward, to rounding."""
    return bool((states - plain).abs().max() <= _TOLERANCE * plain.abs().max())


def trial(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Rows that share prefixes of several lengths; one that is a prefix of another, one that shares none: ids
    and lengths, where the model is.
    """
    vocabulary, device = token_embedding(model).num_embeddings, next(model.parameters()).device
    ids = torch.randint(0, vocabulary, (6, 12), generator=torch.Generator().manual_seed(0))
    ids[1, :5], ids[2, :7], ids[3] = ids[0, :5], ids[1, :7], ids[0]
    return ids.to(device), torch.tensor([12, 12, 9, 8, 3, 10], device=device)
