"""What the files of a finished seed hold, as tables: one row a prompt."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from preftune.errors import DataError
from preftune.evaluation.stats import Floats
from preftune.records.base import read_record
from preftune.records.study import BestFile, BestValues, PolicyFile, PolicyValues, SeedRecord

BEST = "best_of_n"
# name in study.json -> column of per-prompt values; gains and wins are against SFT on the same prompt
COLUMNS = (
    *("gold", "gold_gain", "score", "score_gain", "kl", "length", "eos_rate", "repetition_4"),
    *("win_rate", "gold_win_rate"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedValues:
    """What one seed measured: its facts, and per policy and set a table (prompts, COLUMNS)."""

    seed: int
    facts: SeedRecord
    tables: Mapping[str, Mapping[str, Floats]]
    best: Mapping[str, Mapping[str, Floats]]  # per set and measure (prompts, n)
    best_kl: Sequence[float]
    sets: Mapping[str, Mapping[str, PolicyValues]]  # as written, by policy and set
    best_sets: Mapping[str, BestValues]


def read_seed(file: Path, seed: int) -> SeedValues:
    """A finished seed's values, from its seed.json and what lies beside it. Raises as `read_record`, and
    DataError for files that do not fit together.
    """
    facts = read_record(file, SeedRecord)
    if not {facts.reference, BEST} <= set(facts.policies):
        raise DataError(f"{file}: policies: lacks {facts.reference} or {BEST}", SeedRecord.remedy)
    best = read_record(file.with_name(f"{BEST}.json"), BestFile).sets
    names = [name for name in facts.policies if name != BEST]
    sets = {name: read_record(file.with_name(f"{name}.json"), PolicyFile).sets for name in names}
    sizes = {kind: len(values.gold) for kind, values in best.items()}
    for name, by_set in sets.items():
        if not sizes or {kind: len(values.gold) for kind, values in by_set.items()} != sizes:
            path = file.with_name(f"{name}.json")
            raise DataError(f"{path}: sets: not the prompts of {BEST}.json", PolicyFile.remedy)
    reference = sets[facts.reference]
    return SeedValues(
        seed=seed,
        facts=facts,
        tables={
            name: {kind: _table(values, reference[kind]) for kind, values in by_set.items()}
            for name, by_set in sets.items()
        },
        best={kind: _arrays(values) for kind, values in best.items()},
        best_kl=next(iter(best.values())).kl,
        sets=sets,
        best_sets=best,
    )


def _arrays(values: PolicyValues | BestValues) -> dict[str, Floats]:
    return {name: np.array(column, dtype=float) for name, column in values.columns.items()}


def _table(values: PolicyValues, reference: PolicyValues) -> Floats:
    half = np.full(len(reference.gold), 0.5)  # of the reference against itself
    return _in_columns({"win": half, "gold_win": half} | _arrays(values), _arrays(reference))


def best_table(values: SeedValues, kind: str, n: int) -> Floats:
    """Best-of-n as a policy's table (prompts, COLUMNS); its KL is the formula."""
    sft = values.tables[values.facts.reference][kind]
    best = {name: of_measure[:, n - 1] for name, of_measure in values.best[kind].items() if name != "kl"}
    kl = np.full(len(sft), values.best_kl[n - 1])
    return _in_columns(best | {"kl": kl}, {name: sft[:, COLUMNS.index(name)] for name in ("gold", "score")})


def _in_columns(measures: Mapping[str, Floats], reference: Mapping[str, Floats]) -> Floats:
    """(prompts, COLUMNS) from measures of one value a prompt."""
    gains = {f"{name}_gain": measures[name] - reference[name] for name in ("gold", "score")}
    names = {"eos_rate": "ended", "win_rate": "win", "gold_win_rate": "gold_win"}
    return np.stack([gains[c] if c in gains else measures[names.get(c, c)] for c in COLUMNS], axis=1)


def best_at_kl(values: SeedValues, kind: str, kl: float) -> Floats | None:
    """Gold of best-of-n at a KL, per prompt, between two n linear in √KL; None beyond the largest n, and for
    a KL of NaN.

    The KL of best-of-n is the formula ln n - (n - 1)/n, an upper bound (Beirami et al. 2024,
    arXiv:2401.01879): at the KL given, best-of-n may really reach a little more.
    """
    distances = np.sqrt(np.array(values.best_kl))
    gold = values.best[kind]["gold"]
    return at_distance(list(zip(distances, gold.T, strict=True)), math.sqrt(max(kl, 0.0)))


def at_distance(points: Sequence[tuple[float, Floats]], d: float) -> Floats | None:
    """Between two of the points (√KL, values), nearest first, linear in √KL; None outside them."""
    for (near, low), (far, high) in pairwise(points):
        if near <= d <= far and far > near:
            share = (d - near) / (far - near)
            return (1 - share) * low + share * high
    return None
