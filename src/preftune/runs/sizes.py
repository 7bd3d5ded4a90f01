"""How large the stages of a run are that train a part of their model: counted without weights."""

import math
import os
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, PreTrainedModel

from preftune.algorithms import ALGORITHMS
from preftune.config import RunConfig
from preftune.config.trainable import ALL, LORA, top_blocks
from preftune.data import Dataset
from preftune.models.adapter import linear_layers
from preftune.models.layers import blocks_of, token_embedding
from preftune.models.locate import Source
from preftune.models.quantised import BITS
from preftune.runs.lengths import longest, mean_lengths
from preftune.runs.sources import learners_rows

_BYTES = 4  # of a float32
_STATES = 3  # gradient and Adam's two moments of a trained weight


def sizes(
    config: RunConfig, base: Source | None, stages: Sequence[str], dataset: Dataset | None = None
) -> Iterator[str]:
    """For each stage that freezes a part: parameters trained, and memory for weights and Adam; tokens through
    what is frozen and what is not, at the lengths of `dataset`, or the longest that the settings allow.
    """
    trainable = {name: config.trainable_of(name) for name in stages if config.stage[name].makes == "model"}
    if {*trainable.values()} <= {ALL}:
        return
    model = _outline(config, base)
    if model is None:
        yield f"trainable: sizes are not known before {config.model.base} has been read"
        return
    total, blocks = sum(p.numel() for p in model.parameters()), blocks_of(model)
    for name, choice in trainable.items():
        if choice == LORA:
            yield f"{name}: {_adapters(model, config, name)}"
        if (top := top_blocks(choice)) is None:
            continue
        kind, judges = ALGORITHMS[config.stage[name].algorithm], judge_models(config, name)
        below = _below(model, top)
        roles, trained = len(kind.needs) + judges, len(kind.trains)
        weights, states = below + roles * (total - below), trained * _STATES * (total - below)
        yield (
            f"{name}: trains the upper {top} of {len(blocks)} blocks, {_millions(total - below)} of "
            f"{_millions(total)} parameters; about {_mb(weights)} of weights for {roles} "
            f"{'model' if roles == 1 else 'models'}, "
            f"{_mb(states)} for gradients and Adam (all: {_mb(roles * total)} and "
            f"{_mb(trained * _STATES * total)})"
        )
        yield f"{name}: {_tokens(config, name, model.config.get_text_config().hidden_size, dataset)}"


def judge_models(config: RunConfig, name: str) -> int:
    """How many models score the replies of a stage: for an implicit reward a policy and its reference."""
    judge = config.stage[name].scored_by
    if judge not in config.stage:
        return int(judge is not None)
    stage = config.stage[judge]
    return stage.models if stage.implicit_beta() is None else 2


def _tokens(config: RunConfig, name: str, width: int, dataset: Dataset | None) -> str:
    """Tokens through the frozen blocks of a stage and through those above, sampling apart, and the disk that
    the states of fixed rows take. Of unknown rows: for each thousand.
    """
    stage, kind = config.stage[name], ALGORITHMS[config.stage[name].algorithm]
    data = None if dataset is None else dataset.of(stage.data)
    exact = data is not None and data.kind == "pairs" and _reads_at_once(config)
    read = [] if data is None else learners_rows(data.rows_for(stage.batch), stage, name)
    lengths = mean_lengths(config, data, [*chain(*read)]) if data is not None and exact else longest(config)
    counts = [len(rows) for rows in read] or _counts(config, name, dataset)
    planned = sum(map(stage.rows_planned, counts)) or math.inf
    rows = planned if planned < math.inf else 1000.0 * stage.epochs
    trained = rows * stage.tokens_per_row(*lengths)
    if stage.batch == "unpaired" and (data is None or data.kind == "pairs"):
        trained *= 2  # mismatched rows are about as many again; a labelled reply counts as two rows anyway
    once, note = trained / stage.epochs, ""
    if stage.online:
        above = once * (len(kind.needs) + judge_models(config, name)) + trained * len(kind.trains)
    else:
        models = stage.models // len(counts)  # that learn from each row
        above = trained * len(kind.needs) * models
        disk = once * width * (4 if config.model.kept_dtype == "float32" else 2) / 1e9
        note = f"; their states take {disk:.2g} GB on disk"
        if disk > config.model.kept_gb:
            once, note = trained * models, f"{note}, more than model.kept_gb: none are kept"
    return (
        f"{'about' if exact else 'at most'} {once:,.0f} tokens through the frozen blocks{note}; {above:,.0f} "
        f"through those above{'' if planned < math.inf else ' (for 1,000 rows)'}"
    )


