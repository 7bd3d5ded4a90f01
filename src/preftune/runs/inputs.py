"""What a run reads from outside, looked at before torch is loaded."""

import os
import re
import shlex
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preftune.config import RunConfig
from preftune.config.address import AddressConfig
from preftune.config.algorithms.base import StageSettings
from preftune.config.rewards import (
    ALL_COLUMNS,
    NO_COLUMNS,
    OF_EVERY_ROW,
    columns_of,
    find_function,
    judges_in,
    reward_terms,
)
from preftune.errors import ConfigError, DataError, InputMissing, PreftuneError, UsageError, one_of
from preftune.judges import reviews
from preftune.judges.llm import read_template
from preftune.rundir import RunDir, read_object
from preftune.sums import read_sealed

if TYPE_CHECKING:
    from preftune.data import Dataset

COMMITS = "commits.json"  # in a mirror


def check_reward_functions(config: RunConfig, *, stages: bool = True) -> None:
    """Import every function that the settings name, those of `stages` included. InputMissing or ConfigError
    for one that is not there.
    """
    for name in _functions(config, config.stage.values() if stages else ()):
        find_function(name)


def check_columns(config: RunConfig, dataset: "Dataset") -> None:
    """DataError for a function that cannot be called without a column which no row has: it would fail at its
    first response, maybe hours later. Rows that a stage will collect have columns of their own.
    """
    stages = [stage for stage in config.stage.values() if dataset.of(stage.data) is not None]
    given = {*OF_EVERY_ROW, ALL_COLUMNS, "prompt", "response", "prompts", "completions"}
    needed = {
        column: name
        for name in _functions(config, stages)
        for column in columns_of(find_function(name), required=True)
        if column not in given
    }
    if not needed:
        return
    there = set[str]()
    for data in (dataset, *dataset.others.values()):
        for row in chain(data.train, data.validation, data.test, data.undesirable):
            there |= row.columns.keys()
    there -= {*NO_COLUMNS}
    for column in sorted(needed.keys() - there):
        raise DataError(
            f"reward function {needed[column]} takes {column!r}, a column which no row of the data has",
            one_of(column, sorted(there | {*OF_EVERY_ROW})) + "; or give it a default",
        )


def variables(config: RunConfig) -> list[str]:
    """NAME=VALUE, quoted for a shell, of what shipped functions of these settings read in the environment;
    PATH stands for a value that is not set.
    """
    if not any(name.startswith(f"{reviews.__name__}:") for name in _functions(config, config.stage.values())):
        return []
    return [f"{reviews.VARIABLE}={shlex.quote(os.environ.get(reviews.VARIABLE) or 'PATH')}"]


def _functions(config: RunConfig, stages: Iterable[StageSettings]) -> Iterator[str]:
    """What the settings name as functions, those of `stages` included."""
    named = [stage.all_functions for stage in stages]
    golds = [judge for judge in judges_in(config.evaluation.gold) if ":" in judge]
    for terms in [config.evaluation.reward_functions, *golds, *named]:
        yield from reward_terms(terms) if terms else ()


def check_llm_judges(config: RunConfig, run: RunDir | None = None, anew: Collection[str] = ()) -> None:
    """Read the template and the key of every language model that a stage will ask: those of stages that `run`
    has finished are not needed, unless they are made `anew`. Raises what `read_template` and `key_of` raise.
    """
    for name, stage in config.stage.items():
        if stage.asks is not None and (name in anew or not _is_finished(run, name)):
            read_template(stage.asks.template)
            key_of(stage.asks)


def _is_finished(run: RunDir | None, name: str) -> bool:
    with suppress(PreftuneError):  # damaged: said where the stage is opened
        return run is not None and read_sealed(run.stage_json(name)).get("status") == "finished"
    return False


def key_of(address: AddressConfig, server: str = "the LLM judge") -> str:
    """The key of an endpoint, from the environment; "" if none is required. The only place that reads it."""
    if address.key_variable is None:
        return ""
    key = os.environ.get(address.key_variable, "").strip()
    if not key:
        raise InputMissing(
            f"{server} at {address.url} requires a key, and the variable {address.key_variable} is not set",
            f"export {address.key_variable}=..., in the shell that runs the command",
        )
    if not re.fullmatch(r"[!-~]{8,4096}", key):
        why = "it has fewer than 8 characters" if len(key) < 8 else "it has blanks, or is no plain ASCII"
        raise ConfigError(
            f"what the variable {address.key_variable} holds cannot be a key: {why}",
            "a server that requires none (Ollama, vLLM) is asked without one: leave key_variable out",
        )
    return key


def recorded_commits(run: RunDir | None) -> dict[str, str]:
    """The commits of what is from the hub, by "data NAME" or "base NAME", with which a run was begun."""

    def record(file: Path) -> dict[str, Any]:
        with suppress(PreftuneError):  # damaged, or somebody else's: said where the directory is opened
            return read_object(file) if os.path.isfile(file) else {}
        return {}

    if run is None:
        return {}
    data, base = record(run.data), record(run.run).get("base")
    of_stages = data.get("others")
    reports = [("data", None, data), ("base", None, base)]
    if isinstance(of_stages, dict):
        reports += [("data", name, report) for name, report in of_stages.items()]
    return {
        f"{kind} {name or report.get('name')}": report["commit"]
        for kind, name, report in reports
        if isinstance(report, dict) and isinstance(report.get("commit"), str)
    }


def mirrored_commits(mirror: str | Path | None) -> dict[str, str]:
    """The commits of what is from the hub, by "data NAME", "base NAME" or "judge NAME", with which a run with
    this mirror began, and by "precision" what `auto` was; {} where the mirror has none that can be read.
    """
    content: Any = None
    if mirror is not None:
        with suppress(PreftuneError, OSError):
            content = read_sealed(Path(mirror) / COMMITS)
    return {k: v for k, v in (content or {}).items() if isinstance(v, str)}


def existing(path: str | Path, hint: str = "give the directory of a run") -> RunDir:
    """A run's directory. InputMissing if it is none."""
    run = RunDir(Path(path))
    if not run.config.is_file():
        raise InputMissing(f"{path} is not a run directory: no config.toml", hint)
    return run


def other_run(path: str | Path, run: RunDir) -> RunDir:
    """The run that stages are taken from. InputMissing if there is none, UsageError if it is `run` itself."""
    origin = existing(path)
    if origin.path.resolve() == run.path.resolve():
        raise UsageError(
            f"--from {path} is the run directory itself",
            "give the new run its own directory with --out DIR, or train a stage again with --redo STAGE",
        )
    return origin


def absolute(config: RunConfig) -> RunConfig:
    """Local paths in full, so that a run can be looked at from anywhere."""

    def full(name: str | None) -> str | None:
        path = Path(os.path.expanduser(name)) if name else None
        return str(path.resolve()) if path and path.exists() else name

    data = config.data.model_copy(update={} if config.is_world else {"name": full(config.data.name)})
    special = config.model.base in ("scratch", "smollm2")
    model = config.model.model_copy(update={} if special else {"base": full(config.model.base)})
    stages = {name: stage.located(full) for name, stage in config.stage.items()}
    golds = [judge if ":" in judge else full(judge) for judge in judges_in(config.evaluation.gold)]
    gold = ", ".join(str(judge) for judge in golds) or None
    evaluation = config.evaluation.model_copy(update={"gold": gold})
    update = {"data": data, "model": model, "stage": stages, "evaluation": evaluation}
    return config.model_copy(update=update)
