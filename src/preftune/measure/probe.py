"""`preftune plan`: what a run would take, from a few steps of every stage and a batch of its evaluation.

The stages are made ready as for the run itself, all rows read and encoded, in a directory that is thrown
away. Of their steps a few are taken: the largest of those looked at, which warms up and shows the memory, and
some of average size, which are the pace. Models have hardly learnt anything by then, and a base that is
trained from scratch would not end its replies: there, their length is that of the chosen ones.
"""

import math
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from preftune.algorithms import ALGORITHMS
from preftune.config import EVALUATION, RunConfig, stage_order
from preftune.config.algorithms.base import names_a_stage
from preftune.config.trainable import ALL
from preftune.data import Dataset, prompt_hash
from preftune.data.batch import real_tokens
from preftune.data.dataset import SPLIT_NAMES
from preftune.measure.forecast import Forecast, forecast
from preftune.models.load import load_tokenizer
from preftune.models.locate import Source
from preftune.models.trunk import forget_states
from preftune.rundir import BASE, RunDir, read_jsonl, read_object
from preftune.runs.aside import with_children
from preftune.runs.console import Console
from preftune.runs.job import Job
from preftune.runs.lengths import chosen_lengths
from preftune.runs.lock import held
from preftune.runs.plan import data_lines, power
from preftune.runs.provenance import peak_memory_mb, reset_peak_memory
from preftune.runs.runner import open_session, train_stages
from preftune.runs.session import Groups, Session
from preftune.runs.sizes import judge_models, sizes

STEPS = 3  # of every stage: the largest, and the pace
_LOOKED_AT = 64  # steps of a stage, for their sizes
_GONE_OVER = 32  # rows, where a run goes over more of them after a stage's steps
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
    evaluated: Forecast | None = None  # of the evaluation, by part


@dataclass(frozen=True, slots=True, kw_only=True)
class _Taken:
    """Of a stage's job of which a few steps are taken: its real sizes, and when each of these steps began."""

    steps: int
    rows: int | None
    tokens: float | None  # of a row
    left_out: Mapping[str, int]
    began: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _SomeRows:
    """In place of all rows some of each group, as `session.GoesOver`; what the others would have taken is
    kept by stage. Rows that training had are gone over twice: the second time counts, as in a run.
    """

    seconds: dict[str, float] = field(default_factory=dict)

    def __call__(self, stage: str, groups: Groups, work: Callable[[Groups], Any], seen: bool) -> Any:
        strides = [math.ceil(len(group) * len(groups) / _GONE_OVER) for group in groups]
        some = [group[:: max(stride, 1)] for group, stride in zip(groups, strides, strict=True)]
        times = sum(map(len, groups)) / sum(map(len, some))
        took = list[float]()

        def timed() -> Any:
            forget_states()
            began = time.monotonic()
            result = work(some)
            took.append(time.monotonic() - began)
            return result

        result = timed()
        if seen and times > 1:
            result = timed()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + took[-1] * times - sum(took)
        return result


def _left_out(config: RunConfig) -> list[str]:
    """Stages that would ask a language model, each question of which may cost, and those that read theirs."""
    asking = [name for name, stage in config.stage.items() if stage.asks is not None]
    return with_children(config.stage, asking)


def planned(
    config: RunConfig, dataset: Dataset, base: Source | None, say: Callable[[str], None]
) -> Iterator[str]:
    """The plan in lines, as text. What is tried is said before, since it may take minutes."""
    costs = list(probe(config, dataset, base, say))
    yield f"plan of {config.name}, from {STEPS} steps of every stage and a batch of its evaluation, here"
    for split in SPLIT_NAMES:
        yield f"data: {len(getattr(dataset, split)):,} {split} rows"
    yield from (f"data: {line}" for line in data_lines(dataset.report))
    for name in _left_out(config):
        yield f"{name}: not tried and not counted: {config.stage[name].plan()} (it asks nothing here)"
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
            parts = [f"{what} {_time(seconds)}" for what, seconds in cost.evaluated.parts.items()]
            yield f"{'':<{names}}  {', '.join(parts)}"
    located = None if config.model.scratch is not None else base
    yield from sizes(config, located, stage_order(config.stage), dataset)
    training = sum(cost.seconds for cost in costs if cost.evaluated is None)
    whole = sum(cost.seconds for cost in costs)
    after = _time(whole - training)
    yield f"time: {_time(whole)}, {_time(training)} of training and {after} of evaluation; then the report"
    yield f"evaluation: {power(config, dataset)}"
    yield from fits(costs, config, memory=_memory(), disk=shutil.disk_usage(Path.cwd()).free)


