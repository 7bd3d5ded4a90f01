"""What a run's numbers support. Every claim is read off an interval, never off a point estimate.

"better" and "worse" need a 95 % interval that leaves out zero *and*, where several policies were compared, a
p-value that survives Holm's correction. Everything else is "no detectable difference", which is not "equal":
`detectable` says how large a difference would have had to be.
"""

from dataclasses import dataclass

from preftune.records import verdict as verdicts
from preftune.records.base import Estimate
from preftune.records.policy import PolicyRecord
from preftune.records.reward_model import RewardModelRecord
from preftune.records.verdict import BETTER, Z80, Z95
from preftune.report.seen import taught_by_second
from preftune.report.view import RunView

BAG_OF_WORDS = "bag_of_words"
# Measures in the order of what a summary goes by; the last is in the run's own words (`RunView.score_words`).
JUDGES = {"gold": "gold", "held_out": "a second reward model", "score": ""}
POWER = (Z95 + Z80) / Z95  # half widths of a 95 % interval that 80 % power needs


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """The claim that the numbers allow about one policy against the reference, in one measure."""

    policy: PolicyRecord
    outcome: str
    difference: Estimate
    p_holm: float | None = None
    n_needed: int | None = None


def outcome(difference: Estimate, p_holm: float | None = None) -> str:
    """better, worse or no detectable difference, from the interval and the corrected p-value alone."""
    return verdicts.outcome(difference.low, difference.high, difference.n, p_holm)


def claims(run: RunView, measure: str = "score", against: str | None = None) -> tuple[Claim, ...]:
    """One claim for each policy that was compared in `measure` ("score", "gold", "held_out").

    `against` is a policy's name or CHOSEN; without it the reference, usually SFT.
    """
    reference = run.reference if against is None else against
    compared = []
    for policy in run.policies:
        recorded = run.comparison(policy.policy, measure, reference)
        from_evaluation = policy.score_difference if measure == "score" and against is None else None
        difference = recorded.difference if recorded else from_evaluation
        if difference is None or policy.policy == reference:
            continue
        p_holm = recorded.p_holm if recorded else None
        needed = recorded.n_needed if recorded else None
        words = outcome(difference, p_holm)
        compared.append(
            Claim(policy=policy, outcome=words, difference=difference, p_holm=p_holm, n_needed=needed)
        )
    return tuple(compared)


def detectable(difference: Estimate) -> float | None:
    """The smallest difference that a comparison this wide would find 4 times in 5 (80 % power)."""
    if difference.low is None or difference.high is None:
        return None
    return POWER * (difference.high - difference.low) / 2


def judge_is_sound(run: RunView) -> bool | None:
    """True if the interval of the reward model's accuracy lies above chance; None if not measured."""
    return _is_sound(run.reward_model)


def _is_sound(model: RewardModelRecord | None) -> bool | None:
    if model is None or model.accuracy is None or model.accuracy.low is None:
        return None
    return model.accuracy.low > 0.5


def usable_judges(run: RunView) -> dict[str, str]:
    """`JUDGES`, without a second reward model that some stage learnt from, or that is not shown to be better
    than a coin: it confirms nothing.
    """
    useless = taught_by_second(run) or _is_sound(run.second_model) is False
    return {measure: words for measure, words in JUDGES.items() if measure != "held_out" or not useless}


def beats_baselines(run: RunView) -> bool | None:
    """True if the reward model is shown to be better than the best baseline; None where nothing was compared.

    By the paired test on the same pairs where there is one, otherwise by the interval of its accuracy.
    """
    rule, model = strongest_baseline(run), run.reward_model
    if rule is None or model is None or model.accuracy is None:
        return None
    test = next((test for test in model.baseline_tests if test.baseline == rule[0]), None)
    if test is not None:
        return outcome(test.difference, test.p_holm) == BETTER
    return model.accuracy.low is not None and model.accuracy.low > rule[1].value


def strongest_baseline(run: RunView) -> tuple[str, Estimate] | None:
    """The baseline that does best on the same pairs."""
    if run.reward_model is None or not run.reward_model.baselines:
        return None
    return max(run.reward_model.baselines.items(), key=lambda item: item[1].value)


def length_outcome(policy: PolicyRecord) -> str | None:
    """better, worse or no detectable difference at equal length; None where it was not measured."""
    control = policy.length_controlled
    return None if control is None or control.matched is None else outcome(control.matched)
