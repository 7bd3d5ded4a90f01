"""Freezing the lower blocks of a model, and sharing them: one copy in memory, one pass for all that hold it.

What lies above the cut is found by content: the upper blocks, and whatever else moves the last hidden states
if those below are given. Whether a model may be cut is tried out once, against its plain forward.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
import weakref
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from preftune.errors import DataError, is_out_of_memory
from preftune.models.adapter import adapter_of, below_adapter
from preftune.models.fast.cut import Cut, cut_at
from preftune.models.fast.support import hidden_at, near, plain_layout, trial, undivided
from preftune.models.fast.trunk import Branch, Trunk, attach, branch_of, detach, trunks
from preftune.models.kept import KeptStates, empty, sizes, states_dir
from preftune.models.layers import blocks_of, hash_weight, token_embedding

Kept = Literal["float32", "bf16"]
# Settings in which models that share their lower blocks may differ: names, tokens, heads, versions.
_OF_ONE_MODEL = re.compile(
    r"_.*|.*token_id|architectures|vocab_size|(torch_)?dtype|transformers_version|use_cache|id2label|label2id"
    r"|num_labels|problem_type|tie_word_embeddings|output_.*|return_dict|quantization_config"
)


def share_trunk(model: PreTrainedModel, top: int) -> None:
    """Freeze all but the upper `top` blocks and what follows them; models with the same weights below then
    share them, whatever their heads, and the states of every row.

    DataError for a model that cannot be cut there, with the reason.
    """
    blocks = blocks_of(model.eval())
    try:
        if not 0 < top <= len(blocks):
            raise ValueError(f"it has {len(blocks)} blocks" if blocks else "it has no list of blocks")
        ids, lengths = trial(model)
        cut = cut_at(model, len(blocks) - top, ids)
        frozen = _below(model, cut, ids)
        new = Trunk(_digest(frozen, token_embedding(model).weight, cut), _settings(model))
        existing = next((trunk for trunk in trunks() if trunk.is_like(new)), None)
        attach(model, Branch(cut, tuple(frozen), new))
        _prove(model, ids, lengths)
    except Exception as error:  # whatever a foreign model raises
        detach(model)
        if is_out_of_memory(error):
            raise
        raise DataError(
            f"{type(model).__name__}: the upper {top} blocks cannot be trained by themselves ({error})",
            hint='set model.trainable="all", or another number of blocks',
        ) from error
    if existing is not None:
        existing.keeps, existing.disk, existing.drawn = True, None, None  # until the new stage sets them
        attach(model, Branch(cut, tuple(frozen), existing))
    for parameter in frozen.values():
        parameter.requires_grad_(False)
    tie(model)


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Set `requires_grad` on the parameters to be trained, and return them: all of a model that is not cut
    and has no adapter.
    """
    frozen = {*below_adapter(model), *below_cut(model)}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter not in frozen)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def below_cut(model: nn.Module) -> list[nn.Parameter]:
    """The weights that a model shares with others; [] for one that is trained whole."""
    if not isinstance(model, PreTrainedModel) or (branch := branch_of(model)) is None:
        return []
    return list(_frozen(model, branch).values())


def same_cut(model: PreTrainedModel, copied: PreTrainedModel) -> None:
    """Let a copy of a model share the lower blocks that the original shares."""
    if (branch := branch_of(model)) is not None:
        cut = dataclasses.replace(branch.cut, block_refs=tuple(map(weakref.ref, blocks_of(copied))))
        attach(copied, branch._replace(cut=cut))


def trunk_digest(model: nn.Module) -> str:
    """The hash of what is frozen in a model that shares it; "" for one that is trained whole."""
    if (adapter := adapter_of(model)) is not None:
        return adapter.digest
    branch = branch_of(model) if isinstance(model, PreTrainedModel) else None
    return "" if branch is None else branch.trunk.digest


alone = undivided  # no model shares anything within it, as a saved one will not


def forget_states() -> None:
    """Drop all states in memory, so that not even the last bits of what is computed next depend on what was
    computed before. (A row's last bits depend on the rows computed beside it.)
    """
    for trunk in trunks():
        trunk.forget()


def keep_states(model: PreTrainedModel, keeps: bool) -> None:
    """Set whether the states of rows that one model computed are kept for the others of its trunk."""
    if (branch := branch_of(model)) is not None:
        branch.trunk.keeps = keeps


