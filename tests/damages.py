"""Every way in which a file of a finished run can hold another shape, and everybody who reads such a file."""

import copy
import json
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

from preftune.config.toml import toml_value
from preftune.measure.compare import compare_runs, show_comparison
from preftune.report import load_run
from preftune.report.contents import sections
from preftune.report.plots.figures import draw
from preftune.report.view import RunView
from preftune.report.writers.analysis import analysis_text, apart_texts
from preftune.report.writers.page import page_text
from preftune.rundir import RunDir
from preftune.runs.cards import model_card
from preftune.runs.stages import Stage

NOTHING_MEASURED: dict[str, Any] = {"policies": (), "reward_model": None, "samples": {}}
NO_ROWS: dict[str, Any] = {"splits": {}, "sources": {}}
Place = tuple[str | int, ...]
HUGE = 10**400  # a number in JSON, and no float
WRONG: tuple[Any, ...] = (
    *([], {}, "words", "\ud800", 3.5, -7, True, None, HUGE),
    *({"a": []}, [[]], ["words"], [1.5, None], json.loads("[" * 200 + "]" * 200)),
)
FILES = (
    *(
        "config.toml",
        "run.json",
        "data.json",
        "origins.json",
        "stages/*/stage.json",
        "stages/*/metrics.jsonl",
    ),
    *("evaluation/*.json", "evaluation/*.jsonl", "samples/*.jsonl", "analysis/*.jsonl", ".preftune"),
    "models/reward_model/preftune.json",
)


def places(value: Any, at: Place = ()) -> Iterator[Place]:
    """Where something stands in a value, itself first; of a list only the first two places and the last."""
    yield at
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*at, key))
    elif isinstance(value, list):
        for index in sorted({*range(min(2, len(value))), len(value) - 1} - {-1}):
            yield from places(value[index], (*at, index))


def replaced(value: Any, at: Place, wrong: Any) -> Any:
    """A copy with something else at that place."""
    if not at:
        return wrong
    made = copy.copy(value)
    made[at[0]] = wrong if len(at) == 1 else replaced(value[at[0]], at[1:], wrong)
    return made


def content(file: Path) -> Any:
    """What a JSON, JSON Lines or TOML file holds; of lines a list."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".toml":
        return tomllib.loads(text)
    return [json.loads(row) for row in text.splitlines()] if file.suffix == ".jsonl" else json.loads(text)


def written(file: Path, value: Any) -> bytes:
    """The file's text with that content, as far as its format can hold it."""
    if file.suffix == ".toml":
        return _toml(value).encode(errors="replace")
    if file.suffix == ".jsonl" and isinstance(value, list):
        return "".join(json.dumps(row) + "\n" for row in value).encode()
    return json.dumps(value).encode()


def _toml(value: Any) -> str:
    """TOML with tables in line."""
    if not isinstance(value, dict):
        return f"words = {toml_value(value)}"
    return "\n".join(f"{key} = {_inline(item)}" for key, item in value.items())


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_inline(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(_inline(item) for item in value)}]"
    return toml_value(value)


def read_all(run: RunDir, other: RunDir, *, drawn: Path | None = None) -> None:
    """What a report, a comparison with another run and the cards make of a run, with the figures that show
    the file `drawn`; nothing is written.
    """
    view = load_run(run)
    figures = draw(shown_by(view, drawn)) if drawn else {}
    parts = sections(view, {file: words for file, (_, words) in figures.items()})
    "".join([analysis_text(view, parts), *apart_texts(parts).values()]).encode()
    page_text(view, parts, {file: svg for file, (svg, _) in figures.items()}).encode()
    console: Any = SimpleNamespace(line=str, table=lambda headers, rows: list(rows))
    show_comparison(console, compare_runs(run, other, resamples=20))
    for name, algorithm in (("rm", "reward"), ("ppo", "ppo"), ("base", "pretraining")):
        model_card(session(run), Stage(name=name, algorithm=algorithm, parents=(), inputs={})).encode()


def shown_by(view: RunView, file: Path) -> RunView:
    """The run with one stage and nothing measured, if the file is of that stage, or without stages."""
    stages = tuple(stage for stage in view.stages if stage.name == file.parent.name)
    return replace(view, stages=stages, **(NOTHING_MEASURED if stages else {}))


def session(run: RunDir, base: str = "gpt2", data: str = "world", report: Any = NO_ROWS) -> Any:
    """As much of a session as a card is made of."""
    config = SimpleNamespace(
        name="run", seed=0, model=SimpleNamespace(base=base),
        data=SimpleNamespace(name=data, form="transcript", template_arguments={}),
        evaluation=SimpleNamespace(temperature=1.0, max_new_tokens=16),
    )  # fmt: skip
    return SimpleNamespace(
        config=config, dataset=SimpleNamespace(report=report), run=run, commit_of_base="", precision="float32"
    )


def sample(
    root: Path, rng: Random, each: int, patterns: Sequence[str] = FILES
) -> Iterator[tuple[Path, bytes]]:
    """`each` damages of every kind of file under a directory: (file, its damaged content)."""
    for pattern in patterns:
        files = {file: content(file) for file in sorted(root.glob(pattern))}
        every = [(file, at) for file, value in files.items() for at in places(value)]
        for file, at in rng.sample(every, min(each, len(every))):
            yield file, written(file, replaced(files[file], at, rng.choice(WRONG)))
