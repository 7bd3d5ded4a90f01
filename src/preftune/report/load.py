"""A run directory read into a `RunView`: what is there, typed; what is not there, named.

A report may be asked for at any time: before evaluation, after one stage, on a run of a friend. Missing files
are fine and are listed in `RunView.missing`; files that cannot be understood are errors that name them.
"""

import math
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from preftune.errors import DataError, InputMissing
from preftune.report.text import clean
from preftune.report.view import (
    MAX_LABEL,
    SFT,
    Comparison,
    Estimate,
    PolicyView,
    RewardModelView,
    Row,
    RunView,
    StageView,
)
from preftune.rundir import BASE, RunDir, policy_name, read_json, read_jsonl, read_text

Parsed = TypeVar("Parsed")
NOT_STARTED = "not started"
NO_POLICY = frozenset(
    {"reward", "pretraining", "evaluation", ""}
)  # algorithms that train no policy to evaluate


def load_run(run: RunDir) -> RunView:
    """Read a run. Raises InputMissing if there is none, DataError for a file that cannot be understood."""
    if not run.path.is_dir():
        raise InputMissing(
            f"there is no run directory at {run.path}", "give the directory that `preftune run` printed"
        )
    config_text = read_text(run.config) if run.config.exists() else ""
    config = _toml(run.config, config_text)
    stages = tuple(_stage(run, name) for name in _stage_names(run, config))
    policies = _policies(run, [stage.name for stage in stages])
    samples = {policy: tuple(read_jsonl(path)) for policy, path in run.samples_files().items()}
    view = RunView(
        name=str(config.get("name") or run.path.resolve().name),
        config=config,
        config_text=config_text,
        record=_optional(run.run),
        data=_optional(run.data),
        stages=tuple(stage for stage in stages if stage.status != NOT_STARTED),
        policies=policies,
        reward_model=_parsed(run.reward_evaluation, _reward_model)
        if run.reward_evaluation.exists()
        else None,
        comparisons=_comparisons(run.comparisons),
        samples=dict(
            sorted(samples.items(), key=lambda item: _rank(item[0], [stage.name for stage in stages]))
        ),
        mistakes=tuple(read_jsonl(run.mistakes)) if run.mistakes.exists() else (),
        missing=_missing(run, stages, {policy.policy for policy in policies}),
    )
    return view


def _toml(path: Path, text: str) -> Row:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"{path}: not valid TOML ({error})") from None


def _optional(path: Path) -> Row:
    value = read_json(path) if path.exists() else {}
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object")
    return value


def _parsed(path: Path, parse: Callable[[Row], Parsed]) -> Parsed:
    """Parse a JSON object; a field of a wrong type becomes an error that names the file."""
    row = _optional(path)
    try:
        return parse(row)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise DataError(f"{path}: unexpected contents ({error!r})") from error


def _stage_names(run: RunDir, config: Row) -> list[str]:
    """Stages in the order of the configuration, after the base model's own, then any others found on disk."""
    folder = run.stage_dir(BASE).parent
    found = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    return list(
        dict.fromkeys([name for name in found if name == BASE] + list(config.get("stage", {})) + found)
    )


def _stage(run: RunDir, name: str) -> StageView:
    row = _optional(run.stage_json(name))
    started = run.stage_dir(name).is_dir()
    metrics = run.metrics(name)
    return StageView(
        name=name,
        algorithm=str(row.get("algorithm", "")),
        status=str(row.get("status", "unfinished" if started else NOT_STARTED)),
        seconds=_number(row.get("seconds")),
        peak_memory_mb=_number(row.get("peak_memory_mb")),
        steps=None if row.get("steps") is None else int(row["steps"]),
        parents=tuple(str(parent) for parent in row.get("parents", ())),
        left_out={str(reason): int(count) for reason, count in (row.get("rejected") or {}).items()},
        metrics=tuple(read_jsonl(metrics)) if metrics.exists() else (),
    )


def _policies(run: RunDir, stages: list[str]) -> tuple[PolicyView, ...]:
    """All evaluations but those of reward models, in the order of the table."""
    paths = run.comparisons.parent.glob("*.json")
    policies = [_parsed(path, _policy) for path in paths if not path.stem.startswith("reward_model")]
    return tuple(sorted(policies, key=lambda policy: _rank(policy.policy, stages)))


def _rank(policy: str, stages: list[str]) -> tuple[int, int, str]:
    """base, sft, the trained policies in the order of their stages, best-of-n last."""
    stage = policy.removeprefix("policy_")
    kind = 0 if policy == BASE else 1 if policy == SFT else 3 if policy.startswith("best_of_") else 2
    return kind, stages.index(stage) if stage in stages else len(stages), policy


def _number(value: Any) -> float | None:
    """A finite or non-finite number; rundir writes the non-finite ones as text."""
    return None if value is None else float(value)


def _numbers(row: Row | None) -> dict[str, float]:
    return {str(key): float(value) for key, value in (row or {}).items() if value is not None}


