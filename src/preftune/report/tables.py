"""The tables of a run as plain strings, for the terminal, ANALYSIS.md and report.html alike."""

from collections.abc import Callable
from functools import partial

from preftune.records.base import Estimate
from preftune.records.policy import PolicyRecord
from preftune.report.blocks import Table
from preftune.report.claims import Claim, claims
from preftune.report.text import clean, number, percent
from preftune.report.view import CHOSEN, RunView


def comparison_table(run: RunView) -> Table:
    """The table that the terminal, ANALYSIS.md and report.html show. Intervals are 95 %."""
    golds = gold_columns(run)
    reference = run.label(run.reference)
    headers = [
        "Policy",
        "Reward [95 %]",
        "sd",
        f"Reward − {reference}",
        "Verdict",
        f"Win rate vs {reference}",
    ]
    headers += [f"KL to {reference} (nats/response)", "Length (tokens)", "Ends by itself"]
    headers += [f"{words} [95 %]" for words in golds]
    outcomes = {claim.policy.policy: claim.outcome for claim in claims(run)}
    rows = []
    for policy in run.policies:
        baseline = policy.policy == run.reference
        cells = [policy.label, _cell(policy.reward), number(policy.reward_sd)]
        cells += [
            "reference" if baseline else _cell(policy.difference, sign=True),
            outcomes.get(policy.policy, "–"),
        ]
        cells += ["–" if baseline or policy.win_rate is None else policy.win_rate.percent(), kl_text(policy)]
        cells += [_cell(policy.length), policy.eos_rate.percent() if policy.eos_rate else "–"]
        rows.append(tuple(cells + [_cell(value(policy)) for value in golds.values()]))
    return Table(headers=tuple(headers), rows=tuple(rows))


def gold_columns(run: RunView) -> dict[str, Callable[[PolicyRecord], Estimate | None]]:
    """The gold scores that there are, the world's first, each with its heading."""
    columns: dict[str, Callable[[PolicyRecord], Estimate | None]] = {
        f"Gold, {clean(name, 40)}": partial(_named_gold, name) for name in run.golds
    }
    unnamed_gold = any(policy.gold and policy.gold not in policy.golds.values() for policy in run.policies)
    return {"Gold": lambda policy: policy.gold, **columns} if unnamed_gold else columns


def _named_gold(name: str, policy: PolicyRecord) -> Estimate | None:
    return policy.golds.get(name)


def detail_table(run: RunView) -> Table:
    """KL in all its forms. In nats; forward is KL(policy || reference), backward the other way round."""
    headers = ["Policy", "Exact KL / response", "Exact KL / token", "k1 / response", "k1 / token"]
    backward = any(policy.reverse_kl for policy in run.policies)
    rows = []
    for policy in run.policies:
        cells = [policy.label, kl_text(policy)]
        cells += map(_cell, (policy.kl_token, policy.k1_sequence, policy.k1_token))
        rows.append(tuple(cells + [_cell(policy.reverse_kl)] * backward))
    return Table(headers=(*headers, *["Backward KL / response"] * backward), rows=tuple(rows))


def text_table(run: RunView) -> Table:
    """What the text of each policy looks like: shares in percent, with intervals where they are known."""
    shares = {
        "empty_share": "Empty",
        "role_leakage": "Speaks for the human",
        "repetition_4": "Repeated 4-grams",
        "distinct_1": "distinct-1",
        "distinct_2": "distinct-2",
    }
    rows = []
    for policy in run.policies:
        with_interval = {key: share.percent() for key, share in policy.intervals.items()}
        cells = [with_interval.get(key) or percent(policy.shares.get(key)) for key in shares]
        rows.append((policy.label, number(policy.length_median), *cells))
    return Table(headers=("Policy", "Median length", *shares.values()), rows=tuple(rows))


def length_table(run: RunView) -> Table:
    """Win rate and gain against the reference, as they are and at equal length."""
    reference = run.label(run.reference)
    headers = (
        "Policy", "Length (tokens)", f"Win rate vs {reference}", "Win rate, length-controlled",
        "Prompts (n)", "Gain in reward", "Gain, equal length", "Share of the gain left",
    )  # fmt: skip
    rows = []
    for policy in run.policies:
        control = policy.length_controlled
        if control is not None:
            shares = [_percent(control.raw_win_rate), _percent(control.win_rate)]
            gains = [_cell(control.gain, sign=True), _cell(control.matched, sign=True)]
            n = "–" if control.gain is None or control.gain.n is None else f"{control.gain.n:,}"
            rows.append((policy.label, _cell(policy.length), *shares, n, *gains, _percent(control.surviving)))
    return Table(headers=headers, rows=tuple(rows))


def other_judges_table(run: RunView) -> Table:
    """Every policy by the other measures there are: people's own choice, a second reward model."""
    columns: dict[str, list[str]] = {}
    chosen = {claim.policy.policy: claim for claim in claims(run, against=CHOSEN)}
    second = {claim.policy.policy: claim for claim in claims(run, "held_out")}
    if chosen or any(policy.win_rate_chosen for policy in run.policies):
        columns["Win rate vs human-chosen"] = [_percent(policy.win_rate_chosen) for policy in run.policies]
        columns["Reward − human-chosen"] = [_claimed(chosen.get(policy.policy)) for policy in run.policies]
    if second or any(policy.held_out for policy in run.policies):
        columns["Second reward model"] = [_cell(policy.held_out) for policy in run.policies]
        name = f"Second model − {run.label(run.reference)}"
        columns[name] = [_claimed(second.get(policy.policy)) for policy in run.policies]
    rows = zip([policy.label for policy in run.policies], *columns.values(), strict=True)
    return Table(headers=("Policy", *columns), rows=tuple(rows) if columns else ())


def _claimed(claim: Claim | None) -> str:
    return "–" if claim is None else f"{claim.outcome}: {claim.difference.text(sign=True)}"


def _percent(share: Estimate | None) -> str:
    return "–" if share is None else share.percent()


def kl_text(policy: PolicyRecord) -> str:
    """KL per response; best-of-n has an upper bound from its formula, not a measurement."""
    if policy.kl_sequence is None and policy.kl_formula is not None:
        return f"≤ {policy.kl_formula:.2f} (formula)"
    return _cell(policy.kl_sequence)


def _cell(estimate: Estimate | None, *, sign: bool = False) -> str:
    return "–" if estimate is None else estimate.text(sign=sign)
