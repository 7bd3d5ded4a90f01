"""The tables of a run as plain strings, for the terminal, ANALYSIS.md and report.html alike."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from preftune.records.base import Estimate, decimals_alike
from preftune.records.policy import PolicyRecord
from preftune.report.blocks import Table
from preftune.report.claims import Claim, claims
from preftune.report.text import clean, numbers, percent
from preftune.report.view import CHOSEN, RunView


def comparison_table(run: RunView) -> Table:
    """The table that the terminal, ANALYSIS.md and report.html show. Intervals are 95 %."""
    golds = gold_columns(run)
    reference = run.label(run.reference)
    headers = [
        "Policy",
        "Score [95 %]",
        "sd",
        f"Score − {reference}",
        "Verdict",
        f"Win rate vs {reference}",
    ]
    headers += [f"KL to {reference} (nats/response)", "Length (tokens)", "Ends by itself"]
    headers += [f"{words} [95 %]" for words in golds]
    outcomes = {claim.policy.policy: claim.outcome for claim in claims(run)}
    baseline = [policy.policy == run.reference for policy in run.policies]
    differences = column((policy.score_difference for policy in run.policies), sign=True)
    win_rates = map(share_text, (policy.win_rate for policy in run.policies))
    columns: list[Iterable[str]] = [
        (policy.label for policy in run.policies),
        column(policy.score for policy in run.policies),
        column(None if sd is None else Estimate(value=sd) for sd in (p.score_sd for p in run.policies)),
        (
            "reference" if is_reference else text
            for is_reference, text in zip(baseline, differences, strict=True)
        ),
        (outcomes.get(policy.policy, "–") for policy in run.policies),
        ("–" if is_reference else text for is_reference, text in zip(baseline, win_rates, strict=True)),
        kl_column(run.policies),
        column(policy.length for policy in run.policies),
        map(share_text, (policy.eos_rate for policy in run.policies)),
        *(column(map(value, run.policies)) for value in golds.values()),
    ]
    return Table(headers=tuple(headers), rows=tuple(zip(*columns, strict=True)))


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
    columns = [
        [policy.label for policy in run.policies],
        kl_column(run.policies),
        column(policy.kl_token for policy in run.policies),
        column(policy.k1_sequence for policy in run.policies),
        column(policy.k1_token for policy in run.policies),
        *[column(policy.reverse_kl for policy in run.policies)] * backward,
    ]
    rows = tuple(zip(*columns, strict=True))
    return Table(headers=(*headers, *["Backward KL / response"] * backward), rows=rows)


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
    medians = numbers(policy.length_median for policy in run.policies)
    for policy, median in zip(run.policies, medians, strict=True):
        with_interval = {key: share.percent() for key, share in policy.intervals.items()}
        cells = [with_interval.get(key) or percent(policy.shares.get(key)) for key in shares]
        rows.append((policy.label, median, *cells))
    return Table(headers=("Policy", "Median length", *shares.values()), rows=tuple(rows))


def length_table(run: RunView) -> Table:
    """Win rate at equal length, and gain against the reference as it is and at equal length."""
    headers = (
        "Policy", "Length (tokens)", "Win rate, length-controlled", "Prompts (n)",
        "Gain in score", "Gain, equal length", "Share of the gain left",
    )  # fmt: skip
    measured = [(policy, policy.length_controlled) for policy in run.policies if policy.length_controlled]
    controls = [control for _, control in measured]
    columns: list[Iterable[str]] = [
        (policy.label for policy, _ in measured),
        column(policy.length for policy, _ in measured),
        (share_text(control.win_rate) for control in controls),
        (f"{c.gain.n:,}" if c.gain is not None and c.gain.n is not None else "–" for c in controls),
        column((control.gain for control in controls), sign=True),
        column((control.matched for control in controls), sign=True),
        (share_text(control.surviving) for control in controls),
    ]
    return Table(headers=headers, rows=tuple(zip(*columns, strict=True)))


def other_judges_table(run: RunView) -> Table:
    """Every policy by the other measures there are: the chosen responses, a second reward model."""
    columns: dict[str, list[str]] = {}
    chosen = {claim.policy.policy: claim for claim in claims(run, against=CHOSEN)}
    second = {claim.policy.policy: claim for claim in claims(run, "held_out")}
    if chosen or any(policy.win_rate_chosen for policy in run.policies):
        columns["Win rate vs chosen"] = [share_text(policy.win_rate_chosen) for policy in run.policies]
        columns["Score − chosen"] = _claim_texts(run, chosen)
    if second or any(policy.held_out for policy in run.policies):
        columns["Second reward model"] = column(policy.held_out for policy in run.policies)
        columns[f"Second model − {run.label(run.reference)}"] = _claim_texts(run, second)
    rows = zip([policy.label for policy in run.policies], *columns.values(), strict=True)
    return Table(headers=("Policy", *columns), rows=tuple(rows) if columns else ())


def _claim_texts(run: RunView, claimed: Mapping[str, Claim]) -> list[str]:
    row_claims = [claimed.get(policy.policy) for policy in run.policies]
    texts = column((claim and claim.difference for claim in row_claims), sign=True)
    return [
        text if claim is None else f"{claim.outcome}: {text}"
        for claim, text in zip(row_claims, texts, strict=True)
    ]


def share_text(share: Estimate | None) -> str:
    """A share with its interval; a dash for none."""
    return "–" if share is None else share.percent()


def kl_text(policy: PolicyRecord, digits: int | None = None) -> str:
    """KL per response; best-of-n has an upper bound from its formula, not a measurement."""
    if policy.kl_sequence is None and policy.kl_formula is not None:
        return f"≤ {policy.kl_formula:.{2 if digits is None else digits}f} (formula)"
    return "–" if policy.kl_sequence is None else policy.kl_sequence.text(digits=digits)


def kl_column(policies: Sequence[PolicyRecord]) -> list[str]:
    """The cells of a column of KL, all with as many decimals."""
    digits = decimals_alike(policy.kl_sequence for policy in policies)
    return [kl_text(policy, digits) for policy in policies]


def column(estimates: Iterable[Estimate | None], *, sign: bool = False, scale: float = 1.0) -> list[str]:
    """The cells of a column, all with as many decimals; a dash for none."""
    cells = list(estimates)
    digits = decimals_alike(cells, scale)
    return ["–" if cell is None else cell.text(sign=sign, scale=scale, digits=digits) for cell in cells]
