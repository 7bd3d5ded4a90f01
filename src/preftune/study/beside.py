"""What stands beside gold: other judges, and whether replies are still varied text.

A gain by a judge that looks at words counts only where a policy stayed near SFT, kept its variety and writes
what the base does not find unlikely. The limits are the ones that the study of real text was planned with.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from preftune.evaluation.pooled import gain_ends, pooled_means, pooled_verdict
from preftune.evaluation.stats import Floats
from preftune.study.cells import interval
from preftune.study.values import SeedValues

MOST_KL = 10.0  # nats a reply
LEAST_DISTINCT = 0.9  # of SFT's distinct-2
DISTINCT_OF = 192  # replies: the ratio falls as text grows, so the limit is for one amount of it
MOST_PERPLEXITY = 1.5  # of SFT's perplexity under the base


def other_judges(seeds: Sequence[SeedValues], name: str, kind: str, resamples: int) -> dict[str, Any]:
    """By judge: the policy's mean, and its gain over the reference on the same prompts, pooled, by seed."""
    result = {}
    for judge in seeds[0].sets[seeds[0].facts.reference][kind].golds:
        tables = [_table(values, name, kind, judge) for values in seeds]
        pooled = pooled_means(tables, resamples)
        gains = [table[:, 1] for table in tables]
        low, high = gain_ends(float(pooled.low[1]), float(pooled.high[1]), gains)
        result[judge] = {
            "mean": float(pooled.mean[0]),
            "gain": float(pooled.mean[1]),
            "gain_low": low,
            "gain_high": high,
            "verdict": None if low == high == 0 else pooled_verdict(low, high, tables),
            "by_seed": [float(table[:, 1].mean()) for table in tables],
        }
    return result


def _table(values: SeedValues, name: str, kind: str, judge: str) -> Floats:
    """(prompts, 2): score, and gain over the reference."""
    reference = np.array(values.sets[values.facts.reference][kind].golds[judge])
    if name.startswith("best_of_"):
        n = int(name.removeprefix("best_of_"))
        scores = np.array(values.best_sets[kind].golds[judge])[:, n - 1]
    else:
        scores = np.array(values.sets[name][kind].golds[judge])
    return np.stack([scores, scores - reference], axis=1)


def as_text(seeds: Sequence[SeedValues], name: str, kind: str, kl: float | None) -> dict[str, Any] | None:
    """Variety and perplexity under the base beside SFT's, means over seeds; None where not measured.

    `counts`: whether the limits above are kept, by the means. `kl`: the policy's, nats a reply, where known.
    `distinct_2_replies`: of how many replies the variety is at most; None: of all, where a seed of before has
    no other.
    """
    if name.startswith("best_of_"):
        return None  # a choice among SFT's own replies
    pairs = [(values.sets[name][kind], values.sets[values.facts.reference][kind]) for values in seeds]
    at_one_amount = all(values.distinct_2_rarefied is not None for pair in pairs for values in pair)
    key = "distinct_2_rarefied" if at_one_amount else "distinct_2"
    variety = _mean(_share(getattr(policy, key), getattr(sft, key)) for policy, sft in pairs)
    perplexity = _mean(
        _share(_perplexity(policy.base_nll), _perplexity(sft.base_nll)) for policy, sft in pairs
    )
    if variety is None or perplexity is None:
        return None
    near = kl is not None and kl <= MOST_KL
    return {
        "distinct_2_of_reference": variety,
        "distinct_2_replies": DISTINCT_OF if at_one_amount else None,
        "perplexity_of_reference": perplexity,
        "counts": near and variety >= LEAST_DISTINCT and perplexity <= MOST_PERPLEXITY,
    }


def _mean(values: Iterable[float | None]) -> float | None:
    measured = list(values)
    return None if None in measured else float(np.mean(np.array(measured, dtype=float)))


def _share(value: float | None, reference: float | None) -> float | None:
    return None if value is None or not reference else value / reference


def _perplexity(nll: float | None) -> float | None:
    return None if nll is None else math.exp(min(nll, 700.0))


def section(study: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Heads and rows of the table in STUDY.md; no rows where nothing was measured beside gold."""
    policies = {
        name: policy
        for name, policy in study["policies"].items()
        if policy.get("others") or policy.get("text")
    }
    judges = list(next(iter(policies.values()))["others"]) if policies else []
    heads = ["policy", "gold gain", *(f"gain, {judge}" for judge in judges), "seeds above 0 (gold; others)"]
    rows = []
    for name, policy in policies.items():
        text = policy.get("text")
        gains = [interval(judge, "gain", sign=True, digits=3) for judge in policy["others"].values()]
        gold_gains = [seed["policies"][name]["gold_gain"] for seed in study["seeds"]]
        above = [gold_gains, *(o["by_seed"] for o in policy["others"].values())]
        shares = ["-", "-", "-"]
        if text is not None:
            shares = [f"{text['distinct_2_of_reference']:.2f}", f"{text['perplexity_of_reference']:.2f}"]
            shares.append("yes" if text["counts"] else "no")
        counts = "; ".join(f"{sum(gain > 0 for gain in by_seed)} of {len(by_seed)}" for by_seed in above)
        gold = interval(policy, "gold_gain", sign=True, digits=3)
        kl = None if policy["kl"] is None else f"{policy['kl']:.2f}"
        rows.append([policy["label"], gold, *gains, counts, kl, *shares])
    return [
        *heads,
        "KL, nats",
        "distinct-2 / SFT's",
        "perplexity under the base / SFT's",
        "within limits",
    ], rows
