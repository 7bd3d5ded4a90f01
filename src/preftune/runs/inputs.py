"""What a run reads from outside, looked at before torch is loaded."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from preftune.config import RunConfig, from_outside
from preftune.config.rewards import find_function, reward_terms
from preftune.errors import PreftuneError
from preftune.rundir import RunDir, read_json


def check_reward_functions(config: RunConfig, *, stages: bool = True) -> None:
    """Import every function that the settings name, those of `stages` included. InputMissing or ConfigError
    for one that is not there.
    """
    named = [stage.functions() for stage in config.stage.values()] if stages else []
    for terms in [config.evaluation.reward_functions, *named]:
        for name in reward_terms(terms) if terms else ():
            find_function(name)


def recorded_commit(run: RunDir | None, name: str | None, what: Literal["data", "base"]) -> str | None:
    """The commit of the hub data set or model `name` that a run was begun with; None where there is none."""
    file = None if run is None else run.data if what == "data" else run.run
    if file is None or not os.path.isfile(file):
        return None
    content: Any = None
    with suppress(PreftuneError):  # damaged, or somebody else's: said where the directory is opened
        content = read_json(file)
    record = content if what == "data" or not isinstance(content, dict) else content.get("base")
    if not isinstance(record, dict) or record.get("name") != name:
        return None
    commit = record.get("commit")
    return commit if isinstance(commit, str) else None


def absolute(config: RunConfig) -> RunConfig:
    """Local paths in full, so that a run can be looked at from anywhere."""

    def full(name: str | None) -> str | None:
        path = Path(os.path.expanduser(name)) if name else None
        return str(path.resolve()) if path and path.exists() else name

    data = config.data.model_copy(
        update={"name": full(config.data.name)} if config.data.name != "world" else {}
    )
    stages = dict(config.stage)
    for name, stage in stages.items():
        if stage.judge is not None and from_outside(stage.judge):
            stages[name] = stage.model_copy(update={"reward_model": full(stage.judge)})
    special = config.model.base in ("scratch", "smollm2")
    model = config.model.model_copy(update={} if special else {"base": full(config.model.base)})
    return config.model_copy(update={"data": data, "model": model, "stage": stages})
