"""Pathologies that the evaluation of a run shows: of its reward model and of its policies against SFT."""

from collections.abc import Iterator

from preftune.records.base import Estimate
from preftune.records.policy import PolicyRecord
from preftune.records.verdict import BETTER, WORSE
from preftune.report.claims import claims, judge_is_sound, usable_judges
from preftune.report.doctor.base import Pathology, Symptom, course, thirds
from preftune.report.view import RunView
from preftune.rundir import BASE

BY_LENGTH = 0.5  # correlation of score and length
SURVIVES = 0.5  # share of a gain that is left at equal length
DISTINCT = 0.6  # of SFT's distinct-2; quickstart at healthy settings has 0.77
REPEATED = 0.1  # more repeated 4-grams than SFT
# Nats a reply. With a small reward model gold has turned down well before (Gao et al. 2023, figure 1b).
KL = 30.0
OUTSIDE = 3.0  # sd of the scores of chosen replies
MANY = 0.1  # of the replies
OVERFIT = 0.2  # accuracy in training beyond that on held-out pairs


def _trained_policies(run: RunView) -> list[PolicyRecord]:
    return [p for p in run.policies if p.policy not in (run.reference, "base") and not p.best_of]


def _chance(run: RunView) -> Iterator[Symptom]:
    model = run.reward_model
    if model is not None and model.accuracy is not None and judge_is_sound(run) is False:
        yield "reward model", f"accuracy {model.accuracy.percent()}: the interval is not above 50 %"


def _overfit(run: RunView) -> Iterator[Symptom]:
    measured = {m.stage: m.accuracy for m in (run.reward_model, *run.other_reward_models) if m is not None}
    for stage in run.stages:
        train, held_out = thirds(course(stage, "accuracy")), measured.get(stage.name)
        if train and held_out and train.last - held_out.value > OVERFIT and train.last > (held_out.high or 1):
            yield stage.name, f"{train.last:.0%} of the training pairs right, {held_out.percent()} of others"


def _length(run: RunView) -> Iterator[Symptom]:
    model = run.reward_model
    size = model.correlation_score_length if model else None
    if size is not None and abs(size.value) >= BY_LENGTH:
        yield "reward model", f"score and length correlate by {size.value:+.2f}"
    for policy in _trained_policies(run):
        surviving = policy.length_controlled.surviving if policy.length_controlled else None
        better = (
            policy.score_difference
            and policy.score_difference.low is not None
            and policy.score_difference.low > 0
        )
        if better and surviving is not None and surviving.high is not None and surviving.high < SURVIVES:
            yield policy.label, f"of its gain {surviving.percent()} is left at equal length"


def _outside(run: RunView) -> Iterator[Symptom]:
    if run.functions:  # whose scores are in no unit of sd
        return
    for policy in _trained_policies(run):
        if policy.score is not None and policy.score.value > OUTSIDE:
            yield policy.label, f"mean score {policy.score.value:.1f} sd above the chosen replies'"


def _over_optimised(run: RunView) -> Iterator[Symptom]:
    for measure in [measure for measure in usable_judges(run) if measure != "score"]:
        worse = {claim.policy.policy: claim for claim in claims(run, measure) if claim.outcome == WORSE}
        for claim in claims(run):
            if claim.policy.policy == BASE:  # nobody tuned it
                continue
            if claim.outcome == BETTER and (lost := worse.get(claim.policy.policy)):
                name = "gold" if measure == "gold" else "the second reward model"
                yield (
                    claim.policy.label,
                    f"score {claim.difference.text(sign=True)}, {name} {lost.difference.text(sign=True)}",
                )


def _kl(run: RunView) -> Iterator[Symptom]:
    for policy in _trained_policies(run):
        if policy.kl_sequence is not None and not policy.kl_sequence.value <= KL:  # nan, too
            yield (
                policy.label,
                f"KL to {run.label(run.reference)}: {policy.kl_sequence.value:.0f} nats a reply",
            )


def _distinct(run: RunView) -> Iterator[Symptom]:
    reference = run.policy(run.reference)
    usual = reference.shares.get("distinct_2") if reference else None
    for policy in _trained_policies(run):
        distinct = policy.shares.get("distinct_2")
        if usual and distinct is not None and distinct < DISTINCT * usual:
            yield policy.label, f"distinct-2 {distinct:.2f}, {run.label(run.reference)} {usual:.2f}"


def _repeats(run: RunView) -> Iterator[Symptom]:
    reference = run.policy(run.reference)
    usual = reference.shares.get("repetition_4", 0.0) if reference else 0.0
    for policy in _trained_policies(run):
        repeated = policy.shares.get("repetition_4")
        if repeated is not None and repeated - usual > REPEATED:
            yield policy.label, f"{repeated:.0%} of the 4-grams of a reply are repeats, {usual:.0%} before"


def _broken(run: RunView) -> Iterator[Symptom]:
    reference = run.policy(run.reference)
    for policy in _trained_policies(run):
        for key, words in (("empty_share", "are empty"), ("role_leakage", "speak for the human")):
            usual = reference.shares.get(key, 0.0) if reference else 0.0
            share, interval = policy.shares.get(key, 0.0), policy.intervals.get(key)
            if share - usual > MANY and _above(interval, reference and reference.intervals.get(key)):
                yield policy.label, f"{share:.0%} of its replies {words}, {usual:.0%} before"


def _above(interval: Estimate | None, usual: Estimate | None) -> bool:
    """Whether the one lies above the other. True where an end is unknown: then the shares alone decide."""
    low, high = interval and interval.low, usual and usual.high
    return low is None or high is None or low > high


RESULTS = (
    Pathology(
        "reward model at chance",
        "it does not tell the better reply, so its scores say nothing about quality",
        "more pairs, more steps, a larger base, or another judge; trust no policy's score until then",
        _chance,
    ),
    Pathology(
        "reward model learnt its pairs by heart",
        "it is far better on the pairs that it was trained on",
        "fewer epochs, a lower learning_rate, or more pairs",
        _overfit,
    ),
    Pathology(
        "score is explained by length",
        "the judge prefers longer (or shorter) replies, whatever they say",
        "balance the lengths of the pairs; read gains at equal length only",
        _length,
    ),
    Pathology(
        "score outside what the reward model saw",
        "the policy writes what no pair was like; scores there mean nothing",
        "raise kl_coef, stop earlier, or train the reward model on the policy's own replies",
        _outside,
    ),
    Pathology(
        "over-optimisation",
        "the score rises while a judge that trained no policy falls (Gao et al. 2023, arXiv:2210.10760)",
        "raise kl_coef, stop earlier, or use a better reward model",
        _over_optimised,
    ),
    Pathology(
        "KL beyond budget",
        "the policy has left the model that the reward model knows",
        "raise kl_coef, or lower learning_rate or steps",
        _kl,
    ),
    Pathology(
        "diversity collapses",
        "the policy writes the same words to every prompt",
        "raise kl_coef, or stop earlier",
        _distinct,
    ),
    Pathology(
        "repetition",
        "the policy is paid for writing the same again",
        "raise kl_coef, or lower max_new_tokens",
        _repeats,
    ),
    Pathology(
        "broken replies",
        "replies are empty or continue into another turn",
        "check SFT's own samples; raise kl_coef; penalise them by a reward function",
        _broken,
    ),
)
