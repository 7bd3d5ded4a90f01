"""Gains by kind of prompt: where it comes from, how often the human speaks in it."""

from collections.abc import Iterator, Sequence

from preftune.records.base import Estimate
from preftune.records.policy import PolicyRecord
from preftune.records.verdict import MIN_PROMPTS, WORSE
from preftune.report.blocks import Block, Fold, Grid, Table, say
from preftune.report.claims import outcome
from preftune.report.tables import column
from preftune.report.text import clean

TITLES = {"source": "source", "turns": "human turns:"}
MAX_SOURCES = 12  # the largest


def by_prompt(policies: Sequence[PolicyRecord], reference: str, gold: str) -> Fold | None:
    """A table for every measure: a row for a kind of prompt, a column for a policy. `reference` is the label
    of the other one, `gold` says whose score that is.
    """
    measures = {"score": "score", "gold": gold, "held_out": "the second reward model's score"}
    tables = [(words, table) for measure, words in measures.items() if (table := _table(policies, measure))]
    if not tables:
        return None
    intro = say(
        "A gain is that of this mix of prompts; on another mix it is another one. Differences to "
        f"{reference} with 95 % intervals, paired by prompt, of kinds with {MIN_PROMPTS} prompts or more; "
        "the intervals are not corrected for their number, so one of twenty leaves out 0 by luck."
    )
    blocks: list[Block] = [intro]
    for words, table in tables:
        blocks += [say(f"In {words}:"), Grid(table=table)]
    return Fold(title="Gains by kind of prompt", blocks=tuple(blocks))


def lost_on(policy: PolicyRecord) -> Iterator[tuple[str, Estimate]]:
    """The kinds of prompt on which `policy` is shown to score below the reference, each with the loss."""
    for kind in TITLES:
        for group, gains in policy.by_prompt.get(kind, {}).items():
            if gains.score is not None and outcome(gains.score, gains.p_holm) == WORSE:
                yield _title(kind, group), gains.score


def _title(kind: str, group: str) -> str:
    return f"{TITLES[kind]} {clean(group, 60)}"


def _table(policies: Sequence[PolicyRecord], measure: str) -> Table | None:
    policies = [policy for policy in policies if policy.by_prompt]
    groups = list(_groups(policies[0])) if policies else []
    gains = [
        [getattr(policy.by_prompt.get(kind, {}).get(group), measure, None) for kind, group, _ in groups]
        for policy in policies
    ]
    if not any(gain is not None for of_policy in gains for gain in of_policy):
        return None
    columns = [
        (_title(kind, group) for kind, group, _ in groups),
        (f"{n:,}" for _, _, n in groups),
        *(column(of_policy, sign=True) for of_policy in gains),
    ]
    headers = ("Prompts of", "n", *(policy.label for policy in policies))
    return Table(headers=headers, rows=tuple(zip(*columns, strict=True)))


def _groups(policy: PolicyRecord) -> Iterator[tuple[str, str, int]]:
    """Kind, name and number of prompts, if these suffice: turns in their order, the largest sources first."""
    for kind in TITLES:
        groups = policy.by_prompt.get(kind, {})
        sizes = [(group, gains.n) for group, gains in groups.items() if gains.n >= MIN_PROMPTS]
        if kind == "source":
            sizes = sorted(sizes, key=lambda group: -group[1])[:MAX_SOURCES]
        yield from ((kind, group, n) for group, n in sizes)
