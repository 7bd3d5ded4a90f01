"""One page over many runs: what each gained, in which settings they differ, which pairs in one alone."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from preftune.config.toml import flatten
from preftune.errors import DataError, InputMissing, PreftuneError
from preftune.records.base import Estimate
from preftune.records.policy import PolicyRecord
from preftune.records.verdict import RULE
from preftune.report.blocks import Block, Grid, Section, Table, say
from preftune.report.claims import Claim, claims
from preftune.report.doctor.diagnose import diagnose
from preftune.report.load import load_run
from preftune.report.tables import column, kl_column
from preftune.report.text import Code, Text, clean, name
from preftune.report.view import RunView
from preftune.report.writers.page import page_of
from preftune.rundir import RunDir, write_text

PAGE = "runs.html"
MOST = 400  # rows of a table
DASH = "–"


@dataclass(frozen=True, slots=True)
class _Run:
    """A run, its settings by dotted key, and what it is called: its directory."""

    directory: str
    view: RunView
    settings: dict[str, Any]


def build_all(folder: str | os.PathLike[str]) -> Path:
    """Write runs.html in a folder of runs. InputMissing if there is none; one that is damaged is named."""
    root = Path(folder)
    runs, unreadable = list[_Run](), list[tuple[Text, ...]]()
    for directory in sorted(root.glob("*")):
        run = RunDir(directory)
        if not run.exists():
            continue
        try:
            view = load_run(run)
            if not view.config.get("stage"):
                raise DataError("its config.toml names no stage" if view.config else "it has no settings")
            runs.append(_Run(directory.name, view, flatten(view.config)))
        except PreftuneError as error:
            unreadable.append((name(directory.name), error.message))
    if not runs and not unreadable:
        raise InputMissing(f"no run in {root}", "`preftune run quickstart` makes one; or give another folder")
    tables = [_gains(runs), _differences(runs), _single(runs)]
    if unreadable:
        table = Table(headers=("Run", "Why"), rows=tuple(unreadable), word_columns=2)
        tables.append(Section(key="unread", title="Not read", blocks=(Grid(table=table),)))
    count = f"{len(runs)} runs in {name(root.resolve().name)}"
    summary = f"{count}. Gains are over each run's own reference; {RULE}."
    page = root / PAGE
    write_text(page, page_of(f"Runs in {name(root.resolve().name)}", summary, tables, {}, beside=""))
    return page


def _gains(runs: Sequence[_Run]) -> Section:
    """A row for each policy of each run, and one for what the doctor finds elsewhere in a run."""
    rows = _policies(runs)
    headers = (
        "Run",
        "Policy",
        "Score − reference",
        "Verdict",
        "Gold − reference",
        "Verdict by gold",
        "KL (nats/response)",
        "Findings",
    )
    table = Table(headers=headers, rows=tuple(rows[:MOST]), word_columns=2)
    blocks: list[Block] = [Grid(table=table)] if rows else [say("No run has been evaluated yet.")]
    blocks += [say(name(run.directory), ": ", words) for run in runs for words in run.view.outdated]
    return Section(key="gains", title="Gains", blocks=tuple(blocks))


def _policies(runs: Sequence[_Run]) -> list[tuple[Text, ...]]:
    """Rows of policies that were compared; within a column all have as many decimals."""
    compared, claimed = list[tuple[_Run, PolicyRecord]](), list[tuple[Claim | None, Claim | None]]()
    for run in runs:
        score, gold = ({c.policy.policy: c for c in claims(run.view, key)} for key in ("score", "gold"))
        policies = [policy for policy in run.view.policies if policy.policy in score.keys() | gold.keys()]
        compared += [(run, policy) for policy in policies]
        claimed += [(score.get(policy.policy), gold.get(policy.policy)) for policy in policies]
    findings = {run.directory: diagnose(run.view) for run in runs}
    columns: list[Sequence[Text]] = [
        [name(run.directory) for run, _ in compared],
        [policy.label for _, policy in compared],
    ]
    for of_all in zip(*claimed, strict=True):
        columns.append(column((claim and claim.difference for claim in of_all), sign=True))
        columns.append([DASH if claim is None else claim.outcome for claim in of_all])
    columns += [
        kl_column([policy for _, policy in compared]),
        [
            "; ".join(f.kind for f in findings[run.directory] if f.where in _names(policy)) or DASH
            for run, policy in compared
        ],
    ]
    rows = list(zip(*columns, strict=True))
    by_run: list[tuple[Text, ...]] = []
    for run in runs:
        policies_of_run = [policy for of, policy in compared if of is run]
        by_run += [row for row, (of, _) in zip(rows, compared, strict=True) if of is run]
        named = {where for policy in policies_of_run for where in _names(policy)}
        of_no_policy = [f for f in findings[run.directory] if f.where not in named]
        if of_no_policy:
            words = "; ".join(f"{clean(f.where, 60)}: {f.kind}" for f in of_no_policy)
            by_run.append((name(run.directory), *[DASH] * (len(columns) - 2), words))
    return by_run


def _names(policy: PolicyRecord) -> tuple[str, str]:
    """Where the doctor finds what is about a policy: in its stage, or by its label."""
    return policy.policy.removeprefix("policy_"), policy.label


def _differences(runs: Sequence[_Run]) -> Section:
    """Settings that are not the same in all runs."""
    keys = _differing(runs)
    rows = tuple((name(key), *(_value(run, key) for run in runs)) for key in keys)
    table = Table(headers=("Setting", *(name(run.directory) for run in runs)), rows=rows[:MOST])
    blocks: list[Block] = [Grid(table=table)] if rows else [say("All settings are the same.")]
    return Section(key="settings", title="Settings that differ", short="Settings", blocks=tuple(blocks))


def _single(runs: Sequence[_Run]) -> Section:
    """Pairs of runs that differ in one setting alone, with the gains of the policies that both have."""
    words, gains = list[tuple[Text, ...]](), list[tuple[Estimate, Estimate]]()
    for a, b in combinations(runs, 2):
        keys = _differing((a, b))
        if len(keys) != 1 or len(words) >= MOST:
            continue
        claims_of_b = {claim.policy.policy: claim for claim in claims(b.view)}
        for claim in claims(a.view):
            if (counterpart := claims_of_b.get(claim.policy.policy)) is not None:
                gains.append((claim.difference, counterpart.difference))
                values = (_value(a, keys[0]), _value(b, keys[0]))
                words.append(
                    (name(keys[0]), name(a.directory), name(b.directory), *values, claim.policy.label)
                )
    columns = (column((pair[side] for pair in gains), sign=True) for side in (0, 1))
    rows = [(*cells, *pair) for cells, pair in zip(words, zip(*columns, strict=True), strict=True)]
    headers = ("Setting", "Run A", "Run B", "A", "B", "Policy", "Gain of A", "Gain of B")
    intro = say(
        "Intervals that overlap are no proof of equality, and runs of different seeds differ by luck, too: ",
        Code("preftune compare RUN_A RUN_B"),
        " pairs the prompts, ",
        Code("preftune study"),
        " pools seeds.",
    )
    blocks: list[Block] = [intro, Grid(table=Table(headers=headers, rows=tuple(rows[:MOST]), word_columns=6))]
    if not rows:
        blocks = [say("No two evaluated runs differ in one setting alone.")]
    return Section(key="single", title="One setting changed", blocks=tuple(blocks))


def _differing(runs: Sequence[_Run]) -> list[str]:
    keys = sorted({key for run in runs for key in run.settings if key != "name"})
    return [key for key in keys if len({repr(run.settings.get(key)) for run in runs}) > 1]


def _value(run: _Run, key: str) -> Text:
    return name(run.settings[key], 60) if key in run.settings else DASH