def probe(
    config: RunConfig, dataset: Dataset, base: Source | None, say: Callable[[str], None] = lambda _: None
) -> Iterator[Cost]:
    """What each stage and the evaluation take. Raises what a run would raise, before it."""
    with tempfile.TemporaryDirectory(prefix="preftune-plan-") as place:
        run, quiet = RunDir(place), Console(quiet=True)
        unasked = _left_out(config)
        names = [name for name in stage_order(config.stage) if name not in unasked]
        with held(run):
            taken: dict[str, _Taken] = {}
            session = open_session(shortened(config), dataset, run, quiet, base=base)
            session.cut = lambda name, job: _cut(taken, name, job)
            session.go_over = some_rows = _SomeRows()
            train_stages(session, [])
            if session.scratch:
                lengths = chosen_lengths(config, dataset, load_tokenizer(session.source(BASE)))
                session = replace(session, config=_replying(session.config, lengths))
            for name in names:
                say(f"trying {name}")
                train_stages(session, [name])
            full = Session(config=config, dataset=dataset, run=run, console=quiet, located=base)
            yield from (_cost(full, name, taken, some_rows.seconds) for name in [*full.scratch, *names])
            reset_peak_memory()
            say("trying the evaluation")
            evaluated = forecast(session, names)
            yield Cost(
                name=EVALUATION,
                steps=0,
                seconds=sum(evaluated.parts.values()),
                memory_mb=peak_memory_mb(),
                disk=0,
                evaluated=evaluated,
            )


def shortened(config: RunConfig) -> RunConfig:
    """The same run without checkpoints before a stage's end, and with few prompts where data are made; what
    is taken of other stages is cut when they are ready.
    """
    stages = {
        name: stage.model_copy(update={"rows": STEPS * stage.batch_size})
        if stage.makes == "data"
        else stage.as_most_steps()
        for name, stage in config.stage.items()
    }
    checkpoint = config.checkpoint.model_copy(update={"every": _NEVER, "best": False, "keep_last": False})
    return config.model_copy(update={"stage": stages, "checkpoint": checkpoint, "track": None})


def _replying(config: RunConfig, lengths: Sequence[int]) -> RunConfig:
    """The same run where all replies that are sampled are equally long: halfway between the mean of these
    `lengths` and the longest, since rows are padded to it, and sampling goes on until it has ended.
    """

    def within(settings: Any, most: int) -> Any:
        cut = [min(length, most) for length in lengths]
        tokens = round((sum(cut) / len(cut) + max(cut)) / 2) if cut and most else 0
        return settings.model_copy(update={"max_new_tokens": tokens}) if tokens else settings

    stages = {name: within(stage, stage.new_tokens) for name, stage in config.stage.items()}
    evaluation = within(config.evaluation, config.evaluation.max_new_tokens)
    return config.model_copy(update={"stage": stages, "evaluation": evaluation})


def _cut(taken: dict[str, _Taken], name: str, job: Job) -> Job:
    """A few steps of a stage: the largest of those looked at, then those nearest to the mean size."""
    numbers: Sequence[int] = range(job.steps)
    if job.steps > STEPS:
        looked_at = range(0, job.steps, math.ceil(job.steps / _LOOKED_AT))
        sizes = {step: real_tokens(job.batch_at(step)) for step in looked_at}
        mean = sum(sizes.values()) / len(sizes)
        usual = sorted(sizes, key=lambda step: abs(sizes[step] - mean))[: STEPS - 1]
        numbers = [max(sizes, key=lambda step: sizes[step]), *usual]
    tokens = job.tokens / job.rows_per_step if job.tokens else None
    facts = _Taken(steps=job.steps, rows=job.rows, tokens=tokens, left_out=job.rejected)
    taken[name] = facts

    def batch_at(step: int) -> Any:
        facts.began.append(time.monotonic())
        return job.batch_at(numbers[step])

    names_at = job.rows_at
    return replace(
        job,
        steps=len(numbers),
        batch_at=batch_at,
        rows_at=lambda step: names_at(numbers[step]),
        budget=None,
        worth=None,
    )


