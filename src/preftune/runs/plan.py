"""What is about to happen, in a few lines, before anything slow starts."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from preftune.config import RunConfig, StageSettings, judge_of
from preftune.data import Dataset
from preftune.data.dataset import KINDS, SPLIT_NAMES
from preftune.data.formats.table import FORMS
from preftune.errors import ConfigError, DataError
from preftune.records.verdict import MIN_PROMPTS, smallest_gain
from preftune.rundir import BASE, RunDir
from preftune.runs.console import Console
from preftune.runs.sources import learners_rows

FILES = 20  # that are listed
SPREAD = math.sqrt(2)  # sd of the difference of two independent scores of sd 1


def show_plan(
    console: Console, config: RunConfig, dataset: Dataset, run: RunDir, stages: Sequence[str]
) -> None:
    """The data, and every stage with what it starts from and how long it is."""
    counts = (f"{len(getattr(dataset, split)):,} {split}" for split in SPLIT_NAMES)
    items = "pairs" if dataset.kind == "pairs" else f"rows ({KINDS[dataset.kind]})"
    console.line(f"data: {', '.join(counts)} {items}")
    for line in data_lines(dataset.report):
        console.line(f"data: {line}")
    trained = [(name, config.stage[name]) for name in stages]
    rows = [(name, stage.algorithm, _with_data(name, stage, dataset)) for name, stage in trained]
    if (scratch := config.model.scratch) is not None:
        size = f"GPT-2 {scratch.layers} x {scratch.width} from random weights"
        rows.insert(
            0, (BASE, "pretraining", f"{size}: {scratch.steps} steps of {scratch.batch_size} documents")
        )
    console.plan(config.name, str(run.path), rows)
    if len(trained) == len(config.stage):
        console.line(f"evaluation: {power(config, dataset)}")


def power(config: RunConfig, dataset: Dataset) -> str:
    """What the evaluation can find on the test prompts that there are, before anything is known but that
    scores of replies have sd 1.
    """
    count, limit = config.evaluation.prompts, dataset.report.get("distinct_prompts", {}).get("test", math.inf)
    prompts, knob = (count, "evaluation.prompts=") if count <= limit else (int(limit), "test prompts: ")
    compared = comparisons(config)
    if prompts < MIN_PROMPTS:
        return f"{prompts} prompts are too few for any claim; {knob}{MIN_PROMPTS} or more"
    gain = smallest_gain(prompts, SPREAD, compared)
    several = f", {compared} comparisons with one reference" if compared > 1 else ""
    few = "" if count <= limit else f" (all test prompts; evaluation.prompts={count} asks for more)"
    return (
        f"with {prompts} prompts{few} and this spread a gain of {gain:.2f} sd of the score is detected with "
        f"80 % power (replies to a prompt that differ by {SPREAD:.2f} sd, as independent ones do{several}); "
        f"half of that needs {knob}{4 * prompts}"
    )


def comparisons(config: RunConfig) -> int:
    """How many policies an evaluation compares with its reference, which Holm's correction is over: every
    stage's policy and the base, but for the reference itself, and best-of-n where there is a score.
    """
    policies = sum(stage.trains_policy for stage in config.stage.values())
    scored = judge_of(config.stage) is not None or config.evaluation.reward_functions is not None
    return max(policies + scored, 1)


def _with_data(name: str, stage: StageSettings, dataset: Dataset) -> str:
    """The plan of a stage, and its data where that is not the run's (collected: not known yet)."""
    data = dataset.of(stage.data)
    note = "" if stage.data is None else f"; data: {stage.data}"
    if data is None or data.kind == stage.batch == "unpaired":  # (labelled replies count for half a pair)
        return f"{stage.plan()}{note}"
    by_learner = learners_rows(data.rows_for(stage.batch), stage, name)
    return f"{stage.plan([len(rows) for rows in by_learner])}{note}"


def data_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """The split and rows of every file, and what was read in a way that may surprise, or not at all."""
    files = report.get("files", [])
    for file in files[:FILES]:
        yield f"{file['path']}: {file['split']}, {file['read']:,} rows read, {file['kept']:,} kept"
    if len(files) > FILES:
        yield f"{len(files) - FILES} more files, listed in data.json"
    if cut := report.get("cut_from_train"):
        yield f"{' and '.join(cut)} cut from train, by prompt (data.held_out = {report['held_out']:g})"
    if repeats := report.get("duplicates"):
        yield f"{repeats:,} repeat another one word for word"
    overlap = {pair: n for pair, n in report.get("prompt_overlap", {}).items() if n}
    yield from (f"{n:,} prompts are in both {pair.replace('/', ' and ')}" for pair, n in overlap.items())
    yield from report.get("notes", [])


def check_kind(config: RunConfig, dataset: Dataset, stages: Sequence[str], *, compared: bool) -> None:
    """Refuse rows that a stage cannot use, before anything is trained. `compared`: the policies are compared
    on held-out replies afterwards.

    Raises DataError that names the kind of the rows, the stage and what it needs.
    """
    kind, have = dataset.kind, KINDS[dataset.kind]
    _check_form(config, str(config.data.name), dataset)
    if kind == "prompts" and config.model.scratch is not None:
        raise DataError(
            f"{config.data.name}: {have}, and a base from scratch needs text", "name a model.base"
        )
    for name in stages:
        stage = config.stage[name]
        data, of = dataset.of(stage.data), str(stage.data or config.data.name)
        if data is None:  # collected: not known yet
            continue
        _check_form(config, of, data)
        if data.kind not in stage.uses:
            raise DataError(
                f"{of}: its rows are {KINDS[data.kind]}, and the stage {name} "
                f"({stage.algorithm}) needs "
                + " or ".join(words for kind, words in KINDS.items() if kind in stage.uses),
                f"{FORMS}; row 1 has the columns {data.report.get('columns', 'of pairs')}",
            )
        if data.kind == stage.batch == "unpaired" and not data.undesirable:
            raise DataError(
                f"{of}: no training row is an undesirable reply, and the stage "
                f"{name} ({stage.algorithm}) learns from both kinds",
                'label them: {"prompt", "completion", "label": false}',
            )
        learners_rows(data.rows_for(stage.batch), stage, name)
    if compared and kind not in ("pairs", "unpaired"):
        raise DataError(
            f"{config.data.name}: its rows are {have}, and policies are compared on held-out replies",
            f"`preftune train RECIPE {stages[-1]}` trains without the comparison",
        )


def _check_form(config: RunConfig, name: str, data: Dataset) -> None:
    """ConfigError for rows of text that would get roles."""
    if data.kind == "text" and config.data.form != "plain":
        raise ConfigError(
            f"{name}: its rows are {KINDS[data.kind]}, and data.form = {config.data.form} would add roles",
            "set data.form=plain; or, if the column text is something else, name the columns: "
            "data.columns.prompt=NAME data.columns.chosen=NAME data.columns.rejected=NAME",
        )
