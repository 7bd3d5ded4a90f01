"""What a run's numbers support, in words. Every claim is read off an interval, never off a point estimate.

"better" and "worse" need a 95 % interval that leaves out zero *and*, where several policies were compared, a
p-value that survives Holm's correction. Everything else is "no detectable difference", which is not "equal":
`detectable` says how large a difference would have had to be.
"""

from dataclasses import dataclass

from preftune.report.text import join
from preftune.report.view import Estimate, PolicyView, RunView

BETTER, WORSE, UNCLEAR = "better", "worse", "no detectable difference"
SIGNIFICANCE = 0.05
MIN_PROMPTS = 10  # below this a bootstrap over prompts gives intervals that are far too short: no claim
FEW_STEPS = 10
POWER = (1.959964 + 0.841621) / 1.959964  # half widths of a 95 % interval that 80 % power needs


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What may be said about one policy against the reference in one measure."""

    policy: PolicyView
    outcome: str
    difference: Estimate
    p_holm: float | None = None
    n_needed: int | None = None


def outcome(difference: Estimate, p_holm: float | None = None) -> str:
    """better, worse or no detectable difference, from the interval and the corrected p-value alone."""
    survives = p_holm is None or p_holm <= SIGNIFICANCE
    enough = difference.n is None or difference.n >= MIN_PROMPTS
    if not (difference.excludes(0.0) and survives and enough):
        return UNCLEAR
    return BETTER if difference.value > 0 else WORSE


def claims(run: RunView, measure: str = "score") -> tuple[Claim, ...]:
    """One claim for each policy that was compared with the reference in `measure` ("score", "gold")."""
    found = []
    for policy in run.policies:
        recorded = run.comparison(policy.policy, measure)
        difference = recorded.difference if recorded else policy.difference if measure == "score" else None
        if difference is None or policy.policy == run.reference:
            continue
        p_holm = recorded.p_holm if recorded else None
        needed = recorded.n_needed if recorded else None
        words = outcome(difference, p_holm)
        found.append(
            Claim(policy=policy, outcome=words, difference=difference, p_holm=p_holm, n_needed=needed)
        )
    return tuple(found)


def detectable(difference: Estimate) -> float | None:
    """The smallest difference that a comparison this wide would find 4 times in 5 (80 % power)."""
    if difference.low is None or difference.high is None:
        return None
    return POWER * (difference.high - difference.low) / 2


def pairs_needed(accuracy: float) -> int | None:
    """Pairs needed to tell this accuracy from chance, 5 % two-sided, 80 % power; None at or below chance."""
    edge = accuracy - 0.5
    return None if edge <= 0 else round((1.959964 + 0.841621) ** 2 * 0.25 / edge**2 + 0.5)


def judge_is_sound(run: RunView) -> bool | None:
    """True if the interval of the reward model's accuracy lies above chance; None if not measured."""
    model = run.reward_model
    if model is None or model.accuracy is None or model.accuracy.low is None:
        return None
    return model.accuracy.low > 0.5


def verdict(run: RunView) -> str:
    """The run in one paragraph: what can be claimed, and what cannot."""
    return " ".join(verdict_parts(run))


def verdict_parts(run: RunView) -> tuple[str, ...]:
    """The verdict, one thought a string: the policies, their judge, the gold score, the size of the run."""
    made = claims(run)
    if not made:
        return (
            f"Nothing can be said about the policies of this run yet: {_why_no_claims(run)}.",
            _judge(run),
        )
    n = next((claim.difference.n for claim in made if claim.difference.n), None)
    where = f"On {n} held-out prompts" if n else "On the held-out prompts"
    outcomes = _outcomes(made, run.label(run.reference))
    scored = f"{where}, by the reward model's own score, {outcomes}."
    if judge_is_sound(run) is False:
        scored = (
            "Nothing can be claimed about quality: the reward model that scores the policies was not shown "
            f"to be better than a coin. {scored}"
        )
    return tuple(part for part in (scored, _judge(run), _gold(run), _size(run)) if part)