def _estimate(row: Any) -> Estimate | None:
    """{"mean" or "value", "interval": [low, high], "n"} as an Estimate; a bare number has no interval."""
    if row is None:
        return None
    if not isinstance(row, Mapping):
        return Estimate(value=float(row))
    value = _number(row.get("mean", row.get("value")))
    if value is None:
        return None
    low, high = row.get("interval") or (None, None)
    n = row.get("n")
    return Estimate(value=value, low=_bound(low), high=_bound(high), n=None if n is None else int(n))


def _bound(value: Any) -> float | None:
    """An end of an interval; one that is not finite supports no claim and counts as unknown."""
    number = _number(value)
    return number if number is not None and math.isfinite(number) else None


def _estimates(row: Any) -> dict[str, Estimate]:
    found = {str(key): _estimate(value) for key, value in (row or {}).items()}
    return {key: value for key, value in found.items() if value is not None}


def _policy(row: Row) -> PolicyView:
    reward, difference = row.get("reward") or {}, row.get("reward_difference_to_sft") or {}
    kl, length = row.get("kl") or {}, row.get("length") or {}
    shares = ("empty_share", "role_leakage", "repetition_4", "distinct_1", "distinct_2")
    policy = str(row["policy"])
    return PolicyView(
        policy=policy,
        label=clean(row.get("label") or policy, MAX_LABEL),
        n_prompts=row.get("n_prompts"),
        n_samples=row.get("n_samples"),
        reward=_estimate(reward or None),
        reward_sd=_number(reward.get("sd")),
        difference=_estimate(difference or None),
        win_rate=_estimate(row.get("win_rate_vs_sft")),
        kl_sequence=_estimate(kl.get("exact_per_sequence")),
        kl_token=_estimate(kl.get("exact_per_token")),
        k1_sequence=_estimate(kl.get("k1_per_sequence")),
        k1_token=_estimate(kl.get("k1_per_token")),
        kl_formula=_number(kl.get("formula")),
        length=_estimate(length or None),
        length_median=_number(length.get("median")),
        eos_rate=_estimate(row.get("eos_rate")),
        shares=_numbers({key: row.get(key) for key in shares}),
        gold=_estimate(row.get("gold")),
    )


def _reward_model(row: Row) -> RewardModelView:
    histogram, parts = row.get("margins_histogram") or {}, row.get("gold_component_gaps") or {}
    return RewardModelView(
        n=row.get("n"),
        accuracy=_estimate(row.get("accuracy")),
        ties=row.get("ties"),
        accuracy_ties_half=_number(row.get("accuracy_ties_half")),
        mean_margin=_number(row.get("mean_margin")),
        brier=_number(row.get("brier")),
        ece=_number(row.get("ece")),
        by_source=_estimates(row.get("by_source")),
        by_length=_estimates(row.get("by_length")),
        baselines=_estimates(row.get("baselines")),
        correlation_score_length=_number(row.get("correlation_score_length")),
        margin_edges=tuple(float(edge) for edge in histogram.get("edges", ())),
        margin_counts=tuple(float(count) for count in histogram.get("counts", ())),
        score=_numbers(row.get("score")),
        best_reachable=_number(row.get("best_reachable")),
        gold_parts=_estimates(parts),
        gold_gaps=_numbers(
            {part: gap.get("gap_sd") for part, gap in (row.get("gold_component_gaps") or {}).items()}
        ),
    )


def _comparisons(path: Path) -> tuple[Comparison, ...]:
    if not path.exists():
        return ()
    try:
        return tuple(_comparison(row) for row in read_jsonl(path))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise DataError(f"{path}: unexpected contents ({error!r})") from error


def _comparison(row: Row) -> Comparison:
    difference = _estimate(row)
    if difference is None:
        raise ValueError("a comparison without a mean")
    return Comparison(
        policy=str(row["policy"]),
        reference=str(row["reference"]),
        measure=str(row["measure"]),
        difference=difference,
        p_holm=_number(row.get("p_holm")),
        n_needed=row.get("n_needed"),
    )


def _missing(run: RunDir, stages: tuple[StageView, ...], policies: set[str]) -> tuple[str, ...]:
    """What is not there, in words."""
    files = (
        (run.config, "the configuration"),
        (run.run, "versions and devices"),
        (run.data, "the data record"),
    )
    found = [f"{path.name} ({words})" for path, words in files if not path.exists()]
    for stage in stages:
        if stage.status != "finished":
            found.append(f"stage {clean(stage.name, 60)}: {clean(stage.status, 40)}")
    for stage in stages:
        trained = stage.status == "finished" and stage.name != BASE and stage.algorithm not in NO_POLICY
        if trained and policy_name(stage.name) not in policies:
            found.append(f"the evaluation of {clean(policy_name(stage.name), MAX_LABEL)}")
    if not run.reward_evaluation.exists():
        found.append("the evaluation of the reward model")
    return tuple(found)
