"""Seeds put together: means, intervals over seeds and prompts, verdicts, collapsed seeds, equal KL."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from preftune.config import EvaluationConfig
from preftune.config.rewards import judges_in
from preftune.errors import DataError
from preftune.evaluation.pooled import gain_ends, pooled_gain, pooled_means, pooled_verdict
from preftune.evaluation.stats import Floats, number_needed
from preftune.records.study import SeedRecord
from preftune.report.seen import labelled_by, seen_by
from preftune.rundir import BASE
from preftune.study.alike import MADE_OF
from preftune.study.beside import as_text, other_judges
from preftune.study.design import CEILING, SECOND_MODEL, Design
from preftune.study.frontier import frontier
from preftune.study.values import COLUMNS, SeedValues, best_at_kl, best_table, read_seed

INTERVAL = (
    "95 %, hierarchical bootstrap: seeds, then prompts within each; deviations between seeds widened for "
    "their small number (Hesterberg 2015, arXiv:1411.5279); within one seed, over its prompts"
)
RANGES = {  # of what cannot have every value; the others are those of all numbers
    **dict.fromkeys(("kl", "length"), (0.0, math.inf)),
    **dict.fromkeys(("eos_rate", "repetition_4", "win_rate", "gold_win_rate"), (0.0, 1.0)),
}


def pool(records: Mapping[int, Path], design: Design) -> dict[str, Any]:
    """The content of study.json but for the sweep, from finished seeds: where the seed.json of each lies. No
    seed is left out.
    """
    seeds = [read_seed(file, seed) for seed, file in records.items()]
    kinds = list(seeds[0].best)
    settings = design.config.evaluation
    for values in seeds:
        measured = list(values.best) == kinds and _parts(values) == _parts(seeds[0])
        if not measured or len(values.best_kl) < max(settings.pool, settings.best_of):
            first = seeds[0].seed
            raise DataError(f"{records[values.seed]}: not measured as seed {first} was", SeedRecord.remedy)
    if not design.is_world:  # whose data are each seed's own
        hint = "restore that of the others, or remove the directory of one and run the same command"
        _refuse_differing(seeds, records, "content_sha256", "of other data", hint)
    hint = "remove one's directory study/ and run the same command, which measures that seed again"
    _refuse_differing(seeds, records, "judged_by", "judged by other functions or another gold", hint)
    _refuse_differing(seeds, records, "stages", MADE_OF, "leave that seed out, or make a study of each kind")
    tables = {name: _tables(seeds, name) for name in _names(seeds, settings.best_of, settings.pool)}
    labels = {name: _label(design, name) for name in tables}
    per_seed = [_seed_record(values, tables, i, kinds[0], settings) for i, values in enumerate(seeds)]
    policies = {}
    for name, by_kind in tables.items():
        sets = {kind: _numbers(by_kind[kind], settings.resamples) for kind in kinds}
        policies[name] = {
            "label": labels[name],
            **sets[kinds[0]],
            **_mean_tokens(seeds, name),
            "collapsed_seeds": [s["seed"] for s in per_seed if s["policies"][name]["collapsed"]],
            "bon_kl_gain": _gain_at_equal_kl(seeds, by_kind[kinds[0]], name, kinds[0], settings.resamples),
            "sets": sets,
            "others": other_judges(seeds, name, kinds[0], settings.resamples),
            "text": as_text(seeds, name, kinds[0], sets[kinds[0]]["kl"]),
        }
    return {
        "name": design.config.name,
        "recipe": design.recipe,
        "data": design.config.data.name,
        "gold": design.gold,
        **({"gold_apart": _gold_apart(seeds, design)} if design.gold == SECOND_MODEL else {}),
        "n_prompts": policies[seeds[0].facts.reference]["n_prompts"],
        "replies": design.replies,
        "token_budget": design.tokens,
        "interval": INTERVAL,
        "prompt_sets": kinds,
        "main_set": kinds[0],
        "reference": seeds[0].facts.reference,
        "policies": policies,
        **_others_seen(design),
        "best_of_n": [
            {"n": n, "kl": seeds[0].best_kl[n - 1]}
            | _numbers([best_table(v, kinds[0], n) for v in seeds], settings.resamples)
            for n in range(1, settings.pool + 1)
        ],
        "seeds": per_seed,
        "reward_model": _reward_model(seeds),
        "frontier": frontier(seeds, design, kinds[0], settings.resamples),
    }


def _gold_apart(seeds: Sequence[SeedValues], design: Design) -> bool | None:
    """Whether a second reward model shared no prompt with the judge, at any seed; None: not known."""
    apart = {values.facts.gold_apart for values in seeds}
    return design.gold_apart if None in apart else apart == {True}


def _others_seen(design: Design) -> dict[str, dict[str, list[str]]]:
    """The judges beside gold that training saw, by stage: those that it was trained on, and those that
    labelled its pairs.
    """
    golds = judges_in(design.config.evaluation.gold)[0 if design.is_world else 1 :]
    config = design.config.model_dump(mode="json")
    return {"others_seen": seen_by(config, golds), "others_labelled": labelled_by(config, golds)}


def _refuse_differing(
    seeds: Sequence[SeedValues], records: Mapping[int, Path], fact: str, words: str, hint: str
) -> None:
    """DataError for seeds that differ in a fact about them; older ones, which do not have it, pass."""
    by_seed = {values.seed: getattr(values.facts, fact) for values in seeds}
    known = [(seed, value) for seed, value in by_seed.items() if value is not None]
    for seed, value in known[1:]:
        if value != known[0][1]:
            raise DataError(f"{records[seed]}: {words} than seed {known[0][0]}", hint)


def _names(seeds: Sequence[SeedValues], best_of: int, pool_size: int) -> list[str]:
    """Policies that every seed measured, and two sizes of best-of-n."""
    common = [name for name in seeds[0].tables if all(name in values.tables for values in seeds)]
    return [*common, *dict.fromkeys((f"best_of_{best_of}", f"best_of_{pool_size}"))]


def _parts(values: SeedValues) -> dict[str, list[str]]:
    """By kind of prompt, the parts of gold that the reward model was examined on."""
    return {kind: sorted(on_fresh.gaps) for kind, on_fresh in (values.facts.reward_model or {}).items()}


def _tables(seeds: Sequence[SeedValues], name: str) -> dict[str, list[Floats]]:
    """Per set, one table a seed."""
    if name.startswith("best_of_"):
        n = int(name.removeprefix("best_of_"))
        return {kind: [best_table(values, kind, n) for values in seeds] for kind in seeds[0].best}
    return {kind: [values.tables[name][kind] for values in seeds] for kind in seeds[0].best}


def _numbers(tables: Sequence[Floats], resamples: int) -> dict[str, Any]:
    """Means with intervals for every column; verdicts and needed seeds for the gains."""
    pooled = pooled_means(tables, resamples)
    numbers: dict[str, Any] = {"n_seeds": len(tables), "n_prompts": len(tables[0])}
    for i, name in enumerate(COLUMNS):
        least, most = RANGES.get(name, (-math.inf, math.inf))
        low, high = max(pooled.low[i], least), min(pooled.high[i], most)
        ends = {"": pooled.mean[i], "_low": low, "_high": high}
        numbers |= {f"{name}{end}": _or_none(value) for end, value in ends.items()}
    for gain, name in (("gold_gain", "gold"), ("score_gain", "score")):
        low, high = numbers[f"{gain}_low"], numbers[f"{gain}_high"]
        if low is None or high is None or low == high == 0:  # not known, or the reference itself
            numbers[f"{name}_verdict"] = None
            continue
        low, high = gain_ends(low, high, [table[:, COLUMNS.index(gain)] for table in tables])
        numbers |= {f"{gain}_low": low, f"{gain}_high": high}
        numbers[f"{name}_verdict"] = pooled_verdict(low, high, tables)
    column = COLUMNS.index("gold_gain")
    numbers["seeds_needed"] = number_needed([table[:, column].mean() for table in tables], least=2)
    return numbers


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _seed_record(
    values: SeedValues,
    tables: Mapping[str, Mapping[str, Sequence[Floats]]],
    i: int,
    main: str,
    settings: EvaluationConfig,
) -> dict[str, Any]:
    """One seed's numbers, intervals over its prompts only."""
    policies = {}
    reference = values.facts.reference
    usual = _seed_numbers(values.tables[reference][main], 1)
    for name, by_kind in tables.items():
        sets = {kind: _seed_numbers(by_seed[i], settings.resamples) for kind, by_seed in by_kind.items()}
        why = [] if name in (reference, BASE) else collapse(sets[main], usual)
        policies[name] = {
            **sets[main],
            **values.facts.tokens.get(name, {}),
            "collapsed": bool(why),
            "collapsed_why": why,
            "sets": sets,
        }
    return {"seed": values.seed, "seconds": values.facts.seconds, "policies": policies}


