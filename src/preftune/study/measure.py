"""One seed's policies, measured prompt by prompt on each prompt set. Loads torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from preftune.config import judges_of
from preftune.data import Preference
from preftune.evaluation import stats
from preftune.evaluation.best_of_n import kl_formula, over_subsets
from preftune.evaluation.policy import Conditions, Row, response_nll
from preftune.evaluation.reward_model import gap
from preftune.evaluation.stats import Floats
from preftune.evaluation.variety import corpus_distinct_n, rarefied_distinct_n
from preftune.measure.conditions import (
    frozen_policy,
    held_out_prompts,
    make_conditions,
    policies_of,
    second_judge,
    shares_prompts,
)
from preftune.measure.evaluate import functions_of, made_of
from preftune.measure.reward_models import examiner
from preftune.models.roles import Policy
from preftune.records.base import write_record
from preftune.records.study import BestFile, PolicyFile
from preftune.rollout.score import Scorer
from preftune.rundir import BASE, each_leaf, read_object
from preftune.runs.session import Session
from preftune.study.beside import DISTINCT_OF
from preftune.study.design import VERSION, Design
from preftune.study.values import BEST
from preftune.sums import sum_of
from preftune.training.learner import Learner
from preftune.world.dataset import KINDS, make_world
from preftune.world.gold import best_reachable
from preftune.world.replies import PROBES

MEASURES = ("gold", "score", "kl", "length", "ended", "repetition_4")
WINS = {"score": "win", "gold": "gold_win"}  # measure -> its share of wins against SFT
TEST, TRAINING = "test", "training"
PROBE_PAIRS = 400
_SAMPLES = 8  # prompts whose replies are kept as text, per policy and set


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """A prompt set and what is the same on it. `conditions` has every prompt `replies` times in a row."""

    name: str
    prompts: Sequence[Preference]
    replies: int
    conditions: Conditions
    learner: Learner
    base: Policy

    @property
    def other_judges(self) -> list[str]:
        """Judges besides gold."""
        golds = list(self.conditions.golds)
        return golds[1:] if self.conditions.gold is None else golds

    def means(self, rows: Sequence[Row], measure: str) -> Floats:
        """The mean of each prompt's replies: (prompts,)."""
        return self.by_prompt(rows, measure).mean(1)

    def by_prompt(self, rows: Sequence[Row], measure: str) -> Floats:
        return _column(rows, measure).reshape(-1, self.replies)


def measure_seed(session: Session, design: Design) -> dict[str, Any]:
    """Write study/<policy>.json for every policy that has none yet; returns facts about the seed."""
    stages = policies_of(session, list(session.config.stage))
    reference = next(n for n in stages if session.config.stage[n].imitates)
    judges, functions = judges_of(session.config.stage), functions_of(session)
    held_equal = {
        "version": VERSION,
        "replies": design.replies,
        "settings": session.config.evaluation.model_dump(mode="json"),
        "stages": {name: made_of(session, name) for name in (reference, *judges)},
        **functions,
    }
    keys = {name: sum_of({**held_equal, "policy": made_of(session, name)}) for name in (BASE, *stages)}
    keys[BEST] = sum_of({**held_equal, "policy": BEST})
    missing = [name for name, key in keys.items() if not _is_measured(session, name, key)]
    if missing:
        _measure(session, _grounds(session, reference, design.replies), reference, missing, keys)
    judge = session.judge
    fresh = _fresh_accuracy(session, judge, design.fresh_pairs) if session.is_world and judge else None
    judged_by = {name: functions[name] for name in ("functions", "golds") if name in functions}
    second = second_judge(session)
    shared = shares_prompts(session, second) if second else None
    return {
        "policies": list(keys),
        "reference": reference,
        "judged_by": judged_by,
        "gold_apart": None if shared is None else not shared,
        "reward_model": fresh or None,
    }


def values_file(session_path: Path, policy: str) -> Path:
    """Where a seed's per-prompt values lie."""
    return session_path / "study" / f"{policy}.json"


