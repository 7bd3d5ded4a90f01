"""`preftune plan`: what a run would take, from two steps of every stage.

The stages are carried out with their own sizes of batches and models, two steps each, in a directory that is
thrown away. The first step of a stage warms it up; the second is the pace. Models have hardly learnt anything
by then: replies of a base that is trained from scratch are as long as they may be, so that the time of stages
that sample is an upper bound there.
"""

import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from preftune.algorithms import ALGORITHMS
from preftune.config import RunConfig, stage_order
from preftune.config.trainable import ALL
from preftune.data import Dataset
from preftune.data.dataset import SPLIT_NAMES
from preftune.models.load import context_length, declared_ends, load_tokenizer
from preftune.models.locate import Source
from preftune.rundir import BASE, RunDir, read_jsonl, read_object
from preftune.runs.console import Console
from preftune.runs.feed import make_feed
from preftune.runs.lock import held
from preftune.runs.plan import data_lines, power
from preftune.runs.runner import open_session, train_stages
from preftune.runs.session import Session

STEPS = 2  # of every stage
_NEVER = 10**9  # steps between checkpoints
_STATES = 3  # a trained weight and Adam's two moments of it, in a checkpoint; in memory a gradient, too
_MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """A stage: the rows it uses and those it leaves out by reason, its steps, and what it would take."""

    name: str
    steps: int
    seconds: float
    memory_mb: float | None  # at most, of the process up to its end
    disk: float  # bytes, of its model and its checkpoints at their most
    trained: float = 0.0  # bytes of the peak: weights that are trained, their gradients and Adam's moments
    read: float = 0.0  # bytes of the peak: weights that are only read
    rows: int | None = None
    tokens: float | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)


def planned(config: RunConfig, dataset: Dataset, base: Source | None) -> Iterator[str]:
    """The plan in lines, as text."""
    costs = list(probe(config, dataset, base))
    yield f"plan of {config.name}, from {STEPS} steps of every stage on this machine"
    for split in SPLIT_NAMES:
        yield f"data: {len(getattr(dataset, split)):,} {split} rows"
    yield from (f"data: {line}" for line in data_lines(dataset.report))
    names = max(len(cost.name) for cost in costs)
    for cost in costs:
        rows = f"{cost.rows:,} rows, " if cost.rows is not None else ""
        tokens = f", {cost.tokens:,.0f} tokens" if cost.tokens else ""
        memory = f", peak memory {cost.memory_mb:,.0f} MiB{_by_part(cost)}" if cost.memory_mb else ""
        size = f", disk {cost.disk / _MIB:,.1f} MiB"
        yield f"{cost.name:<{names}}  {rows}{cost.steps:,} steps{tokens}: {_time(cost.seconds)}{memory}{size}"
        yield from (f"{'':<{names}}  {n:,} rows left out: {why}" for why, n in cost.left_out.items())
    sampled = [cost.name for cost in costs if cost.name != BASE and config.stage[cost.name].online]
    bound = f" (at most: {', '.join(sampled)} sample from an untrained base here)"
    whole = sum(cost.seconds for cost in costs)
    yield f"training: {_time(whole)}{bound if config.model.scratch and sampled else ''}, then the evaluation"
    yield f"evaluation: {power(config, dataset)}"
    yield from fits(costs, config, memory=_memory(), disk=shutil.disk_usage(Path.cwd()).free)


def probe(config: RunConfig, dataset: Dataset, base: Source | None) -> Iterator[Cost]:
    """What each stage takes. Raises what a run would raise, before it."""
    with tempfile.TemporaryDirectory(prefix="preftune-plan-") as place:
        run, quiet = RunDir(place), Console(quiet=True)
        names = stage_order(config.stage)
        with held(run):
            session = open_session(shortened(config), dataset, run, quiet, base=base)
            train_stages(session, names)
            full = Session(config=config, dataset=dataset, run=run, console=quiet, located=base)
            yield from (_cost(full, name) for name in [*full.scratch, *names])


def shortened(config: RunConfig) -> RunConfig:
    """The same run with two steps a stage, of the same size, and no checkpoint before their end."""
    stages: dict[str, Any] = {}
    for name, stage in config.stage.items():
        if stage.makes == "data":
            stages[name] = stage.model_copy(update={"rows": STEPS * stage.batch_size})
        else:
            stages[name] = stage.consuming(STEPS * stage.rows_per_step, _NEVER)
    scratch = config.model.scratch
    model = config.model.model_copy(
        update={"scratch": scratch and scratch.model_copy(update={"steps": STEPS})}
    )
    checkpoint = config.checkpoint.model_copy(update={"every": _NEVER, "best": False})
    return config.model_copy(
        update={"stage": stages, "model": model, "checkpoint": checkpoint, "track": None}
    )


