"""A policy's gain by kind of prompt: it is that of its mix of prompts, and another one on another mix."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from preftune.config import EvaluationConfig
from preftune.data import Preference
from preftune.evaluation import stats
from preftune.evaluation.compare import MEASURES, Rows
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
        measured = []
        for kind, by_name in gains.items():
            for name, gain in by_name.items():
                pairs = [(rows[i].get(measure), reference[i].get(measure)) for i in kinds[kind][name]]
                known = [(a, b) for a, b in pairs if a is not None and b is not None]
                if known:
                    gain[measure] = _difference(known, settings, seed)
                    measured.append(gain[measure])
        for gain, p in zip(measured, stats.holm([gain.pop("p_value") for gain in measured]), strict=True):
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


def _difference(
    pairs: Sequence[tuple[float, float]], settings: EvaluationConfig, seed: int
) -> dict[str, Any]:
    a, b = zip(*pairs, strict=True)
    result = stats.paired_bootstrap(a, b, settings.resamples, seed)
    return {
        "mean": result.mean,
        "interval": list(result.interval),
        "n": len(pairs),
        "p_value": result.p_value,
    }