def _cost(full: Session, name: str, taken: Mapping[str, _Taken], others: Mapping[str, float]) -> Cost:
    """Of a stage of which a few steps are done: `full` has the settings that were asked for, `others` the
    seconds of rows that were left out after its steps.
    """
    run, stage = full.run, full.config.stage.get(name)
    record = read_object(run.stage_json(name))
    memory, model = record.get("peak_memory_mb"), _size(full.stage(name).model_dir(run), "*")
    found: dict[str, Any] = {"name": name, "memory_mb": memory, **_parts(full, name)}
    if stage is not None and stage.makes == "data":
        count = _prompts(full, name)
        pace, around = _pace(run, name, float(record["seconds"]), [])
        steps = stage.steps_on(count)
        return Cost(steps=steps, rows=count, seconds=around + pace * steps, disk=model, **found)
    parts = [name] if stage is None or stage.models == 1 else stage.member_names(name)
    learners, seconds = [taken[part] for part in parts[: len(stage.learners()) if stage else 1]], 0.0
    if stage is not None and not stage.online and names_a_stage(stage.data or ""):
        made = full.config.stage[str(stage.data)].rows_made(_prompts(full, str(stage.data)))
        counts = [min(stage.most_rows or count, count) for count in stage.shares(made)]
        learners = [
            replace(each, rows=count, steps=stage.steps_on(count))
            for each, count in zip(learners, counts, strict=True)
        ]
    if parts != [name]:  # what combines them
        members = sum(float(read_object(run.stage_json(part))["seconds"]) for part in parts)
        seconds = float(record["seconds"]) - members + others.get(name, 0.0)
    for number, part in enumerate(parts):
        steps = learners[number % len(learners)].steps
        whole = float(read_object(run.stage_json(part))["seconds"]) + others.get(part, 0.0)
        pace, around = _pace(run, part, whole, taken[part].began)
        seconds += around + pace * steps if steps > STEPS else whole
    tokens = 0.0 if stage is None else sum((each.tokens or 0) * (each.rows or 0) for each in learners)
    trained = 1 if stage is None else len(ALGORITHMS[stage.algorithm].trains)
    return Cost(
        steps=sum(each.steps for each in learners),
        rows=sum(each.rows or 0 for each in learners) or None,
        tokens=tokens or None,
        left_out=sum((Counter(each.left_out) for each in learners), Counter[str]()),
        seconds=seconds,
        disk=_disk(full, name, model, trained),
        **found,
    )


def _prompts(full: Session, name: str) -> int:
    """How many a stage replies to that makes data: none twice."""
    stage = full.config.stage[name]
    count = len({prompt_hash(row.prompt) for row in full.training_rows(stage=name)})
    return stage.rows_made(count) // max(stage.rows_made(1), 1)


def _pace(run: RunDir, name: str, whole: float, began: Sequence[float]) -> tuple[float, float]:
    """Seconds of a step, with what is written after it, and of all besides steps. The first step, which is
    the largest and warms up, is not the pace; if it is the only one it has to be.
    """
    steps = [float(row["step_seconds"]) for row in read_jsonl(run.metrics(name))]
    after = [(b - a) - own for a, b, own in zip(began, began[1:], steps, strict=False)]
    usual = steps[1:] or steps
    written = max(sum(after[-1:]), 0.0)
    around = whole - sum(steps) - written * len(after)
    return sum(usual) / len(usual) + written, max(around, 0.0)


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
    roles = ALGORITHMS[config.algorithm]
    others = len(roles.needs) - len(roles.trains) + judge_models(full.config, name)
    return {"trained": (_STATES + 1) * len(roles.trains) * weights, "read": others * weights}


def _by_part(cost: Cost) -> str:
    """Of the peak, where all of a model is trained: the rest is activations, copies and libraries."""
    parts = [size / _MIB for size in (cost.trained, cost.read)]
    if not cost.trained or cost.memory_mb is None:
        return ""
    return (
        f" ({parts[0]:,.1f} trained, {parts[1]:,.1f} read, {max(cost.memory_mb - sum(parts), 0):,.0f} else)"
    )


def _disk(full: Session, name: str, model: int, trained: int) -> float:
    """The model, and its checkpoints at their most: those that are kept, the one that is written, the best
    one, two to go back to from beyond a budget, and with both the best one of before.
    """
    stage, settings = full.config.stage.get(name), full.config.checkpoint
    budget = stage is not None and stage.budget is not None
    spared = settings.best + 2 * budget + (settings.best and budget)
    return model * (1 + _STATES * trained * (settings.keep + 1 + spared))


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