def _seed_numbers(table: Floats, resamples: int) -> dict[str, Any]:
    numbers = _numbers([table], resamples)
    kept_columns = {*COLUMNS, "gold_gain_low", "gold_gain_high", "n_prompts", "gold_verdict"}
    return {name: number for name, number in numbers.items() if name in kept_columns}


def collapse(numbers: Mapping[str, Any], reference: Mapping[str, Any]) -> list[str]:
    """Why a policy counts as collapsed at a seed, beside the reference's numbers; empty if it does not."""
    why = []
    if numbers["gold_gain_high"] is not None and numbers["gold_gain_high"] < 0:
        why.append(f"gold below SFT ({numbers['gold_gain']:+.2f})")
    # A reference that hardly ends says nothing by it: 1 reply of 192 against none is chance.
    if numbers["eos_rate"] < reference["eos_rate"] / 2 and reference["eos_rate"] >= 0.1:
        why.append(f"ends only {numbers['eos_rate']:.0%} of its replies")
    if numbers["repetition_4"] > reference["repetition_4"] + 0.1:
        why.append(f"repeats {numbers['repetition_4']:.0%} of its 4-grams")
    return why


def _gain_at_equal_kl(
    seeds: Sequence[SeedValues], tables: Sequence[Floats], name: str, kind: str, resamples: int
) -> dict[str, Any] | None:
    """Gold minus that of best-of-n at the policy's own KL, seed by seed; None beyond the largest n."""
    if name.startswith("best_of_") or name == BASE or name == seeds[0].facts.reference:
        return None
    gold, kl = COLUMNS.index("gold"), COLUMNS.index("kl")
    gaps = []
    for values, table in zip(seeds, tables, strict=True):
        best = best_at_kl(values, kind, float(table[:, kl].mean()))
        if best is None:
            return None
        gaps.append(table[:, gold] - best)
    return {**pooled_gain(gaps, resamples), "n_seeds": len(gaps)}


