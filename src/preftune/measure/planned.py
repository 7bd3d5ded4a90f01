"""What `preftune plan` prints: rows, steps, time and memory of every stage, and whether there is room."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from preftune.config import EVALUATION, RunConfig, stage_order
from preftune.data import Dataset
from preftune.data.dataset import SPLIT_NAMES
from preftune.measure.estimate import STEPS, Cost, estimate, not_tried
from preftune.models.locate import Source
from preftune.rundir import BASE
from preftune.runs.plan import data_lines, power
from preftune.runs.sizes import sizes

_MIB = 2**20


def planned(
    config: RunConfig, dataset: Dataset, base: Source | None, say: Callable[[str], None]
) -> Iterator[str]:
    """The plan in lines, as text. What is tried is said before, since it may take minutes."""
    costs = list(estimate(config, dataset, base, say))
    yield f"plan of {config.name}, from {STEPS} steps of every stage and a batch of its evaluation, here"
    for split in SPLIT_NAMES:
        yield f"data: {len(getattr(dataset, split)):,} {split} rows"
    yield from (f"data: {line}" for line in data_lines(dataset.report))
    for name in not_tried(config):
        yield f"{name}: not tried and not counted: {config.stage[name].plan()} (a plan asks no LLM judge)"
    names = max(len(cost.name) for cost in costs)
    for cost in costs:
        rows = f"{cost.rows:,} rows, " if cost.rows is not None else ""
        tokens = f", {cost.tokens:,.0f} tokens" if cost.tokens else ""
        steps = f"{rows}{cost.steps:,} steps{tokens}" if cost.evaluated is None else cost.evaluated.sizes
        memory = f", peak memory {cost.memory_mb:,.0f} MiB{_by_part(cost)}" if cost.memory_mb else ""
        size = f", disk {cost.disk / _MIB:,.1f} MiB" if cost.disk else ""
        yield f"{cost.name:<{names}}  {steps}: {_time(cost.seconds)}{memory}{size}"
        yield from (f"{'':<{names}}  {n:,} rows left out: {why}" for why, n in cost.left_out.items())
        if cost.evaluated is not None:
            parts = [f"{part} {_time(seconds)}" for part, seconds in cost.evaluated.parts.items()]
            yield f"{'':<{names}}  {', '.join(parts)}"
    located = None if config.model.scratch is not None else base
    yield from sizes(config, located, stage_order(config.stage), dataset)
    training = sum(cost.seconds for cost in costs if cost.evaluated is None)
    whole = sum(cost.seconds for cost in costs)
    after = _time(whole - training)
    yield f"time: {_time(whole)}, {_time(training)} of training and {after} of evaluation; then the report"
    yield f"evaluation: {power(config, dataset)}"
    yield from fits(costs, config, memory=_memory(), disk=shutil.disk_usage(Path.cwd()).free)


def _by_part(cost: Cost) -> str:
    """Of the peak, where all of a model is trained: the rest is activations, copies and libraries."""
    parts = [size / _MIB for size in (cost.trained, cost.read)]
    if not cost.trained or cost.memory_mb is None:
        return ""
    return (
        f" ({parts[0]:,.1f} trained, {parts[1]:,.1f} read, {max(cost.memory_mb - sum(parts), 0):,.0f} else)"
    )


def fits(costs: Sequence[Cost], config: RunConfig, *, memory: float | None, disk: float) -> Iterator[str]:
    """Whether there is room, by the stage that needs most; if not, which setting to turn. `memory` in MiB and
    `disk` in bytes are what is free.
    """
    largest = max(costs, key=lambda cost: cost.memory_mb or 0.0)
    need = largest.memory_mb or 0.0
    if memory is not None and need > memory:
        knobs = {BASE: "model.scratch.microbatch_size", EVALUATION: "evaluation.batch_size"}
        knob = knobs.get(largest.name, f"stage.{largest.name}.microbatch_size")
        yield (
            f"does not fit: {largest.name} needs {need:,.0f} MiB of memory and {memory:,.0f} are free; lower "
            f"{knob}, or train less of the model: model.trainable=lora (docs/memory.md)"
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
