"""From measured responses to the numbers of evaluation/<policy>.json. Intervals are over prompts."""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from preftune.config import EvaluationConfig
from preftune.evaluation import stats
from preftune.evaluation.best_of_n import kl_formula
from preftune.evaluation.policy import Conditions, Row, Summary, gold_columns
from preftune.evaluation.variety import corpus_distinct_n


def summarise(
    policy: str,
    label: str,
    rows: Sequence[Row],
    conditions: Conditions,
    best_of_n: int | None = None,
    reverse: Sequence[float] | None = None,
    human: Sequence[Row] = (),
) -> Summary:
    """The content of evaluation/<policy>.json but for the comparisons. `reverse`: KL(reference || policy) of
    each of the reference's responses; `human`: the chosen responses as rows.
    """
    settings, seed = conditions.settings, conditions.seed
    lengths, longest = [row["length"] for row in rows], settings.max_new_tokens
    return {
        "policy": policy,
        "label": label,
        "n_prompts": len(conditions.prompts),
        "n_samples": len(rows),
        "score": _spread([row["score"] for row in rows], settings, seed) if conditions.scorer else None,
        "score_difference_to_sft": None,
        "win_rate_vs_sft": None,
        "score_difference_to_chosen": None,
        "win_rate_vs_chosen": None,
        "held_out_score": _spread([row["held_out"] for row in rows], settings, seed)
        if conditions.held_out
        else None,
        "held_out_difference_to_sft": None,
        "length_controlled": None,
        "by_prompt": {},
        "kl": _kl(rows, reverse, settings, seed) if best_of_n is None else {"formula": kl_formula(best_of_n)},
        "length": {"median": float(np.median(lengths)), **_possible(_mean(lengths, settings, seed), longest)},
        "eos_rate": stats.share(sum(row["ended"] for row in rows), len(rows)),
        **_texts(rows, settings, seed),
        "gold": _spread([row["gold"] for row in rows], settings, seed)
        if conditions.gold or conditions.golds
        else None,
        **_golds(rows, conditions),
        **_disagreement(rows, settings, seed),
        "prompts": _prompts(rows, reverse, human),
    }


def _disagreement(rows: Sequence[Row], settings: EvaluationConfig, seed: int) -> Summary:
    """How far apart an ensemble's members are about a response: the mean of the sd of their scores."""
    if "members" not in rows[0]:
        return {}
    return {"disagreement": _mean([float(np.std(row["members"])) for row in rows], settings, seed)}


def _golds(rows: Sequence[Row], conditions: Conditions) -> Summary:
    """Every named judge's scores, where there is one."""
    columns = gold_columns({name: name for name in conditions.golds}, conditions.gold is not None)
    golds = {
        name: _spread([row[column] for row in rows], conditions.settings, conditions.seed)
        for column, name in columns.items()
    }
    return {"golds": golds} if golds else {}


def _texts(rows: Sequence[Row], settings: EvaluationConfig, seed: int) -> Summary:
    """What is wrong with responses as texts: nothing in them, nothing new, the human's turn."""
    ids = [row["ids"] for row in rows]
    repetition = [stats.repetition_n(row, 4) for row in ids]
    empty = sum(not row["response"].strip() for row in rows)
    leaking = sum("Human:" in row["response"] for row in rows)
    return {
        "empty_share": empty / len(rows),
        "empty": stats.share(empty, len(rows)),
        "distinct_1": corpus_distinct_n(ids, 1),
        "distinct_2": corpus_distinct_n(ids, 2),
        "repetition_4": float(np.mean(repetition)),
        "repetition": _mean(repetition, settings, seed),
        "role_leakage": leaking / len(rows),
        "role_leakage_rate": stats.share(leaking, len(rows)),
    }


def _prompts(rows: Sequence[Row], reverse: Sequence[float] | None, human: Sequence[Row]) -> list[Summary]:
    """What there is of every prompt, so that others can pair by prompt without sampling again."""
    return [
        {
            "row": row["row"],
            "prompt": prompt_id(row["prompt"]),
            "score": row["score"],
            "gold": row.get("gold"),
            "held_out": row["held_out"],
            "kl": row.get("kl"),
            "k1": row.get("k1"),
            "reverse_kl": None if reverse is None else reverse[i],
            "length": row["length"],
            "ended": row["ended"],
            "chosen_score": human[i]["score"] if human else None,
        }
        for i, row in enumerate(rows)
    ]


def prompt_id(transcript: str) -> str:
    """16 hexadecimal digits that name a prompt in every run."""
    return hashlib.sha256(transcript.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _mean(values: Sequence[float], settings: EvaluationConfig, seed: int) -> Summary:
    return stats.mean(values, settings.resamples, seed)


def _possible(summary: Summary, most: float = math.inf) -> Summary:
    """The same with an interval of what a mean can be that is never negative, or more than `most`: that of
    few and skewed values reaches beyond. One without ends says nothing, and stays.
    """
    low, high = summary["interval"]
    return {**summary, "interval": [max(low, 0.0), min(high, most)] if math.isfinite(low) else [low, high]}


def _spread(values: Sequence[float], settings: EvaluationConfig, seed: int) -> Summary:
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {**_mean(values, settings, seed), "sd": sd}


def _kl(
    rows: Sequence[Row], reverse: Sequence[float] | None, settings: EvaluationConfig, seed: int
) -> dict[str, Any]:
    """Per sequence: sums over the response. Per token: the ratio of total KL to total length."""
    tokens = sum(row["length"] for row in rows)
    return {
        "exact_per_sequence": _possible(_mean([row["kl"] for row in rows], settings, seed)),
        "exact_per_token": sum(row["kl"] for row in rows) / tokens,
        "k1_per_sequence": _mean([row["k1"] for row in rows], settings, seed),
        "k1_per_token": sum(row["k1"] for row in rows) / tokens,
        "reverse_per_sequence": None if reverse is None else _possible(_mean(reverse, settings, seed)),
    }