def keep_on_disk(
    model: PreTrainedModel, tokens: int, limit: int, dtype: Kept, say: Callable[[str], None]
) -> None:
    """Keep the states of rows on disk from now on, if `tokens` of them fit into `limit` bytes; those of other
    trunks make room. What their last bits depend on is in the name of the directory.
    """
    if (branch := branch_of(model)) is None or not limit or branch.trunk.disk is not None:
        return
    numbers = np.dtype(np.float32 if dtype == "float32" else np.int16)
    need = tokens * branch.cut.width * numbers.itemsize
    if need > limit:
        say(
            f"states of {tokens:,} tokens are computed in every pass: they would take {need / 1e9:.1f} GB on "
            f"disk, and model.kept_gb allows {limit / 1e9:.1f}"
        )
        return
    about = {
        "trunk": branch.trunk.digest,
        "settings": branch.trunk.settings,
        "dtype": dtype,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": 1,  # of a row's pass, however many there are
        "device": _kind_of(next(model.parameters()).device),
    }
    directory = states_dir() / hashlib.sha256(repr(about).encode()).hexdigest()[:32]
    try:
        empty(limit - max(sizes().get(directory, 0), need), keep=directory)  # rows may be there already
        branch.trunk.disk = KeptStates(directory, branch.cut.width, numbers, limit, about)
        branch.trunk.say = say
    except OSError as error:
        say(f"warning: no states are kept in {directory}: {error.strerror}")


def _kind_of(device: torch.device) -> str:
    """What the last bits of its results depend on: the card, or what the processor can do."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"


def tie(model: PreTrainedModel) -> None:
    """Let all members on the model's device use one copy of the weights below the cut; to be called again
    when a model has moved. If one has a longer embedding (a reward model's pad token), the others use its
    first rows.
    """
    branch = branch_of(model)
    if branch is None:
        return
    device = next(model.parameters()).device
    members = [m for m in branch.trunk.members if next(m.parameters()).device == device]
    weights = [_frozen(m, branch) for m in members]
    for name in branch.frozen:
        holder = max((named[name] for named in weights), key=len)
        for named in weights:
            rows = len(named[name])
            named[name].data = holder.data if rows == len(holder) else holder.data[:rows]


def _frozen(model: PreTrainedModel, branch: Branch) -> dict[str, nn.Parameter]:
    return {name: model.base_model.get_parameter(name) for name in branch.frozen}


@torch.enable_grad()
def _below(model: PreTrainedModel, cut: Cut, ids: Tensor) -> dict[str, nn.Parameter]:
    """The parameters that do nothing above the cut, by their names in the base model: those of the lower
    blocks, of the embeddings, of what else comes before. A head tied to the embedding is frozen with it.
    """
    upper = {p for block in cut.blocks[cut.at :] for p in block.parameters()}
    named = dict(model.base_model.named_parameters())
    candidates = {name: p for name, p in named.items() if p not in upper}
    before = {p: p.requires_grad for p in candidates.values()}
    states = cut.below(lambda: model.base_model(ids, use_cache=False))
    for parameter in candidates.values():
        parameter.requires_grad_(True)
    with cut.resumed_from(states):
        out = model.base_model(ids, use_cache=False).last_hidden_state.float()
    slopes = torch.autograd.grad(out.square().sum(), list(candidates.values()), allow_unused=True)
    for parameter, required in before.items():
        parameter.requires_grad_(required)
    return {name: p for (name, p), slope in zip(candidates.items(), slopes, strict=True) if slope is None}


def _settings(model: PreTrainedModel) -> str:
    """SHA-256 over the settings that say how weights are used."""
    settings = model.config.get_text_config().to_dict()
    used_as = {key: value for key, value in settings.items() if not _OF_ONE_MODEL.fullmatch(key)}
    return hashlib.sha256(json.dumps(used_as, sort_keys=True, default=str).encode()).hexdigest()


def _digest(frozen: dict[str, nn.Parameter], embedding: Tensor, cut: Cut) -> str:
    """SHA-256 over the weights below the cut, without rows of zeros at the end of the embedding: a reward
    model's own pad token is one, and no text has it.
    """
    digest = hashlib.sha256(f"{cut.at} {[type(block).__name__ for block in cut.blocks]}".encode())
    for name, parameter in sorted(frozen.items()):
        weights = parameter.detach()
        if parameter is embedding:
            used = weights.any(1).nonzero()
            weights = weights[: int(used[-1]) + 1] if len(used) else weights
        hash_weight(digest, name, weights)
    return digest.hexdigest()


@torch.no_grad()
def _prove(model: PreTrainedModel, ids: Tensor, lengths: Tensor) -> None:
    """ValueError unless both parts together give what the undivided model gives: in both layouts, and also
    after other rows went through the lower part.
    """
    real = torch.arange(ids.shape[1], device=ids.device) < lengths.unsqueeze(1)
    with undivided(), plain_layout():
        plain = hidden_at(model, ids, real, real)
    for layout in (plain_layout(), contextlib.nullcontext()):
        with layout:
            for rows in (ids, ids.flip(1), ids):
                states = hidden_at(model, rows, real, real)
        forget_states()
        if not near(states, plain):
            raise ValueError("in two parts it gives other numbers than in one")
