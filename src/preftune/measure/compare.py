"""Two runs side by side on the prompts that both were measured on: `preftune compare RUN_A RUN_B`.

Reads evaluations only, so it needs no torch, no models but their hashes, and no data.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from preftune.errors import DataError, InputMissing
from preftune.evaluation import stats
from preftune.evaluation.compare import judged
from preftune.measure.same_judges import judged_by, no_common_unit, same_gold, same_score
from preftune.records.base import read_record, read_records
from preftune.records.outdated import outdated
from preftune.records.policy import Comparison, PolicyRecord, policy_files
from preftune.records.reward_model import Mistake, RewardModelRecord
from preftune.records.run import DataRecord
from preftune.records.verdict import RULE
from preftune.report.load import check_intact, settings_of
from preftune.report.view import reference_in
from preftune.rundir import RunDir
from preftune.runs.stages import differences

if TYPE_CHECKING:
    from preftune.runs.console import Console

QUALITY = ("score", "gain", "gold")  # more of these is better
MEASURES = (*QUALITY, "kl", "length", "ended")
_COMPARED = ("difference", "mean", "interval", "win_rate", "p_value", "p_holm", "verdict")
WORDS = {
    "score": "score",
    "gain": "score - {reference}",
    "gold": "gold",
    "kl": "KL to {reference}",
    "length": "length",
    "ended": "ends by itself",
}


def compare_runs(a: RunDir, b: RunDir, resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """The comparison as one JSON-able record; differences are b - a, paired by prompt.

    Scores are compared only where both runs have the very same judge, and gold only where both name the same
    one. The gain over its own reference (SFT) is compared, each in the unit of its own reward model; where
    reward functions differ there is no common unit, and both gains stand without difference. Holm's
    correction is over the policies, measure by measure. InputMissing for what is no run or has no evaluation,
    DataError without a common prompt, or for an evaluation of models that are no longer there.
    """
    for run in (a, b):
        check_intact(run)
    ours, theirs = _policies(a), _policies(b)
    references = [_reference(run, policies) for run, policies in ((a, ours), (b, theirs))]
    judges = [judged_by(run, settings_of(run), of.values()) for run, of in ((a, ours), (b, theirs))]
    same, no_unit = {"score": same_score(*judges), "gold": same_gold(*judges)}, no_common_unit(*judges)
    records: list[dict[str, Any]] = []
    common = [name for name in ours if name in theirs]
    prompts = _common_prompts(ours, theirs)
    for measure in MEASURES:
        if not same.get(measure, True):
            continue
        family = [
            _paired_difference(theirs[name], measure, pairs, resamples, seed)
            for name in common
            if (pairs := _pairs(name, measure, (ours, theirs), references, prompts))
        ]
        if measure == "gain" and no_unit:
            records += [{**record, **dict.fromkeys(_COMPARED)} for record in family]
            continue
        records += [_in_words(record) for record in judged(family, f"{measure}, b - a")]
    return {
        "a": str(a.path),
        "b": str(b.path),
        "same_reward_model": same["score"],
        "same_gold": same["gold"],
        "no_common_unit": no_unit or None,
        "references": [
            runs[name].label if name in runs else name
            for runs, name in zip((ours, theirs), references, strict=True)
        ],
        "common_prompts": len(prompts),
        "prompts_of_a": len(next(iter(ours.values())).prompts),
        "prompts_of_b": len(next(iter(theirs.values())).prompts),
        "settings_that_differ": _settings(a, b),
        "only_in_a": [name for name in ours if name not in theirs],
        "only_in_b": [name for name in theirs if name not in ours],
        "policies": records,
        "reward_models": _judges(a, b),
    }


def _policies(run: RunDir) -> dict[str, PolicyRecord]:
    """The run's evaluations that hold numbers by prompt, by policy. DataError where one is of a model that is
    no longer there.
    """
    records = [read_record(path, PolicyRecord) for path in policy_files(run.evaluations)]
    gone = outdated(run)
    if names := [record.label for record in records if gone.policy(record.policy)]:
        raise DataError(
            f"{run.path}: what was measured of {', '.join(names)} is {gone.reason}",
            hint=f"preftune evaluate {run.path} measures what is there",
        )
    policies = {record.policy: record for record in records if record.prompts}
    if not policies:
        raise InputMissing(
            f"{run.path} holds no evaluation with numbers by prompt",
            hint=f"preftune evaluate {run.path}",
        )
    return policies


def _common_prompts(ours: Mapping[str, PolicyRecord], theirs: Mapping[str, PolicyRecord]) -> list[str]:
    """Prompts that every policy of both runs answered, in the order of the first run."""
    sets = [{row.prompt for row in policy.prompts} for policy in (*ours.values(), *theirs.values())]
    everywhere = set.intersection(*sets)
    prompts = [row.prompt for row in next(iter(ours.values())).prompts if row.prompt in everywhere]
    if not prompts:
        raise DataError(
            "the two runs were not measured on a single common prompt",
            hint="compare runs of the same data; evaluation.prompts may differ, data.name may not",
        )
    return prompts


def _reference(run: RunDir, policies: Mapping[str, PolicyRecord]) -> str:
    """The policy that the run's others are compared with."""
    rows = read_records(run.comparisons, Comparison) if run.comparisons.is_file() else []
    return rows[0].reference if rows else reference_in(settings_of(run), policies)


