"""What the evaluation of a run would take, from one batch of each of its parts."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from preftune.config import judges_of
from preftune.evaluation.mistakes import DETAILED
from preftune.evaluation.policy import Conditions, Row
from preftune.evaluation.sanity import KINDS, ROWS
from preftune.measure.conditions import (
    frozen_policy,
    held_out_prompts,
    make_conditions,
    policies_of,
    reference_stage,
)
from preftune.measure.evaluate import summarise_policies
from preftune.measure.reward_models import bag_of_words, examine_model, examiner
from preftune.models.trunk import forget_states
from preftune.rundir import BASE, policy_name
from preftune.runs.session import Session

T = TypeVar("T")
_LITTLE = 10.0  # seconds that an examination may take to be made whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Seconds by what they go to, and how much there is of everything, in words."""

    parts: Mapping[str, float]
    sizes: str


def forecast(session: Session, stages: Sequence[str]) -> Forecast:
    """Of a run whose stages are there, if only barely trained: one batch of prompts is answered by one policy
    and measured, one batch of the pool is drawn, one batch of pairs is scored; the rest is counted.
    """
    policies = policies_of(session, stages)
    judges = [name for name in judges_of(session.config.stage) if name in stages]
    prompts, reference = held_out_prompts(session), reference_stage(session, policies)
    settings, names = session.config.evaluation, [BASE, *policies]
    (conditions, learner), loading = _timed(
        lambda: make_conditions(session, reference, prompts, session.gold)
    )
    few = replace(conditions, prompts=prompts[: settings.batch_size])
    times = len(prompts) / len(few.prompts)
    policy, fetching = _timed(lambda: frozen_policy(session, learner, names[-1]))
    rows, sampling = _timed(lambda: few.rows(policy, _nobody))
    _, reverse = _timed(lambda: few.reverse_kl(policy, rows))
    human, chosen = _timed(lambda: few.human([pair.chosen for pair in few.prompts]))
    contestants = len(names) - 1  # the reference is only sampled and scored, not compared with itself
    parts = {
        f"{len(names)} policies": contestants * (fetching + (sampling + reverse) * times)
        + max(sampling - reverse, 0) * times
        + chosen * times
    }
    pool = list[Row]()
    if conditions.scorer is not None:
        small = replace(conditions, prompts=prompts[: max(settings.batch_size // settings.pool, 1)])
        pool, drawing = _timed(lambda: small.pool(_nobody, settings.pool))
        parts[f"pool of {settings.pool}"] = drawing * len(prompts) / len(small.prompts)
    if judges and session.dataset.kind == "pairs":
        parts["examination of the reward model"] = sum(_examination(session, name) for name in judges)
        parts["examination of the reward model"] += _timed(lambda: bag_of_words(session))[1]
    _, counting = _timed(lambda: _numbers(session, conditions, names, rows, human, pool))
    parts["numbers"] = loading + counting
    replies = f"{len(names)} replies" + (f" and {settings.pool} of best-of-n" if pool else "")
    pairs = f", {len(session.dataset.validation):,} validation pairs" if judges else ""
    return Forecast(parts=parts, sizes=f"{len(prompts)} prompts, {replies} to each{pairs}")


def _nobody(count: int) -> None:
    """Who is told of progress."""


def _timed(do: Callable[[], T]) -> tuple[T, float]:
    """As a part of an evaluation begins: nothing is left of what was computed before."""
    forget_states()
    began = time.monotonic()
    return do(), time.monotonic() - began


def _examination(session: Session, name: str) -> float:
    """Seconds that the examination of a reward model takes: measured on all pairs, or, where that would take
    long, on some, with the pace of pairs for the others. Absurd replies are scored for at most ROWS prompts,
    mistakes token by token for at most DETAILED.
    """
    pairs, by = session.dataset.validation, examiner(session, name)
    few = list(pairs[: 2 * session.config.evaluation.batch_size])
    pace = _timed(lambda: by.pair_scores("pairs", by.encoder.usable(few)[0]))[1] / (2 * len(few))

    def scores(n: int) -> float:
        return 2 * n + len(KINDS) * min(n, ROWS) + 2 * min(n / 2, DETAILED)

    few = few if pace * scores(len(pairs)) > _LITTLE else pairs
    whole = _timed(lambda: examine_model(by, few, None, own_data=True))[1]
    return whole + pace * (scores(len(pairs)) - scores(len(few)))


def _numbers(
    session: Session,
    conditions: Conditions,
    names: Sequence[str],
    rows: Sequence[Row],
    human: Sequence[Row],
    pool: Sequence[Row],
) -> None:
    """Intervals and comparisons, of measured rows over and over until there are as many as there will be."""
    count, size = len(conditions.prompts), conditions.settings.pool

    def repeated(measured: Sequence[Row], per_prompt: int) -> list[Row]:
        return [measured[i % len(measured)] | {"row": i // per_prompt} for i in range(count * per_prompt)]

    by_policy = {policy_name(name): repeated(rows, 1) for name in names}
    reverse = {name: [float(row["kl"]) for row in measured] for name, measured in by_policy.items()}
    drawn = repeated(pool, size) if pool else []
    summarise_policies(session, conditions, names, by_policy, reverse, repeated(human, 1), drawn)
