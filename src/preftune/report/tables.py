"""The tables of a run as plain strings, for the terminal, ANALYSIS.md and report.html alike."""

from preftune.report.blocks import Table
from preftune.report.claims import claims
from preftune.report.text import number, percent
from preftune.report.view import Estimate, PolicyView, RunView


def comparison_table(run: RunView) -> Table:
    """The table that the terminal, ANALYSIS.md and report.html show. Intervals are 95 %."""
    gold = any(policy.gold for policy in run.policies)
    reference = run.label(run.reference)
    headers = [
        "Policy",
        "Reward [95 %]",
        "sd",
        f"Reward − {reference}",
        "Verdict",
        f"Win rate vs {reference}",
    ]
    headers += [f"KL to {reference} (nats/response)", "Length (tokens)", "Ends by itself"] + [
        "Gold [95 %]"
    ] * gold
    outcomes = {claim.policy.policy: claim.outcome for claim in claims(run)}
    rows = []
    for policy in run.policies:
        own = policy.policy == run.reference
        cells = [policy.label, _cell(policy.reward), number(policy.reward_sd)]
        cells += [
            "reference" if own else _cell(policy.difference, sign=True),
            outcomes.get(policy.policy, "–"),
        ]
        cells += ["–" if own or policy.win_rate is None else policy.win_rate.percent(), kl_text(policy)]
        cells += [_cell(policy.length), policy.eos_rate.percent() if policy.eos_rate else "–"]
        rows.append(tuple(cells + [_cell(policy.gold)] * gold))
    return Table(headers=tuple(headers), rows=tuple(rows))


def detail_table(run: RunView) -> Table:
    """KL in all its forms, and what the text looks like. KL in nats, KL(policy || reference)."""
    headers = (
        "Policy",
        "Exact KL / response",
        "Exact KL / token",
        "k1 / response",
        "k1 / token",
        "Median length",
    )
    shares = {
        "empty_share": "Empty",
        "role_leakage": "Speaks for the human",
        "repetition_4": "Repeated 4-grams",
    }
    shares |= {"distinct_1": "distinct-1", "distinct_2": "distinct-2"}
    rows = []
    for policy in run.policies:
        cells = [
            policy.label,
            kl_text(policy),
            *map(_cell, (policy.kl_token, policy.k1_sequence, policy.k1_token)),
        ]
        cells += [number(policy.length_median)] + [percent(policy.shares.get(key)) for key in shares]
        rows.append(tuple(cells))
    return Table(headers=(*headers, *shares.values()), rows=tuple(rows))


def kl_text(policy: PolicyView) -> str:
    """KL per response; best-of-n has an upper bound from its formula, not a measurement."""
    if policy.kl_sequence is None and policy.kl_formula is not None:
        return f"≤ {policy.kl_formula:.2f} (formula)"
    return _cell(policy.kl_sequence)


def _cell(estimate: Estimate | None, *, sign: bool = False) -> str:
    return "–" if estimate is None else estimate.text(sign=sign)
