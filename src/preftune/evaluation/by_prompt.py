"""A policy's gain by kind of prompt: it is that of its mix of prompts, and another one on another mix."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from preftune.config import EvaluationConfig
from preftune.data import Preference
from preftune.evaluation import stats
from preftune.evaluation.compare import MEASURES, Rows, paired
from preftune.evaluation.mistakes import turns

MANY_TURNS = 4  # prompts with so many human turns or more are counted together
NO_SOURCE = "no source"


def gains_by_prompt(
    rows: Rows, reference: Rows, prompts: Sequence[Preference], settings: EvaluationConfig, seed: int
) -> dict[str, dict[str, dict[str, Any]]]:
    """Mean differences to the reference with 95 % intervals, paired by prompt, by source and by turns of the
    prompt: {"source": {"harmless-base": {"n", "score", "gold", "held_out"}, ...}, "turns": {"1": ...}}.

    Kinds that do not divide the prompts and measures that are not known are left out. `p_holm` is the p-value
    of the sign-flip test after Holm's correction over all kinds in that measure; intervals are uncorrected.
    """
    kinds = {
        "source": indices([pair.source or NO_SOURCE for pair in prompts]),
        "turns": indices([turns_name(pair) for pair in prompts]),
    }
    gains = {
        kind: {name: dict[str, Any](n=len(group)) for name, group in groups.items()}
        for kind, groups in kinds.items()
        if len(groups) > 1
    }
    for measure in MEASURES:
        measured, p_values = [], []
        for kind, by_name in gains.items():
            for name, gain in by_name.items():
                group = kinds[kind][name]
                of_group, of_reference = [rows[i] for i in group], [reference[i] for i in group]
                if numbers := paired(of_group, of_reference, measure, settings, seed):
                    gain[measure] = {key: numbers[key] for key in ("mean", "interval", "n")}
                    measured.append(gain[measure])
                    p_values.append(numbers["p_value"])
        for gain, p in zip(measured, stats.holm(p_values), strict=True):
            gain["p_holm"] = p
    return gains


def turns_name(pair: Preference) -> str:
    """How often the human speaks in the prompt: 1, 2, 3 or 4+."""
    n = turns(pair)
    return str(n) if n < MANY_TURNS else f"{MANY_TURNS}+"


def indices(names: Sequence[str]) -> dict[str, list[int]]:
    """Where each of the names stands, in their alphabetical order."""
    groups = defaultdict[str, list[int]](list)
    for i, name in enumerate(names):
        groups[name].append(i)
    return dict(sorted(groups.items()))
