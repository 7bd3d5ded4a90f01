"""A run directory read into a `RunView`: what is there, typed; what is not there, named.

A report may be asked for at any time: before evaluation, after one stage, on a run of a friend. Missing files
are fine and are listed in `RunView.missing`; files that cannot be understood are errors that name them.
"""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from preftune.config import config_of
from preftune.errors import DataError, InputMissing
from preftune.records.base import R, read_record, read_records
from preftune.records.outdated import AGAIN, Outdated, outdated, outdated_in
from preftune.records.policy import (
    BEST_OF,
    REWARD_MODEL,
    BestOfCurve,
    Comparison,
    PairsFile,
    PairsPolicy,
    PolicyRecord,
    policy_files,
)
from preftune.records.reward_model import Mistake, RewardModelRecord
from preftune.records.run import TOKENS, DataRecord, OriginsRecord, RunRecord, SampleRow, TokenRow
from preftune.records.stage import MetricsRow, StageRecord
from preftune.report.text import clean, join
from preftune.report.view import MAX_LABEL, SFT, OtherPairs, Row, RunView, StageView, scored_by_model
from preftune.rundir import BASE, RunDir, policy_name, read_text
from preftune.sums import check, check_own, read_sealed

P = TypeVar("P", bound=PolicyRecord)
NOT_STARTED = "not started"
NO_POLICY = frozenset({"pretraining", "evaluation", ""})  # besides algorithms that train none


def load_run(run: RunDir) -> RunView:
    """Read a run. Raises InputMissing if there is none, DataError for a file that cannot be understood."""
    check_intact(run)
    config_text = read_text(run.config) if run.config.exists() else ""
    config = settings_of(run)
    stages = tuple(_stage(run, name, config) for name in _stage_names(run, config))
    names = [stage.name for stage in stages]
    gone = outdated(run)
    measured = _policies(run.evaluations, PolicyRecord, names)
    policies = tuple(policy for policy in measured if not gone.policy(policy.policy))
    judge, other_models = _optional(run.reward_evaluation, RewardModelRecord), _other_reward_models(run)
    of_judge = judge is None or not gone.judge(judge.stage)
    samples = {policy: tuple(read_records(path, SampleRow)) for policy, path in run.samples_files().items()}
    samples = {policy: rows for policy, rows in samples.items() if not gone.policy(policy)}
    other_pairs, old_pairs = _other_pairs(run, names)
    best_of, origins = _optional(run.evaluation(BEST_OF), BestOfCurve), _optional(run.origins, OriginsRecord)
    return RunView(
        name=str(config.get("name") or run.path.resolve().name),
        config=config,
        config_text=config_text,
        record=_optional(run.run, RunRecord) or RunRecord(),
        data=_optional(run.data, DataRecord),
        stages=tuple(stage for stage in stages if stage.status != NOT_STARTED),
        policies=policies,
        reward_model=judge if of_judge else None,
        other_reward_models=tuple(model for model in other_models if not gone.judge(model.stage)),
        other_pairs=other_pairs,
        best_of=best_of.points if best_of and not gone.all else (),
        origins=origins.origins if origins else {},
        recipe=origins.recipe if origins else "",
        comparisons=_comparisons(run, gone),
        samples=dict(sorted(samples.items(), key=lambda item: _rank(item[0], names))),
        mistakes=tuple(read_records(run.mistakes, Mistake)) if of_judge and run.mistakes.exists() else (),
        tokens=_tokens(run.analysis_details / TOKENS, stages),
        missing=_missing_parts(run, stages, policies, gone, judged=scored_by_model(config, policies)),
        outdated=(*_outdated_note(gone, measured, [judge, *other_models]), *old_pairs),
    )


def _comparisons(run: RunDir, gone: Outdated) -> tuple[Comparison, ...]:
    rows = read_records(run.comparisons, Comparison) if run.comparisons.exists() else []
    return tuple(row for row in rows if not gone.policy(row.policy) and not gone.policy(row.reference))


def _outdated_note(
    gone: Outdated,
    policies: Sequence[PolicyRecord],
    reward_models: Sequence[RewardModelRecord | None],
    on_pairs: str = "",
    remedy: str = AGAIN,
) -> tuple[str, ...]:
    """What was measured of models that are no longer there, in a sentence; nothing where all are there."""
    names = [policy.label for policy in policies if gone.policy(policy.policy)]
    names += [clean(model.stage, MAX_LABEL) for model in reward_models if model and gone.judge(model.stage)]
    if not names:
        return ()
    return (f"What was measured{on_pairs} of {join(names)} is left out: it is {gone.reason}; {remedy}.",)


def _tokens(path: Path, stages: tuple[StageView, ...]) -> tuple[TokenRow, ...]:
    """Without those of a policy that was trained again since."""
    keys = {stage.name: stage.record.key for stage in stages}
    rows = read_records(path, TokenRow) if path.exists() else []
    return tuple(row for row in rows if keys.get(row.stage) == row.key)


def check_intact(run: RunDir) -> None:
    """InputMissing for a directory that is not there or holds nothing that a run writes. DataError for a file
    that a report quotes and that is not what was written: settings, data, the logs of finished stages, the
    evaluation and its samples. (Models are checked when they are loaded.)
    """
    if not run.path.is_dir():
        raise InputMissing(
            f"there is no run directory at {run.path}", "give the directory that `preftune run` printed"
        )
    if not any(path.exists() for path in (run.config, run.stages, run.evaluations)):
        raise InputMissing(
            f"{run.path} is not a run directory: no config.toml, stages/ or evaluation/",
            "give the directory that `preftune run` printed",
        )
    check_own(run, run.config, run.run, run.data, run.origins)
    for file in sorted(run.stages.glob("*/stage.json")):
        record = read_sealed(file)
        logs = f"remove {file.parent} and run the command that made the run, which trains that stage again"
        check(run, record, logs, "stages/")
        for folder in ("evaluation/", "samples/", "analysis/"):
            check(run, record, f"preftune evaluate {run.path} makes it again", folder)
    for file in run.pairs_records():
        check(run, read_sealed(file), f"remove {file.parent} and evaluate those pairs again")