def _mean_tokens(seeds: Sequence[SeedValues], name: str) -> dict[str, Any]:
    spent = [values.facts.tokens[name] for values in seeds if name in values.facts.tokens]
    if not spent:
        return {"tokens_trained": None, "tokens_sampled": None, "steps": None}
    return {key: float(np.mean([numbers[key] for numbers in spent])) for key in spent[0]}


def _label(design: Design, name: str) -> str:
    if name == BASE or name.startswith("best_of_"):
        return name.replace("_", " ")
    stage = design.config.stage[name]
    if name == CEILING:
        return f"{stage.label} on gold (ceiling)"
    for key, values in design.sweeps.items():
        for value, stage_name in values.items():
            if stage_name == name and name not in design.recipe_stages:
                return f"{stage.label}, {key.rpartition('.')[2]} {value}"
    kinds = [s.label for n, s in design.config.stage.items() if n in design.recipe_stages]
    return f"{stage.label} ({name}{stage.variant()})" if kinds.count(stage.label) > 1 else stage.label


def _reward_model(seeds: Sequence[SeedValues]) -> dict[str, Any] | None:
    """Accuracy on fresh pairs and gaps per part of gold: means over seeds, the seeds beside them."""
    by_seed = [values.facts.reward_model for values in seeds if values.facts.reward_model is not None]
    if len(by_seed) < len(seeds):
        return None
    pooled = {}
    for kind in by_seed[0]:
        on_kind = [by_kind[kind] for by_kind in by_seed]
        values = [a.accuracy.value for a in on_kind]
        pooled[kind] = {
            "accuracy": float(np.mean(values)),
            "n_pairs": on_kind[0].accuracy.n,
            "by_seed": [
                {"seed": v.seed, **a.accuracy.model_dump()} for v, a in zip(seeds, on_kind, strict=True)
            ],
            "best_reachable": float(np.mean([a.best_reachable for a in on_kind])),
            "gaps": {
                component: {
                    "gap_sd": float(np.mean([a.gaps[component].gap_sd for a in on_kind])),
                    "by_seed": [a.gaps[component].gap_sd for a in on_kind],
                    "accuracy": float(np.mean([a.gaps[component].value for a in on_kind])),
                    "n": on_kind[0].gaps[component].n,
                }
                for component in on_kind[0].gaps
            },
        }
    return pooled