def _is_measured(session: Session, policy: str, key: str) -> bool:
    file = values_file(session.run.path, policy)
    return file.is_file() and read_object(file).get("key") == key


def _measure(
    session: Session,
    grounds: Sequence[Ground],
    reference: str,
    policies: Sequence[str],
    keys: Mapping[str, str],
) -> None:
    """Each policy's file is written once it is measured on every ground: a study that is stopped keeps it."""
    baselines: list[list[Row]] = []
    for ground in grounds:
        conditions = ground.conditions
        with session.console.counting(f"{ground.name} prompts", len(conditions.prompts)) as advance:
            baselines.append(conditions.rows(frozen_policy(session, ground.learner, reference), advance))
    for name in policies:
        sets: dict[str, Any] = {}
        samples: dict[str, Any] = {}
        for ground, baseline in zip(grounds, baselines, strict=True):
            with session.console.counting(f"{ground.name} {name}", len(ground.conditions.prompts)) as advance:
                if name == BEST:
                    sets[ground.name] = _best_of_n(ground, baseline, advance)
                    continue
                rows = baseline
                if name != reference:
                    rows = ground.conditions.rows(frozen_policy(session, ground.learner, name), advance)
                sets[ground.name] = _values(ground, rows, None if name == reference else baseline)
                samples[ground.name] = [_sample(row) for row in rows[: _SAMPLES * ground.replies]]
        record = {"policy": name, "key": keys[name], "sets": sets, "samples": samples}
        kind = BestFile if name == BEST else PolicyFile
        write_record(values_file(session.run.path, name), _rounded(record), kind)


def _values(ground: Ground, rows: Sequence[Row], baseline: Sequence[Row] | None) -> dict[str, Any]:
    """Means by prompt; against the baseline, where there is one, the chances to beat its replies."""
    values: dict[str, Any] = {key: ground.means(rows, key).tolist() for key in MEASURES}
    golds = {judge: ground.means(rows, f"gold:{judge}").tolist() for judge in ground.other_judges}
    values |= {"golds": golds, **_as_text(ground, rows)}
    if baseline is not None:
        for key, win in WINS.items():
            wins = stats.wins(ground.by_prompt(rows, key), ground.by_prompt(baseline, key)).mean(1)
            values[win] = wins.tolist()
    return values


def _grounds(session: Session, reference: str, replies: int) -> list[Ground]:
    """The run's own test prompts; on the world also unseen combinations and unseen wordings."""
    sets: dict[str, list[Preference]] = {TRAINING if session.is_world else TEST: held_out_prompts(session)}
    if session.is_world:
        world, n = make_world(session.config.seed, 1, 1, 1), session.config.evaluation.prompts
        for kind in KINDS:
            if kind != TRAINING:
                sets[kind] = [
                    Preference(prompt=prompt, chosen="", rejected="", source="", row=row)
                    for row, prompt in enumerate(world.prompts(kind, n))
                ]
    grounds, base = list[Ground](), None
    for name, prompts in sets.items():
        repeated = [prompt for prompt in prompts for _ in range(replies)]
        conditions, learner = make_conditions(session, reference, repeated, session.gold)
        base = base or frozen_policy(session, learner, BASE)
        grounds.append(
            Ground(
                name=name, prompts=prompts, replies=replies, conditions=conditions, learner=learner, base=base
            )
        )
    return grounds


def _column(rows: Sequence[Row], measure: str) -> Floats:
    """One number a row; NaN where it is not known. Gold is the world's, else the second reward model's."""
    match measure:
        case "gold":
            values = [row.get("gold", row["held_out"]) for row in rows]
        case "repetition_4":
            values = [stats.repetition_n(row["ids"], 4) for row in rows]
        case _:
            values = [row[measure] for row in rows]
    return np.array(values, dtype=float)


