"""The comparison of policies: the table, what each paid in KL, what is significant, what their text is."""

from collections.abc import Iterator, Mapping, Sequence

from preftune.records.policy import PolicyRecord
from preftune.records.verdict import BETTER, MIN_PROMPTS, UNCLEAR, WORSE
from preftune.report import claims
from preftune.report.blocks import Block, Bullets, Example, Fold, Grid, Picture, Section, Table, say
from preftune.report.sections.by_prompt import by_prompt
from preftune.report.sections.cautions import cautions
from preftune.report.sections.explorers import example
from preftune.report.sentences import verdict_sentences
from preftune.report.tables import (
    column,
    comparison_table,
    detail_table,
    kl_text,
    length_table,
    other_judges_table,
    text_table,
)
from preftune.report.text import Code, Prose, clean, numbers
from preftune.report.view import CHOSEN, RunView
from preftune.rundir import BASE

# Families of comparisons, each corrected for itself: measure, with whom, in words.
TESTED = (
    ("score", None, "score"),
    ("gold", None, "gold score"),
    ("held_out", None, "second reward model"),
    ("score", CHOSEN, "score against the chosen response"),
)


def pictures(figures: Mapping[str, str], prefix: str) -> list[Block]:
    """The drawn figures whose file name begins with `prefix`."""
    return [Picture(file=file, alt=alt) for file, alt in figures.items() if file.startswith(prefix)]


def comparison(run: RunView, figures: Mapping[str, str]) -> Section:
    if not run.policies:
        why = " ".join(run.outdated) or "No policy has been evaluated."
        missing = say(f"{why} So there is no table. ", Code("preftune evaluate RUN"), " makes it.")
        return Section(key="comparison", title="Comparison", blocks=(missing,))
    blocks: list[Block] = [Grid(table=comparison_table(run))]
    if card := example(run):
        blocks += [say(EXAMPLE), Example(card=card)]
    if warnings := cautions(run)[:CAUTIONS]:
        blocks += [say("Before you believe it:"), Bullets(items=tuple((text,) for text in warnings))]
    blocks += pictures(figures, "reward_kl")
    claim_items = Bullets(items=tuple((sentence,) for sentence in verdict_sentences(run)))
    blocks.append(Fold(title="What may be claimed, in full", blocks=(claim_items,)))
    if paid := _trade_off(run):
        blocks.append(Fold(title="What each policy paid in KL for its score", blocks=(paid,)))
    if gains := by_prompt(run.policies, run.label(run.reference), run.gold_words):
        blocks.append(gains)
    blocks.append(Fold(title="How to read the table", blocks=(say(reading(run)),)))
    return Section(key="comparison", title="Comparison", blocks=tuple(blocks))


CAUTIONS = 3  # of the most damaging; all stand under Limits
EXAMPLE = "One prompt, the first of the evaluation, and what each policy made of it:"


def reading(run: RunView) -> str:
    """How to read the table of policies."""
    score = run.score_words if run.functions else "the normalised score of this run's reward model"
    return f"Every policy answered the same held-out prompts; the column Score holds {score}. {READING}"


READING = (
    "Brackets are 95 % intervals from a bootstrap over prompts (shares: Wilson). Differences and win "
    "rates are paired by prompt against the reference; ties count half. KL is KL(policy || reference), exact "
    "over the vocabulary at each token and summed over the response. Best of n needs no training: its KL is "
    "the upper bound ln n - (n-1)/n."
)


def _trade_off(run: RunView) -> Bullets | None:
    """One bullet a trained policy: what it gained, what it paid in KL, and whether best-of-n was cheaper."""
    reference = run.label(run.reference)
    best = next((policy for policy in run.policies if policy.best_of), None)
    items = [
        _paid(run, claim.policy, f"{claim.difference.text(sign=True)} in score against {reference}", best)
        for claim in claims.claims(run)
        if not claim.policy.best_of and claim.policy.policy != BASE and claim.policy.kl is not None
    ]
    return Bullets(items=tuple(items)) if items else None


def _paid(run: RunView, policy: PolicyRecord, gain: str, best: PolicyRecord | None) -> Prose:
    text = f"{policy.label}: {gain} at {kl_text(policy)} nats per response."
    record = None if best is None else run.comparison(policy.policy, against=best.policy)
    if best is None or best.kl is None or policy.kl is None or record is None:
        return (text,)
    outcome = claims.outcome(record.difference, record.p_holm)
    relation = {BETTER: "a higher score", WORSE: "a lower score"}.get(outcome, outcome)
    low = policy.kl.low if policy.kl.low is not None else policy.kl.value
    above = "for more KL" if low > best.kl.value else "and its KL is not shown to be higher"
    against = f"Against {best.label}, paired by prompt: {relation} ({record.difference.text(sign=True)})"
    return (f"{text} {against}, {above} (best-of-n's is at most {best.kl.value:.2f}).",)