def settings_of(run: RunDir) -> Row:
    """The settings of config.toml; none without it. DataError, naming the file, for what is no TOML, or no
    table of settings where there should be one.
    """
    if not run.config.is_file():
        return {}
    try:
        config = tomllib.loads(read_text(run.config))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise DataError(f"{run.config}: not valid TOML ({error})") from None
    tables = {key: config[key] for key in ("model", "data", "evaluation", "stage") if key in config}
    stages = tables.get("stage")
    tables |= {f"stage.{key}": value for key, value in stages.items()} if isinstance(stages, dict) else {}
    for key, value in tables.items():
        if not isinstance(value, dict):
            raise DataError(f"{run.config}: {key} is no table of settings", OriginsRecord.remedy)
    return config


def _optional(path: Path, kind: type[R]) -> R | None:
    return read_record(path, kind) if path.exists() else None


def _stage_names(run: RunDir, config: Row) -> list[str]:
    """Stages in the order of the configuration, after the base model's own, then any others found on disk."""
    folder = run.stages
    on_disk = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    return list(
        dict.fromkeys([name for name in on_disk if name == BASE] + list(config.get("stage", {})) + on_disk)
    )


def _stage(run: RunDir, name: str, config: Row) -> StageView:
    file, metrics = run.stage_json(name), run.metrics(name)
    record = read_record(file, StageRecord) if file.exists() else StageRecord()
    started, finished = run.stage_dir(name).is_dir(), record.status == "finished"
    return StageView(
        name=name,
        status=record.status or ("unfinished" if started else NOT_STARTED),
        record=record,
        metrics=tuple(read_records(metrics, MetricsRow, whole=finished)) if metrics.exists() else (),
        settings=config.get("stage", {}).get(name, {}),
    )


def _policies(directory: Path, kind: type[P], stages: list[str]) -> tuple[P, ...]:
    """All evaluations in a directory but those of reward models, in the order of the table."""
    paths = sorted(policy_files(directory), key=lambda path: _rank(path.stem, stages))
    return tuple(read_record(path, kind) for path in paths)


def _other_reward_models(run: RunDir) -> tuple[RewardModelRecord, ...]:
    """Reward models that score no policy in training, by stage."""
    paths = sorted(run.evaluations.glob(f"{REWARD_MODEL}_*.json"))
    return tuple(read_record(path, RewardModelRecord) for path in paths)


def _other_pairs(run: RunDir, stages: list[str]) -> tuple[tuple[OtherPairs, ...], tuple[str, ...]]:
    """What `evaluate --pairs` left, by name, and what is left out of it, as models have changed since; one
    that did not get as far as its record has nothing.
    """
    evaluated, left_out = list[OtherPairs](), list[str]()
    for path in run.pairs_records():
        gone, of = outdated_in(run, path.parent, read_sealed(path)), read_record(path, PairsFile)
        reward_models = [
            read_record(file, RewardModelRecord) for file in sorted(path.parent.glob(f"{REWARD_MODEL}*.json"))
        ]
        policies = _policies(path.parent, PairsPolicy, stages)
        on_it = f" on {clean(of.file, MAX_LABEL)}"
        left_out += _outdated_note(
            gone, policies, reward_models, on_it, AGAIN.replace("RUN", "RUN --pairs FILE")
        )
        judges = tuple(model for model in reward_models if not gone.judge(model.stage))
        policies = tuple(policy for policy in policies if not gone.policy(policy.policy))
        if judges or policies or not gone.stages:
            evaluated.append(OtherPairs(of=of, reward_models=judges, policies=policies))
    return tuple(evaluated), tuple(left_out)


def _rank(policy: str, stages: list[str]) -> tuple[int, int, str]:
    """base, sft, the trained policies in the order of their stages, best-of-n last."""
    stage = policy.removeprefix("policy_")
    kind = 0 if policy == BASE else 1 if policy == SFT else 3 if policy.startswith("best_of_") else 2
    return kind, stages.index(stage) if stage in stages else len(stages), policy


def _missing_parts(
    run: RunDir,
    stages: tuple[StageView, ...],
    policies: tuple[PolicyRecord, ...],
    gone: Outdated,
    *,
    judged: bool,
) -> tuple[str, ...]:
    """What is not there, in words. `judged`: whether there is a reward model to be measured."""
    evaluated = {policy.policy for policy in policies}
    files = (
        (run.config, "the configuration"),
        (run.run, "versions and devices"),
        (run.data, "the data record"),
    )
    absent = [f"{path.name} ({words})" for path, words in files if not path.exists()]
    for stage in stages:
        if stage.status != "finished":
            absent.append(f"stage {clean(stage.name, 60)}: {clean(stage.status, 40)}")
    for stage in stages:
        kind = config_of(stage.algorithm)
        policy = kind.trains_policy if kind else stage.algorithm not in NO_POLICY
        trained = stage.status == "finished" and stage.name != BASE and policy
        if trained and policy_name(stage.name) not in evaluated:
            again = f" ({AGAIN})" if gone.policy(policy_name(stage.name)) else ""
            absent.append(f"the evaluation of {clean(policy_name(stage.name), MAX_LABEL)}{again}")
    if judged and not run.reward_evaluation.exists():
        absent.append("the evaluation of the reward model")
    return tuple(absent)