def _as_text(ground: Ground, rows: Sequence[Row]) -> dict[str, float]:
    """How varied replies are, and how likely the base finds the first one to each prompt, nats a token."""
    first, size = rows[:: ground.replies], ground.conditions.settings.batch_size
    ids = [row["ids"] for row in rows]
    by_prompt = [ids[start : start + ground.replies] for start in range(0, len(ids), ground.replies)]
    batches = [ground.conditions.batch(first[start : start + size]) for start in range(0, len(first), size)]
    return {
        "distinct_2": corpus_distinct_n(ids, 2),
        "distinct_2_rarefied": rarefied_distinct_n(by_prompt, 2, max(DISTINCT_OF // ground.replies, 1)),
        "base_nll": response_nll(ground.base, batches)["nll"],
    }


def _best_of_n(ground: Ground, baseline: Sequence[Row], advance: Callable[[int], None]) -> dict[str, Any]:
    """Best-of-n by score for n = 1..pool, each prompt's mean over all subsets of n: lists (prompts, n).

    `win` and `gold_win` are the chances to beat SFT's replies to the same prompt, ties half.
    """
    conditions = _asking(ground.conditions, ground.prompts)
    size = conditions.settings.pool
    pool = conditions.pool(advance, size)
    best_by = over_subsets(_column(pool, "score").reshape(-1, size))

    def best(values: Floats) -> list[list[float]]:
        return best_by(values.reshape(-1, size)).tolist()

    measures: dict[str, Any] = {m: best(_column(pool, m)) for m in MEASURES if m != "kl"}
    measures["golds"] = {judge: best(_column(pool, f"gold:{judge}")) for judge in ground.other_judges}
    for measure, name in WINS.items():
        ours = _column(pool, measure).reshape(-1, size, 1)
        measures[name] = best(stats.wins(ours, ground.by_prompt(baseline, measure)[:, None]).mean(2))
    return {**measures, "kl": [kl_formula(n) for n in range(1, size + 1)]}


def _asking(conditions: Conditions, prompts: Sequence[Preference]) -> Conditions:
    """The same for other `prompts`, which the judges, too, look up by number."""

    def on_them(scorer: Scorer) -> Scorer:
        functions = scorer.functions and replace(scorer.functions, rows=prompts)
        return replace(scorer, rows=prompts, functions=functions)

    return replace(
        conditions,
        prompts=prompts,
        scorer=conditions.scorer and on_them(conditions.scorer),
        held_out=conditions.held_out and on_them(conditions.held_out),
        golds={name: on_them(scorer) for name, scorer in conditions.golds.items()},
    )


def _sample(row: Row) -> dict[str, Any]:
    return {key: row.get(key) for key in ("prompt", "response", "score", "gold", "held_out", "ended")}


def _fresh_accuracy(session: Session, judge: str, pairs: int) -> dict[str, Any]:
    """The reward model on pairs and probes that no stage has seen, for each kind of prompt. What is too long
    for it is left out, and so is a part of which nothing is left.
    """
    by, world = examiner(session, judge), make_world(session.config.seed, 1, 1, 1)
    accuracies = {}
    for kind in KINDS:
        fresh = by.encoder.usable(world.pairs(kind, pairs))[0]
        if not fresh:
            continue
        right = [s["chosen"] > s["rejected"] for s in by.pair_scores(f"{kind} pairs", fresh)]
        probes = {name: world.probes(name, kind, min(PROBE_PAIRS, pairs)) for name in PROBES}
        gaps = {
            name: gap(by.pair_scores(f"{kind} {name}", usable))
            for name, pairs_of in probes.items()
            if (usable := by.encoder.usable(pairs_of)[0])
        }
        accuracies[kind] = {
            "accuracy": stats.share(sum(right), len(right)),
            "best_reachable": best_reachable(fresh),
            "gaps": gaps,
        }
    return accuracies


def _rounded(value: Any) -> Any:
    """Numbers to seven digits: a file of per-prompt values is read by machines and kept by people."""
    return each_leaf(value, lambda leaf: float(f"{leaf:.7g}") if isinstance(leaf, float) else leaf)