def significance(run: RunView) -> Section:
    """Every claim with its interval, its corrected p-value and what the comparison could have found."""
    rows = [
        _tested(claim, words, difference, least)
        for measure, against, words in TESTED
        for claim, difference, least in _with_detectable(claims.claims(run, measure, against))
    ]
    intro = say(
        "A difference is called better or worse only if its 95 % interval leaves out zero and, where several "
        "comparisons were made, its p-value survives Holm's correction at 5 %. No detectable difference does "
        "not mean equal: the last two columns say which true difference would have been detected with "
        "80 % power (before correction), and how many prompts it would take to show the one seen here."
    )
    nothing = say("No policy was compared with another, so nothing is significant or insignificant here.")
    headers = ("Policy", "In", "Verdict", "Difference [95 %]", "p, Holm", "Would be found", "Prompts needed")
    table = Grid(table=Table(headers=headers, rows=tuple(rows), word_columns=3))
    blocks: tuple[Block, ...] = (intro, table) if rows else (nothing,)
    return Section(
        key="significance", title="What is significant and what is not", short="Significance", blocks=blocks
    )


def _with_detectable(compared: Sequence[claims.Claim]) -> Iterator[tuple[claims.Claim, str, str]]:
    """Claims in one unit, each with its difference and the least one that would be found where none was; all
    with as many decimals. None would be of prompts too few for any claim.
    """
    least = numbers(
        claims.detectable(claim.difference) if claim.outcome == UNCLEAR and not _too_few(claim) else None
        for claim in compared
    )
    return zip(compared, column((claim.difference for claim in compared), sign=True), least, strict=True)


def _tested(claim: claims.Claim, words: str, difference: str, least: str) -> tuple[str, ...]:
    """A row of the table of `significance`; what was found needs no more prompts, and too few need as many as
    a claim takes.
    """
    p_value = "–" if claim.p_holm is None else _p(claim.p_holm)
    missing = MIN_PROMPTS - (claim.difference.n or 0)
    needed = f"{MIN_PROMPTS} or more ({missing} missing)" if _too_few(claim) else "–"
    if least != "–" and claim.n_needed is not None and claim.n_needed > (claim.difference.n or 0):
        needed = f"{claim.n_needed:,}"
    return (claim.policy.label, words, claim.outcome, difference, p_value, least, needed)


def _too_few(claim: claims.Claim) -> bool:
    return claim.difference.n is not None and claim.difference.n < MIN_PROMPTS


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def quality(run: RunView, figures: Mapping[str, str]) -> Section | None:
    """Better, or only longer? Length control, other judges, what the text looks like."""
    if not run.policies:
        return None
    blocks: list[Block] = []
    by_length = length_table(run)
    if by_length.rows:
        controls = [policy.length_controlled for policy in run.policies if policy.length_controlled]
        method, source = clean(controls[0].method, 600), clean(controls[0].source, 200)
        how = f"Equal length: {method.rstrip('.')}{f' ({source})' if source else ''}. " if method else ""
        blocks += [
            say(
                f"{how}Both gains are over the n prompts that have such a response and against the mean of "
                "several, so the first need not be the difference above, which is against one. The share of "
                "the gain left is its part that remains at equal length, with the interval of the ratio; a "
                "dash where there is no gain to share out."
            ),
            Grid(table=by_length),
        ]
    by_other_judges = other_judges_table(run)
    if by_other_judges.rows:
        blocks += [Grid(table=by_other_judges)]
    blocks += [
        Grid(table=text_table(run)),
        say(
            "Shares are of all responses of a policy; distinct-n depends on the amount of text and is "
            "comparable within this table only."
        ),
        *pictures(figures, "reward_distribution"),
        Grid(table=detail_table(run)),
        say(
            "k1 is the usual sampled estimate of the same KL; it is noisier and may be negative. Backward KL "
            "is taken on the reference's own responses: what the policy no longer says."
            if any(policy.reverse_kl for policy in run.policies)
            else "k1 is the usual sampled estimate of the same KL; it is noisier and may be negative."
        ),
    ]
    return Section(
        key="quality", title="Better, or only longer?", short="Length and text", blocks=tuple(blocks)
    )
