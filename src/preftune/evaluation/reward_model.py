"""Is the reward model any good? Accuracy with its interval, baselines on the same pairs, calibration."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from preftune.data import Preference, row_key
from preftune.data.encode import Encoder
from preftune.evaluation import stats
from preftune.evaluation.baselines import BagOfWords, baseline_tests, power, rule_accuracy
from preftune.evaluation.by_prompt import indices, turns_name
from preftune.evaluation.calibration import calibration
from preftune.evaluation.mistakes import tag_counts
from preftune.functional.masked import is_end
from preftune.models.roles import RewardModel

LENGTH_BINS = 8  # equally full ones, of both responses together


@torch.no_grad()
def score_pairs(
    model: RewardModel,
    encoder: Encoder,
    pairs: Sequence[Preference],
    batch_size: int,
    device: torch.device,
    advance: Callable[[int], None],
) -> list[dict[str, Any]]:
    """Raw scores of both responses of every pair, with their lengths in tokens (EOS counted); of an ensemble
    those of its members, too.
    """
    scored = []
    for start in range(0, len(pairs), batch_size):
        chunk = pairs[start : start + batch_size]
        batch = encoder.pairs(chunk)
        columns: dict[str, list[Any]] = {}
        for name, side in (("chosen", batch.chosen), ("rejected", batch.rejected)):
            last = side.ids.gather(1, side.attention.sum(1, keepdim=True) - 1).squeeze(1)
            scores, members = model.raw_and_members(side.to(device))
            columns[name] = scores.tolist()
            if members is not None:
                columns[f"{name}_members"] = members.T.tolist()
            columns[f"{name}_length"] = side.response.sum(1).tolist()
            columns[f"{name}_truncated"] = (~is_end(last, encoder.ends)).tolist()
        for i, pair in enumerate(chunk):
            scored.append({"pair": pair} | {name: values[i] for name, values in columns.items()})
        advance(len(chunk))
    return scored


def examine(
    stage: str,
    scored: Sequence[dict[str, Any]],
    seed: int,
    bag: BagOfWords | None = None,
    resamples: int = 2000,
) -> dict[str, Any]:
    """The content of evaluation/reward_model.json that follows from the scores alone. Pairs of one prompt are
    not independent: intervals and tests are over prompts where they repeat.
    """
    margins = np.array([s["chosen"] - s["rejected"] for s in scored])
    lengths = np.array([s["chosen_length"] - s["rejected_length"] for s in scored])
    prompts = np.unique([row_key(s["pair"]) for s in scored], return_inverse=True)[1]
    halves = stats.share_by_group(stats.wins(margins, 0.0), prompts)
    margin = stats.mean(margins, resamples, seed, prompts)
    counts, edges = np.histogram(margins, bins=30)
    return {
        "stage": stage,
        "n": len(scored),
        "accuracy": _accuracy(margins, prompts),
        "accuracy_ties_half": halves["value"],
        "accuracy_ties_half_interval": halves["interval"],
        "ties": int((margins == 0).sum()),
        "mean_margin": margin["mean"],
        "mean_margin_interval": margin["interval"],
        **calibration(margins, seed, resamples, prompts),
        "by_source": _by_group([s["pair"].source or "all" for s in scored], margins, prompts),
        "by_length": {
            "chosen_longer": _accuracy(margins[lengths > 0], prompts[lengths > 0]),
            "rejected_longer": _accuracy(margins[lengths < 0], prompts[lengths < 0]),
        },
        "by_length_difference": by_length_difference(lengths, margins, prompts),
        "by_turns": _by_group([turns_name(s["pair"]) for s in scored], margins, prompts),
        **_against_baselines(scored, margins, lengths, prompts, bag, resamples, seed),
        **_length_correlation(scored, prompts, resamples, seed),
        "score_by_length": score_by_length(scored, prompts, resamples, seed),
        "margins_histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        "score": _scores(scored),
        "n_mistakes": int((margins <= 0).sum()),
        **_members(scored, prompts, resamples, seed),
        "mistake_tags": tag_counts(scored, prompts),
        "best_reachable": None,
        "gold_component_gaps": None,
    }


def _members(
    scored: Sequence[dict[str, Any]], prompts: stats.Groups, resamples: int, seed: int
) -> dict[str, Any]:
    """Of an ensemble: each member's accuracy, that of all together where they agree, and the sd of the margin
    among them, in sd of scores; {} for one model.
    """
    if "chosen_members" not in scored[0]:
        return {}
    margins = np.array([np.subtract(s["chosen_members"], s["rejected_members"]) for s in scored])  # (n, M)
    agreed = np.abs(np.sign(margins).sum(1)) == margins.shape[1]
    return {
        "members": {f"member-{i}": _accuracy(member, prompts) for i, member in enumerate(margins.T)},
        "unanimous": _accuracy(margins[agreed, 0], prompts[agreed]),
        "disagreement": stats.mean(margins.std(1), resamples, seed, prompts),
    }


def _against_baselines(
    scored: Sequence[dict[str, Any]],
    margins: np.ndarray,
    lengths: np.ndarray,
    prompts: stats.Groups,
    bag: BagOfWords | None,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """The keys baselines, baseline_tests and power."""
    rules = {"longer": lengths, "shorter": -lengths}
    if bag is not None:
        rules["bag_of_words"] = bag.advantages([s["pair"] for s in scored])
    baselines = {name: rule_accuracy(advantages, prompts) for name, advantages in rules.items()}
    if bag is not None:
        baselines["bag_of_words"] |= {"trained_on": bag.trained_on, "words": len(bag.words), "l2": bag.l2}
    tests = baseline_tests(margins, rules, prompts, resamples, seed)
    return {
        "baselines": baselines,
        "baseline_tests": tests,
        "power": power(
            float((margins > 0).mean()), len(scored), tests, stats.design_effect(margins > 0, prompts)
        ),
    }


def gap(scored: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How far apart pairs are that differ in one thing alone: their mean margin in sd of the scores, with the
    accuracy. A gap of 0 means that the reward model does not see that thing.
    """
    margins = np.array([s["chosen"] - s["rejected"] for s in scored])
    scores = np.array([s[side] for s in scored for side in ("chosen", "rejected")])
    sd = float(scores.std(ddof=1))
    right = stats.share(int((margins > 0).sum()), len(margins))
    return {**right, "gap_sd": float(margins.mean()) / sd if sd > 0 else 0.0}


