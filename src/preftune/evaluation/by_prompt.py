"""A policy's gain by kind of prompt: it is that of its mix of prompts, and another one on another mix."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
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

    Kinds that do not divide the prompts and measures that are not known are left out. Nothing is corrected
    for the number of intervals.
    """
    kinds = {
        "source": [pair.source or NO_SOURCE for pair in prompts],
        "turns": [turns_name(pair) for pair in prompts],
    }
    gains = dict[str, dict[str, dict[str, Any]]]()
    for kind, names in kinds.items():
        by_name = indices(names)
        if len(by_name) > 1:
            gains[kind] = {
                name: {"n": len(group), **dict(_gains(group, rows, reference, settings, seed))}
                for name, group in by_name.items()
            }
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


def _gains(
    group: Sequence[int], rows: Rows, reference: Rows, settings: EvaluationConfig, seed: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    for measure in MEASURES:
        pairs = [(rows[i].get(measure), reference[i].get(measure)) for i in group]
        differences = [a - b for a, b in pairs if a is not None and b is not None]
        if differences:
            yield measure, stats.mean(differences, settings.resamples, seed)