def _values(
    policies: Mapping[str, PolicyRecord], reference: str, name: str, measure: str, prompts: Sequence[str]
) -> list[Any]:
    rows = {row.prompt: row for row in policies[name].prompts}
    if measure != "gain":
        return [getattr(rows[prompt], measure) for prompt in prompts]
    if name == reference or reference not in policies:
        return [None] * len(prompts)
    base = {row.prompt: row.score for row in policies[reference].prompts}
    pairs = [(rows[prompt].score, base[prompt]) for prompt in prompts]
    return [None if score is None or before is None else score - before for score, before in pairs]


def _pairs(
    name: str,
    measure: str,
    runs: Sequence[Mapping[str, PolicyRecord]],
    references: Sequence[str],
    prompts: Sequence[str],
) -> list[tuple[float, float]]:
    """What a policy reaches in the two runs, prompt by prompt where both have a number."""
    sides = [
        _values(policies, reference, name, measure, prompts)
        for policies, reference in zip(runs, references, strict=True)
    ]
    return [(float(x), float(y)) for x, y in zip(*sides, strict=True) if x is not None and y is not None]


def _paired_difference(
    policy: PolicyRecord, measure: str, pairs: Sequence[tuple[float, float]], resamples: int, seed: int
) -> dict[str, Any]:
    a, b = zip(*pairs, strict=True)
    result = stats.paired_bootstrap(b, a, resamples, seed)
    return {
        "policy": policy.policy,
        "label": policy.label,
        "measure": measure,
        "n": len(pairs),
        "a": stats.mean(a, resamples, seed),
        "b": stats.mean(b, resamples, seed),
        "difference": {"mean": result.mean, "interval": list(result.interval)},
        "mean": result.mean,
        "interval": list(result.interval),
        "win_rate": stats.beats(b, a) if measure in QUALITY else None,
        "p_value": result.p_value,
    }


def _in_words(record: dict[str, Any]) -> dict[str, Any]:
    """For what is neither good nor bad in itself the verdict says higher or lower."""
    if record["measure"] in QUALITY:
        return record
    words = {"better": "higher", "worse": "lower"}
    return {**record, "verdict": words.get(record["verdict"], record["verdict"])}


def _settings(a: RunDir, b: RunDir) -> list[str]:
    """Settings of data and evaluation in which the runs differ: reasons to doubt the comparison."""
    ours, theirs = settings_of(a), settings_of(b)
    return [
        f"{section}.{line}"
        for section in ("data", "evaluation")
        for line in differences(ours.get(section, {}), theirs.get(section, {}))
    ]