def by_length_difference(
    lengths: np.ndarray, margins: np.ndarray, prompts: stats.Groups
) -> list[dict[str, Any]]:
    """Accuracy by tokens of chosen minus tokens of rejected: equal lengths, and thirds of either side."""
    cuts = {0, 1}
    for side in (lengths[lengths < 0], lengths[lengths > 0]):
        if len(side):
            cuts |= {int(cut) for cut in np.quantile(side, [1 / 3, 2 / 3], method="nearest")}
    edges: list[int | None] = [None, *sorted(cuts), None]
    records = []
    for low, high in pairwise(edges):
        rows = (lengths >= (low if low is not None else -np.inf)) & (
            lengths < (high if high is not None else np.inf)
        )
        if rows.any():
            accuracy = _accuracy(margins[rows], prompts[rows])
            records.append({"label": _span(low, high), "low": low, "high": high, **accuracy})
    return records


def _span(low: int | None, high: int | None) -> str:
    """Whole numbers from `low` up to, not including, `high`, in words."""
    if low is None or high is None:
        return f"{low} or more" if high is None else f"{high - 1} or less"
    return str(low) if high == low + 1 else f"{low} to {high - 1}"


def _accuracy(margins: np.ndarray, prompts: stats.Groups) -> dict[str, Any]:
    """Share of pairs in the right order; a tie counts as wrong."""
    return stats.share_by_group(margins > 0, prompts)


def _by_group(names: Sequence[str], margins: np.ndarray, prompts: stats.Groups) -> dict[str, Any]:
    return {name: _accuracy(margins[rows], prompts[rows]) for name, rows in indices(names).items()}


def _scores(scored: Sequence[dict[str, Any]]) -> dict[str, float]:
    scores = np.array([s[side] for s in scored for side in ("chosen", "rejected")])
    return {
        "mean": float(scores.mean()),
        "sd": float(scores.std(ddof=1)) if len(scores) > 1 else 0.0,
        "min": float(scores.min()),
        "max": float(scores.max()),
    }


def _length_correlation(
    scored: Sequence[dict[str, Any]], prompts: stats.Groups, resamples: int, seed: int
) -> dict[str, Any]:
    """Pearson correlation of score and length over both sides; prompts are redrawn with all their pairs for
    its interval.
    """
    scores = np.array([[s["chosen"], s["rejected"]] for s in scored])
    tokens = np.array([[s["chosen_length"], s["rejected_length"]] for s in scored], dtype=float)
    value = _correlation(scores, tokens)
    interval = None
    if value is not None:

        def redrawn(rows: np.ndarray) -> float:
            correlation = _correlation(scores[rows], tokens[rows])
            return np.nan if correlation is None else correlation

        interval = list(stats.bootstrap_statistic(redrawn, len(scored), resamples, seed, groups=prompts))
    return {"correlation_score_length": value, "correlation_score_length_interval": interval}


def score_by_length(
    scored: Sequence[dict[str, Any]], prompts: stats.Groups, resamples: int, seed: int
) -> list[dict[str, Any]]:
    """Mean raw score of chosen and of rejected responses by their length: bins from `low` up to, not
    including, `high` tokens, equally full but for ties. A side without a response in a bin is None.
    """
    sides = {
        side: (np.array([s[f"{side}_length"] for s in scored]), np.array([s[side] for s in scored]))
        for side in ("chosen", "rejected")
    }
    lengths = np.concatenate([tokens for tokens, _ in sides.values()])
    inner = np.quantile(lengths, np.linspace(0, 1, LENGTH_BINS + 1)[1:-1], method="nearest")
    edges = sorted({int(lengths.min()), *(int(edge) for edge in inner), int(lengths.max()) + 1})
    records = []
    for low, high in pairwise(edges):
        record: dict[str, Any] = {"low": low, "high": high}
        record["length"] = float(lengths[(lengths >= low) & (lengths < high)].mean())
        for side, (tokens, scores) in sides.items():
            rows = (tokens >= low) & (tokens < high)
            in_bin = rows.any()
            record[side] = stats.mean(scores[rows], resamples, seed, prompts[rows]) if in_bin else None
        records.append(record)
    return records


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    a, b = a.ravel(), b.ravel()
    return float(np.corrcoef(a, b)[0, 1]) if len(a) > 1 and a.std() > 0 and b.std() > 0 else None