def _counts(config: RunConfig, name: str, dataset: Dataset | None) -> list[int]:
    """Rows that each of a stage's `learners` can take: of a collecting stage as many as it makes at most; 0
    if that is unknown.
    """
    stage = config.stage[name]
    data = None if dataset is None else dataset.of(stage.data)
    if data is not None:
        return [len(rows) for rows in learners_rows(data.rows_for(stage.batch), stage, name)]
    maker = stage.data if stage.data in config.stage else None
    n_rows = 0 if maker is None else config.stage[maker].rows_made(sum(_counts(config, maker, dataset)))
    return stage.shares(n_rows)


def _reads_at_once(config: RunConfig) -> bool:
    """Whether there is a tokenizer already: learning one takes a while."""
    return config.model.scratch is None or config.is_world


def _adapters(model: PreTrainedModel, config: RunConfig, stage: str) -> str:
    """What a stage with adapters trains: r · (in + out) numbers in each layer."""
    layers, rank = linear_layers(model), config.model.lora.rank
    total = sum(p.numel() for p in model.parameters())
    weights = [layer.get_parameter("weight") for layer in layers.values()]
    numbers, frozen = rank * sum(sum(weight.shape) for weight in weights), sum(w.numel() for w in weights)
    four = f"; {frozen:,} frozen weights in NF4, {BITS:.2f} bits each, {_mb(frozen * BITS / 32)} instead of "
    trained = len(ALGORITHMS[config.stage[stage].algorithm].trains)
    experts = sum(p.numel() for p in model.base_model.parameters() if p.ndim > 2)  # held in stacks
    return (
        f"trains adapters of rank {rank} in {len(layers)} linear layers, {numbers:,} of "
        f"{total:,} parameters; about {_mb(trained * _STATES * numbers)} for gradients and Adam (all: "
        f"{_mb(trained * _STATES * total)}); what roles have in common is one copy"
        f"{f'{four}{_mb(frozen)}' if config.model.lora.quantize != 'none' else ''}"
        f"{f'; the {experts:,} weights of its experts get none, and stay as they are' if experts else ''}"
    )


def _outline(config: RunConfig, base: Source | None) -> PreTrainedModel | None:
    """The base model without memory for its weights; None if its config is not available locally."""
    if (scratch := config.model.scratch) is not None:
        shape = GPT2Config(
            vocab_size=scratch.vocab_size,
            n_layer=scratch.layers,
            n_embd=scratch.width,
            n_head=scratch.heads,
            n_positions=scratch.positions,
            bos_token_id=0,
            eos_token_id=0,
        )
    else:
        directory = Path(os.path.expanduser(config.model.base)) if base is None else Path(base.path)
        if not (directory / "config.json").is_file():
            return None
        shape = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(shape)


def _below(model: PreTrainedModel, top: int) -> int:
    """Parameters of the blocks and tables of vectors that are frozen."""
    blocks = blocks_of(model)
    frozen = [*blocks[: max(len(blocks) - top, 0)], token_embedding(model)]
    tables = [m for m in model.base_model.modules() if isinstance(m, torch.nn.Embedding)]
    return sum(p.numel() for p in {p for module in (*frozen, *tables) for p in module.parameters()})


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M"


def _mb(count: float) -> str:
    return f"{_BYTES * count / 1e6:,.0f} MB"
