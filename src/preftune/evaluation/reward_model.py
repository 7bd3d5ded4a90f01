"""Is the reward model any good? Accuracy with its interval, baselines on the same pairs, calibration,
mistakes.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from preftune.data import Preference
from preftune.data.encode import Encoder
from preftune.evaluation import stats
from preftune.models.roles import RewardModel
from preftune.seeding import derive_seed

_REFUSALS = (
    "i'm sorry",
    "i am sorry",
    "i can't",
    "i cannot",
    "i don't know",
    "i'm not sure",
    "i won't",
    "as an ai",
)


@torch.no_grad()
def score_pairs(
    model: RewardModel,
    encoder: Encoder,
    pairs: Sequence[Preference],
    batch_size: int,
    device: torch.device,
    advance: Callable[[int], None],
) -> list[dict[str, Any]]:
    """Raw scores of both responses of every pair, with their lengths in tokens (EOS counted)."""
    scored = []
    for start in range(0, len(pairs), batch_size):
        part = pairs[start : start + batch_size]
        batch = encoder.pairs(part)
        sides = [model.raw_scores(side.to(device)).tolist() for side in (batch.chosen, batch.rejected)]
        lengths = [side.response.sum(1).tolist() for side in (batch.chosen, batch.rejected)]
        for i, pair in enumerate(part):
            scored.append(
                {
                    "pair": pair,
                    "chosen": sides[0][i],
                    "rejected": sides[1][i],
                    "chosen_length": lengths[0][i],
                    "rejected_length": lengths[1][i],
                }
            )
        advance(len(part))
    return scored


def audit(stage: str, scored: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
    """The content of evaluation/reward_model.json."""
    margins = np.array([s["chosen"] - s["rejected"] for s in scored])
    lengths = np.array([s["chosen_length"] - s["rejected_length"] for s in scored])
    scores = np.array([s[side] for s in scored for side in ("chosen", "rejected")])
    tokens = np.array([s[f"{side}_length"] for s in scored for side in ("chosen", "rejected")])
    label, probability = _oriented(margins, seed)
    counts, edges = np.histogram(margins, bins=30)
    return {
        "stage": stage,
        "n": len(scored),
        "accuracy": _accuracy(margins),
        "accuracy_ties_half": float(np.mean((margins > 0) + 0.5 * (margins == 0))),
        "ties": int((margins == 0).sum()),
        "mean_margin": float(margins.mean()),
        "brier": stats.brier(probability, label),
        "ece": stats.ece(probability, label),
        "by_source": _by_source(scored, margins),
        "by_length": {
            "chosen_longer": _accuracy(margins[lengths > 0]),
            "rejected_longer": _accuracy(margins[lengths < 0]),
        },
        "baselines": {"longer": _rule(lengths), "shorter": _rule(-lengths)},
        "correlation_score_length": _correlation(scores, tokens),
        "margins_histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        "score": {
            "mean": float(scores.mean()),
            "sd": float(scores.std(ddof=1)) if len(scores) > 1 else 0.0,
            "min": float(scores.min()),
            "max": float(scores.max()),
        },
        "best_reachable": None,
        "gold_component_gaps": None,
    }


def mistakes(scored: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every pair whose rejected response scores no lower than the chosen one, the most confident first."""
    wrong = [s for s in scored if s["chosen"] <= s["rejected"]]
    wrong.sort(key=lambda s: (s["chosen"] - s["rejected"], s["pair"].row))
    return [
        {
            "idx": s["pair"].row,
            "prompt": s["pair"].prompt.transcript(),
            "chosen": s["pair"].chosen,
            "rejected": s["pair"].rejected,
            "reward_chosen": s["chosen"],
            "reward_rejected": s["rejected"],
            "margin": s["chosen"] - s["rejected"],
            "source": s["pair"].source,
            "tags": _tags(s),
        }
        for s in wrong
    ]


def gap(scored: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How far apart pairs are that differ in one thing alone: their mean margin in sd of the scores, with the
    accuracy. A gap of 0 means that the reward model does not see that thing.
    """
    margins = np.array([s["chosen"] - s["rejected"] for s in scored])
    scores = np.array([s[side] for s in scored for side in ("chosen", "rejected")])
    sd = float(scores.std(ddof=1))
    return {**_accuracy(margins), "gap_sd": float(margins.mean()) / sd if sd > 0 else 0.0}


def _accuracy(margins: np.ndarray) -> dict[str, Any]:
    """Share of pairs in the right order; a tie counts as wrong."""
    n, right = len(margins), int((margins > 0).sum())
    return {"value": right / n if n else None, "interval": list(stats.wilson(right, n)), "n": n}


def _rule(advantages: np.ndarray) -> dict[str, Any]:
    """A rule without a model; where it cannot decide it tosses a coin, so a tie counts half."""
    n = len(advantages)
    right = float(((advantages > 0) + 0.5 * (advantages == 0)).sum())
    return {"value": right / n if n else None, "interval": list(stats.wilson(right, n)), "n": n}


def _oriented(margins: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels and σ(margin) with each pair turned at random: always chosen first would make every label 1."""
    rng = random.Random(derive_seed(seed, "orientation"))
    sign = np.array([rng.choice((-1.0, 1.0)) for _ in margins])
    return (sign > 0).astype(float), 1 / (1 + np.exp(-np.clip(sign * margins, -500, 500)))


def _by_source(scored: Sequence[dict[str, Any]], margins: np.ndarray) -> dict[str, Any]:
    groups: dict[str, list[int]] = defaultdict(list)
    for i, s in enumerate(scored):
        groups[s["pair"].source or "all"].append(i)
    return {source: _accuracy(margins[rows]) for source, rows in sorted(groups.items())}


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    return float(np.corrcoef(a, b)[0, 1]) if len(a) > 1 and a.std() > 0 and b.std() > 0 else None


def _tags(s: dict[str, Any]) -> list[str]:
    """Automatic labels for error patterns."""
    chosen, rejected = s["pair"].chosen, s["pair"].rejected
    words = [set(text.lower().split()) for text in (chosen, rejected)]
    shared = len(words[0] & words[1]) / max(len(words[0] | words[1]), 1)
    refusal = [any(phrase in text.lower() for phrase in _REFUSALS) for text in (chosen, rejected)]
    checks = {
        "tie": s["chosen"] == s["rejected"],
        "prefers the longer": s["rejected_length"] > s["chosen_length"],
        "prefers the shorter": s["rejected_length"] < s["chosen_length"],
        "chosen refuses": refusal[0] and not refusal[1],
        "rejected refuses": refusal[1] and not refusal[0],
        "nearly the same words": shared >= 0.6,
        "very short": min(len(chosen.split()), len(rejected.split())) <= 3,
    }
    return [tag for tag, holds in checks.items() if holds]