def _why_no_claims(run: RunView) -> str:
    if not run.policies:
        return "no policy has been evaluated"
    if run.policy(run.reference) is None:
        return f"{run.label(run.reference)}, with which all others are compared, has not been evaluated"
    return f"no policy has been compared with {run.label(run.reference)}"


def _outcomes(made: tuple[Claim, ...], reference: str) -> str:
    """`PPO (+0.4 [...]) and DPO (...) are better than SFT; GRPO (...) shows no detectable difference`."""
    parts = []
    for kind in (BETTER, WORSE, UNCLEAR):
        group = [claim for claim in made if claim.outcome == kind]
        if not group:
            continue
        named = join([f"{claim.policy.label} ({claim.difference.text(sign=True)})" for claim in group])
        one = len(group) == 1
        if kind == UNCLEAR:
            parts.append(f"{named} {'shows' if one else 'show'} no detectable difference from {reference}")
        else:
            parts.append(f"{named} {'is' if one else 'are'} {kind} than {reference}")
    return "; ".join(parts)


def _judge(run: RunView) -> str:
    """How far the judge itself can be trusted."""
    model = run.reward_model
    if model is None or model.accuracy is None:
        return "The reward model itself has not been measured on held-out pairs."
    pairs = f"{model.n:,} held-out pairs" if model.n else "held-out pairs"
    start = f"The reward model prefers the chosen response in {model.accuracy.percent()} of {pairs}"
    if judge_is_sound(run) is not True:
        return f"{start}, which is {below_or_at_chance(model.accuracy)}."
    rule = strongest_baseline(run)
    if rule is None:
        return f"{start}, better than chance."
    name, share = rule
    by_length = f"always choosing the {name} one ({100 * share.value:.1f} %)"
    if model.accuracy.low is not None and model.accuracy.low > share.value:
        return f"{start}, better than chance and than {by_length}."
    return f"{start}: better than chance, but not better than {by_length}."


def below_or_at_chance(accuracy: Estimate) -> str:
    """Words for an accuracy that is not above chance."""
    if accuracy.high is not None and accuracy.high < 0.5:
        return "worse than chance"
    return "not distinguishable from chance (50 %)"


def strongest_baseline(run: RunView) -> tuple[str, Estimate] | None:
    """The length rule that does best on the same pairs."""
    if run.reward_model is None or not run.reward_model.baselines:
        return None
    return max(run.reward_model.baselines.items(), key=lambda item: item[1].value)


def _gold(run: RunView) -> str:
    """Does the built-in world's gold score, which no training saw, agree with the reward model's?"""
    gold = {claim.policy.policy: claim for claim in claims(run, "gold")}
    if not gold:
        return ""
    trained = claims(run)
    gained = [claim for claim in trained if claim.outcome == BETTER]
    fooled = [claim for claim in gained if _outcome_of(gold, claim) == WORSE]
    unseen = [claim for claim in gained if _outcome_of(gold, claim) == UNCLEAR]
    outcomes = _outcomes(tuple(gold.values()), run.label(run.reference))
    text = f"By the world's gold score, which training never saw, {outcomes}."
    if fooled:
        names = join([claim.policy.label for claim in fooled])
        text += f" What {names} gained in reward was lost in gold: that is over-optimisation."
    if unseen:
        names = join([claim.policy.label for claim in unseen])
        text += f" For {names} the gain in reward is not shown to be one in gold."
    return text


def _outcome_of(table: dict[str, Claim], claim: Claim) -> str | None:
    other = table.get(claim.policy.policy)
    return other.outcome if other else None


def _size(run: RunView) -> str:
    short = short_stages(run)
    if not short:
        return ""
    return f"The run is too small to show learning ({join(short)}): it shows that the path works, no more."


def short_stages(run: RunView) -> list[str]:
    """Stages with so few steps that no lesson about the algorithm can be drawn: `ppo took 3 steps`."""
    return [
        f"{stage.name} took {stage.steps} step{'' if stage.steps == 1 else 's'}"
        for stage in run.stages
        if stage.steps is not None and stage.steps < FEW_STEPS
    ]
