"""A run that is there, opened again: by commands that look at its models, or measure them.

What reads data is loaded inside the functions, after a look at the directory that needs none of it.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from preftune.config import RunConfig, load_recipe
from preftune.rundir import RunDir
from preftune.runs.inputs import (
    check_columns,
    check_reward_functions,
    existing,
    mirrored_commits,
    recorded_commits,
)
from preftune.sums import check_own

if TYPE_CHECKING:
    from preftune.data import Dataset
    from preftune.models.locate import Source
    from preftune.runs.session import Session


def found_data(
    config: RunConfig, run: RunDir | None, mirror: str | None = None
) -> "tuple[Dataset, Source | None]":
    """The data of a run and its base model (None: from scratch); of the hub the commits that `run`, or else
    its mirror, has recorded, if it has.
    """
    from preftune.models.locate import locate
    from preftune.runs.sources import dataset_of, with_stage_data

    commits, base = mirrored_commits(mirror) | recorded_commits(run), config.model.base
    dataset = dataset_of(config.data, config.seed, commits.get(f"data {config.data.name}"))
    of_data = {key.removeprefix("data "): value for key, value in commits.items() if key.startswith("data ")}
    dataset = with_stage_data(config, dataset, of_data)
    if base == "scratch":
        return dataset, None
    return dataset, locate(base, commits.get(f"base {base}"))


def checked_data(
    config: RunConfig, run: RunDir | None, mirror: str | None = None
) -> "tuple[Dataset, Source | None]":
    """`found_data`, where reward functions can be had, and the data have the columns that they need."""
    check_reward_functions(config)
    dataset, base = found_data(config, run, mirror)
    check_columns(config, dataset)
    return dataset, base


def reopen(path: str | Path, *, write: bool = True) -> "Session":
    """A session on a run that is there. Its reward functions are imported only where they are called: those
    of stages have done their work. Without `write` nothing is written, and no lock is needed.
    """
    run = existing(path)
    check_own(run, run.config)
    config = load_recipe(str(run.config)).config
    if write:
        check_reward_functions(config, stages=False)
    dataset, base = found_data(config, run)
    from preftune.runs import runner
    from preftune.runs.console import Console
    from preftune.runs.session import Session

    if write:
        return runner.open_session(config, dataset, run, Console(), base=base, trains=False)
    return Session(config=config, dataset=dataset, run=run, console=Console(), trains=False, located=base)
