"""What a run would take, from a few steps of every stage and a batch of its evaluation.

Every stage is prepared as in the run itself, all rows read and encoded, in a temporary directory. Then a few
of its steps are run: the largest of those looked at, which warms up and shows the memory, and some of average
size, which give the pace. A base that is trained from scratch has learnt too little by then to end its
replies: their length is taken from the chosen ones.
"""

import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from preftune.algorithms import ALGORITHMS
from preftune.config import EVALUATION, RunConfig, stage_order
from preftune.config.algorithms.base import names_a_stage
from preftune.config.trainable import ALL
from preftune.data import Dataset, prompt_hash
from preftune.data.batch import real_tokens
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
from preftune.runs.provenance import peak_memory_mb, reset_peak_memory
from preftune.runs.runner import open_session, train_stages
from preftune.runs.session import Groups, Session
from preftune.runs.sizes import judge_models

STEPS = 3  # of every stage: the largest, and the pace
_LOOKED_AT = 64  # steps of a stage, for their sizes
_GONE_OVER = 32  # rows, where a run goes over more of them after a stage's steps
_NEVER = 10**9  # steps between checkpoints
_STATES = 3  # a trained weight and Adam's two moments of it, in a checkpoint; in memory a gradient, too


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """A stage: the rows it uses and those it leaves out by reason, its steps, and what it would take."""

    name: str
    steps: int
    seconds: float
    memory_mb: float | None  # at most, of the process up to its end
    disk: float  # bytes: its model, and the most checkpoints that it has at once
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

    def __call__(self, stage: str, groups: Groups, work: Callable[[Groups], Any], trained_on: bool) -> Any:
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
        if trained_on and times > 1:
            result = timed()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + took[-1] * times - sum(took)
        return result


def not_tried(config: RunConfig) -> list[str]:
    """Stages that would ask a language model, each question of which may cost, and those that read theirs."""
    asking = [name for name, stage in config.stage.items() if stage.asks is not None]
    return with_children(config.stage, asking)


def estimate(
    config: RunConfig, dataset: Dataset, base: Source | None, say: Callable[[str], None] = lambda _: None
) -> Iterator[Cost]:
    """What each stage and the evaluation take. Raises what a run would raise, before it."""
    with tempfile.TemporaryDirectory(prefix="preftune-plan-") as place:
        run, quiet = RunDir(place), Console(quiet=True)
        unasked = not_tried(config)
        names = [name for name in stage_order(config.stage) if name not in unasked]
        with held(run):
            taken: dict[str, _Taken] = {}
            session = open_session(shortened(config), dataset, run, quiet, base=base)
            session.cut = lambda name, job: _cut_job(taken, name, job)
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


def _cut_job(taken: dict[str, _Taken], name: str, job: Job) -> Job:
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


def _cost(
    full: Session, name: str, taken: Mapping[str, _Taken], left_out_seconds: Mapping[str, float]
) -> Cost:
    """Of a stage of which a few steps are done: `full` has the settings that were asked for,
    `left_out_seconds` the time of the rows that were left out after its steps, by training.
    """
    run, stage = full.run, full.config.stage.get(name)
    record = read_object(run.stage_json(name))
    memory, model = record.get("peak_memory_mb"), _size(full.stage(name).model_dir(run), "*")
    costs: dict[str, Any] = {"name": name, "memory_mb": memory, **_parts(full, name)}
    if stage is not None and stage.makes == "data":
        count = _prompts(full, name)
        pace, around = _pace(run, name, float(record["seconds"]), [])
        steps = stage.steps_on(count)
        return Cost(steps=steps, rows=count, seconds=around + pace * steps, disk=model, **costs)
    trainings = [name] if stage is None or stage.models == 1 else stage.member_names(name)
    different = trainings[: len(stage.learners()) if stage else 1]
    learners, seconds = [taken[training] for training in different], 0.0
    if stage is not None and not stage.online and names_a_stage(stage.data or ""):
        n_rows = full.config.stage[str(stage.data)].rows_made(_prompts(full, str(stage.data)))
        counts = [min(stage.most_rows or count, count) for count in stage.shares(n_rows)]
        learners = [
            replace(learner, rows=count, steps=stage.steps_on(count))
            for learner, count in zip(learners, counts, strict=True)
        ]
    if trainings != [name]:  # what combines them
        members = sum(float(read_object(run.stage_json(member))["seconds"]) for member in trainings)
        seconds = float(record["seconds"]) - members + left_out_seconds.get(name, 0.0)
    for number, training in enumerate(trainings):
        steps = learners[number % len(learners)].steps
        whole = float(read_object(run.stage_json(training))["seconds"])
        whole += left_out_seconds.get(training, 0.0)
        pace, around = _pace(run, training, whole, taken[training].began)
        seconds += around + pace * steps if steps > STEPS else whole
    tokens = (
        0.0 if stage is None else sum((learner.tokens or 0) * (learner.rows or 0) for learner in learners)
    )
    trained = 1 if stage is None else len(ALGORITHMS[stage.algorithm].trains)
    return Cost(
        steps=sum(learner.steps for learner in learners),
        rows=sum(learner.rows or 0 for learner in learners) or None,
        tokens=tokens or None,
        left_out=sum((Counter(learner.left_out) for learner in learners), Counter[str]()),
        seconds=seconds,
        disk=_disk(full, name, model, trained),
        **costs,
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
    after = [(b - a) - step for a, b, step in zip(began, began[1:], steps, strict=False)]
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
    n_frozen = len(roles.needs) - len(roles.trains) + judge_models(full.config, name)
    return {"trained": (_STATES + 1) * len(roles.trains) * weights, "read": n_frozen * weights}


def _disk(full: Session, name: str, model: int, trained: int) -> float:
    """Bytes of the model and of the most checkpoints that there can be at once: those that are kept, the one
    that is written, the best one, two to go back to where there is a budget, and, with budget and best one,
    the best one before that.
    """
    stage, settings = full.config.stage.get(name), full.config.checkpoint
    budget = stage is not None and stage.budget is not None
    spared = settings.best + 2 * budget + (settings.best and budget)
    return model * (1 + _STATES * trained * (settings.keep + 1 + spared))