def _cost(full: Session, name: str) -> Cost:
    """Of a stage whose two steps are done: `full` has the settings that were asked for."""
    run = full.run
    record, rows = read_object(run.stage_json(name)), read_jsonl(run.metrics(name))
    pace = float(rows[-1]["step_seconds"])
    around = max(float(record["seconds"]) - sum(float(row["step_seconds"]) for row in rows), 0.0)
    model = _size(full.stage(name).model_dir(run), "*")
    found: dict[str, Any] = {"name": name, "memory_mb": record.get("peak_memory_mb"), **_parts(full, name)}
    if name == BASE:
        scratch = full.config.model.scratch
        steps = scratch.steps if scratch is not None else 0
        return Cost(steps=steps, seconds=around + pace * steps, disk=_disk(full, model, 1), **found)
    config = full.config.stage[name]
    if config.makes == "data":
        count = len(full.training_rows(stage=name))
        steps = config.steps_on(count)
        return Cost(steps=steps, rows=count, seconds=around + pace * steps, disk=model, **found)
    began, source = time.monotonic(), full.source(config.init)
    encoder = full.encoder_of(
        load_tokenizer(source), context_length(source), config.new_tokens, declared_ends(source)
    )
    feed = make_feed(full, name, encoder)
    encoding = time.monotonic() - began
    return Cost(
        steps=feed.steps,
        rows=len(feed.rows),
        tokens=feed.tokens or None,
        left_out=feed.rejected,
        seconds=around + encoding + pace * feed.steps,
        disk=_disk(full, model, len(ALGORITHMS[config.algorithm].trains)),
        **found,
    )


def _size(place: Path, pattern: str) -> int:
    return sum(file.stat().st_size for file in place.rglob(pattern) if file.is_file())


def _parts(full: Session, name: str) -> dict[str, int]:
    """Bytes of weights that a stage holds, where it trains all of one model: its own with gradients and
    moments, and those of the roles and judges that are only read.
    """
    weights = _size(full.stage(name).model_dir(full.run), "*.safetensors")
    if name == BASE:
        return {"trained": (_STATES + 1) * weights}
    config = full.config.stage[name]
    if config.makes == "data" or config.models > 1 or full.config.trainable_of(name) != ALL:
        return {}
    roles, judge = ALGORITHMS[config.algorithm], full.config.stage.get(config.scored_by or "")
    judges = judge.models if judge else int(config.scored_by is not None)
    others = len(roles.needs) - len(roles.trains) + judges
    return {"trained": (_STATES + 1) * len(roles.trains) * weights, "read": others * weights}


def _by_part(cost: Cost) -> str:
    """Of the peak, where all of a model is trained: the rest is activations, copies and libraries."""
    parts = [size / _MIB for size in (cost.trained, cost.read)]
    if not cost.trained or cost.memory_mb is None:
        return ""
    return (
        f" ({parts[0]:,.1f} trained, {parts[1]:,.1f} read, {max(cost.memory_mb - sum(parts), 0):,.0f} else)"
    )


def _disk(full: Session, model: int, trained: int) -> float:
    """The model, and its checkpoints at their most: those that are kept and the one that is written."""
    return model * (1 + _STATES * trained * (full.config.checkpoint.keep + 1))


def fits(costs: Sequence[Cost], config: RunConfig, *, memory: float | None, disk: float) -> Iterator[str]:
    """Whether there is room, by the stage that needs most; if not, which setting to turn. `memory` in MiB and
    `disk` in bytes are what is free.
    """
    largest = max(costs, key=lambda cost: cost.memory_mb or 0.0)
    need = largest.memory_mb or 0.0
    if memory is not None and need > memory:
        of = "model.scratch" if largest.name == BASE else f"stage.{largest.name}"
        yield (
            f"does not fit: {largest.name} needs {need:,.0f} MiB of memory and {memory:,.0f} are free; lower "
            f"{of}.microbatch_size, or train less of the model: model.trainable=lora (docs/memory.md)"
        )
    elif memory is not None:
        yield f"memory: {need:,.0f} MiB at most, in {largest.name}, of {memory:,.0f} that are free"
    models = sum(cost.disk for cost in costs)
    if models > disk:
        yield (
            f"does not fit: {models / _MIB:,.0f} MiB of disk at most and {disk / _MIB:,.0f} are free; "
            f"checkpoint.keep=1 (now {config.checkpoint.keep}), or another --out DIR"
        )
    else:
        yield f"disk: {models / _MIB:,.0f} MiB at most, of {disk / _MIB:,.0f} that are free here"


def _memory() -> float | None:
    """MiB that are free; None where that cannot be read, or a GPU's memory is what counts."""
    if torch.cuda.is_available():
        return None
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) / 1024
    return None


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