def _judges(a: RunDir, b: RunDir) -> dict[str, Any] | None:
    """The two reward models; paired, pair by pair, where both were asked about the same validation pairs."""
    if not (a.reward_evaluation.is_file() and b.reward_evaluation.is_file()):
        return None
    records = [read_record(run.reward_evaluation, RewardModelRecord) for run in (a, b)]
    sides = [_accuracy(record) for record in records]
    result: dict[str, Any] = {"a": sides[0], "b": sides[1], "paired": None}
    same = _validation(a) is not None and _validation(a) == _validation(b)
    n = records[0].n
    if not same or not n or n != records[1].n or records[0].left_out != records[1].left_out:
        return result
    wrong = [{row.idx for row in read_records(run.mistakes, Mistake)} for run in (a, b)]
    only_a, only_b = len(wrong[1] - wrong[0]), len(wrong[0] - wrong[1])
    change = [1.0] * only_b + [-1.0] * only_a + [0.0] * (n - only_a - only_b)
    result["paired"] = {
        "a_right_only": only_a,
        "b_right_only": only_b,
        "n": n,
        "difference": (only_b - only_a) / n,
        "interval": list(stats.bootstrap_mean(change)),
        "p_value": stats.mcnemar_exact(only_a, only_b),
    }
    return result


def _accuracy(record: RewardModelRecord) -> dict[str, Any] | None:
    share = record.accuracy
    return (
        None if share is None else {"value": share.value, "interval": [share.low, share.high], "n": share.n}
    )


def _validation(run: RunDir) -> str | None:
    record = read_record(run.data, DataRecord) if run.data.is_file() else DataRecord()
    return record.content_sha256.get("validation")


def show_comparison(console: "Console", result: Mapping[str, Any]) -> None:
    """The comparison as a table, and what makes it less than a fair one."""
    reference = " or ".join(dict.fromkeys(result["references"]))
    headers = ("Policy, measure", "a", "b", "b - a [95 %]", "p (Holm)", "b is")
    console.line(f"a: {result['a']}\nb: {result['b']}\n{result['common_prompts']} common prompts")
    differ = {record["label"] for record in result["policies"] if not _same(record)}
    if same := dict.fromkeys(e["label"] for e in result["policies"] if e["label"] not in differ):
        console.line(f"the same in both runs on every prompt: {', '.join(same)}")
    if differing := [record for record in result["policies"] if record["label"] in differ]:
        console.table(headers, list(comparison_table(differing, reference)))
        console.line(RULE)
    if why := result["no_common_unit"]:
        console.line(
            f"Scores, and gains over {reference}, have no common unit in the two runs ({why}): scores are "
            "not compared, and gains are only shown."
        )
    elif not result["same_reward_model"]:
        console.line(
            "The runs are not known to have the same judge: scores are not compared, gains over "
            f"{reference} are."
        )
    if not result["same_gold"]:
        console.line("The runs are not known to have the same gold: it is not compared.")
    for line in result["settings_that_differ"]:
        console.line(f"setting: {line}")
    judges = result["reward_models"]
    if judges:
        sides = [f"{side}: {_share_in_words(judges[side])}" for side in ("a", "b")]
        paired = judges["paired"]
        p = f"; the same pairs, exact p {paired['p_value']:.3f}" if paired else "; on different pairs"
        console.line(f"reward model accuracy {', '.join(sides)}{p}")


def _share_in_words(share: Mapping[str, Any] | None) -> str:
    if share is None:
        return "not measured"
    return f"{share['value']:.3f}" + ("" if share["n"] is None else f" on {share['n']:,}")


def comparison_table(records: Sequence[Mapping[str, Any]], reference: str) -> Iterator[tuple[str, ...]]:
    """Rows of text: policy and measure, a, b, b - a with interval, corrected p-value, verdict."""
    for record in records:
        cells = (
            f"{record['label']}, {WORDS[record['measure']].format(reference=reference)}",
            f"{record['a']['mean']:.3f}",
            f"{record['b']['mean']:.3f}",
        )
        if record["interval"] is None:
            yield (*cells, "no common unit", "–", "–")
            continue
        low, high = record["interval"]
        difference = f"{record['mean']:+.3f} [{low:+.3f}, {high:+.3f}]"
        yield (
            *cells,
            "the same on every prompt" if _same(record) else difference,
            f"{record['p_holm']:.3f}",
            record["verdict"],
        )


def _same(record: Mapping[str, Any]) -> bool:
    """Whether no prompt differs: the interval of differences that are all 0 has no ends."""
    return record["interval"] is not None and record["mean"] == 0 and math.isinf(record["interval"][0])
