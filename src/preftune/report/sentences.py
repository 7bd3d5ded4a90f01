"""What a run's numbers support, in words: the verdict at its head, and its first sentence without numbers."""

from collections.abc import Iterable

from preftune.records.base import Estimate
from preftune.records.verdict import BETTER, UNCLEAR, WORSE
from preftune.report.claims import (
    BAG_OF_WORDS,
    JUDGES,
    Claim,
    beats_baselines,
    claims,
    judge_is_sound,
    length_outcome,
    strongest_baseline,
    usable_judges,
)
from preftune.report.seen import ceilings, taught_by_second, unseen_words
from preftune.report.text import clean, join
from preftune.report.view import CHOSEN, RunView
from preftune.rundir import BASE

FEW_STEPS = 10


def summary(run: RunView) -> str:
    """The run in one plain sentence without numbers: who beats the reference by which judge, and best-of-n.

    By the judge that training saw least: gold, else a second reward model, else the score itself. Policies
    that were trained on gold are no contestants by it.
    """
    measure, claims_shown = _least_seen(run)
    judge = JUDGES[measure] or run.score_words
    if not claims_shown:
        return _nothing_yet(run)
    if measure == "score" and judge_is_sound(run) is False:
        return "Nothing can be claimed about quality: the reward model is not shown to be better than a coin."
    reference = run.label(run.reference)
    better, worse = ([c for c in claims_shown if c.outcome == kind] for kind in (BETTER, WORSE))
    if not better and not worse:
        return f"No policy is shown to differ from {reference} by {judge}."
    if not better:
        return f"No policy is shown to beat {reference} by {judge}; {_labels(worse)} did worse."
    clauses = [f"{_labels(better)} beat{'s' * (len(better) == 1)} {reference} by {judge}"]
    clauses += [f"{_labels(worse)} did worse"] if worse else []
    best = next((policy for policy in run.policies if policy.best_of), None)
    if best and (against := claims(run, measure, best.policy)):
        above = [c for c in against if c.outcome == BETTER and _contests(run, measure, c)]
        words = f"{_labels(above)} beat{'s' * (len(above) == 1)}" if above else "none is shown to beat"
        clauses.append(f"{words} {best.label}")
    return f"{'; '.join(clauses)}."


def _least_seen(run: RunView) -> tuple[str, list[Claim]]:
    """The measure that a summary goes by, with its claims about trained policies."""
    for measure in usable_judges(run):
        if contestants := [claim for claim in claims(run, measure) if _contests(run, measure, claim)]:
            return measure, contestants
    return "score", []


def _contests(run: RunView, measure: str, claim: Claim) -> bool:
    """Whether a claim is about a policy that was trained, and not on this measure."""
    name = claim.policy.policy
    return not claim.policy.best_of and name != BASE and (measure != "gold" or name not in ceilings(run))


def verdict_sentences(run: RunView) -> tuple[str, ...]:
    """The verdict, one thought a string: the policies, their judge, the gold score, the size of the run."""
    by_score = claims(run)
    compared = next(filter(None, (claims(run, measure) for measure in JUDGES)), ())
    if not compared:
        return tuple(sentence for sentence in (_nothing_yet(run), _judge(run)) if sentence)
    n = next((claim.difference.n for claim in compared if claim.difference.n), None)
    prompts = f"On {n} held-out prompts" if n else "On the held-out prompts"
    if not by_score:
        unscored = f"{prompts}, the policies were compared without a score of a reward model."
        return tuple(sentence for sentence in (unscored, _gold(run), _held_out(run), _size(run)) if sentence)
    outcomes = _outcomes(by_score, run.label(run.reference))
    outcomes_sentence = f"{prompts}, by {run.score_words}, {outcomes}."
    sentences = [_judge(run), _gold(run), _held_out(run)]
    if judge_is_sound(run) is False:
        scores = "in the score of" if run.functions else "that scores"
        outcomes_sentence = (
            f"Nothing can be claimed about quality: the reward model {scores} the policies was not shown to "
            f"be better than a coin. {outcomes_sentence}"
        )
    else:
        sentences += [_at_equal_length(run), _against_best_of(run), _against_chosen(run)]
    return tuple(sentence for sentence in (outcomes_sentence, *sentences, _size(run)) if sentence)


def _nothing_yet(run: RunView) -> str:
    """The sentence of a run without claims, and why there are none."""
    why = f"no policy has been compared with {run.label(run.reference)}"
    if not run.policies:
        gone = "what was measured is of models that are no longer there"
        why = gone if run.outdated else "no policy has been evaluated"
    elif run.policy(run.reference) is None:
        why = f"{run.label(run.reference)}, with which all others are compared, has not been evaluated"
    return f"Nothing can be said about the policies of this run yet: {why}."


def _outcomes(compared: tuple[Claim, ...], reference: str) -> str:
    """`PPO (+0.4 [...]) and DPO (...) are better than SFT; GRPO (...) shows no detectable difference`."""
    clauses = []
    for kind in (BETTER, WORSE, UNCLEAR):
        group = [claim for claim in compared if claim.outcome == kind]
        if not group:
            continue
        policies = join([f"{claim.policy.label} ({claim.difference.text(sign=True)})" for claim in group])
        shows, is_ = ("shows", "is") if len(group) == 1 else ("show", "are")
        if kind == UNCLEAR:
            clauses.append(f"{policies} {shows} no detectable difference from {reference}")
        else:
            clauses.append(f"{policies} {is_} {kind} than {reference}")
    return "; ".join(clauses)


def _judge(run: RunView) -> str:
    """How far the judge itself can be trusted; empty where functions alone judge."""
    model = run.reward_model
    if not run.scored_by_model:
        return ""
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
    baseline = f"{baseline_words(name)} ({100 * share.value:.1f} %)"
    if beats_baselines(run):
        return f"{start}, better than chance and than {baseline}."
    return f"{start}: better than chance, but not shown to be better than {baseline}."


def _gold(run: RunView) -> str:
    """Does the gold score agree with the reward model's?"""
    text = f"By {run.gold_words},{unseen_words(run)} "
    return _second_opinion(run, "gold", text, "gold", "over-optimisation")


def _held_out(run: RunView) -> str:
    """Does a second reward model, which trained no policy, agree with the first?"""
    if fault := second_judge_fault(run):
        return f"By the second reward model nothing can be claimed: {fault}."
    other_prompts = ", trained on other prompts," if run.second_model and run.second_model.held_out else ""
    text = f"By a second reward model{other_prompts} that trained no policy, "
    return _second_opinion(run, "held_out", text, "the second's score", "a sign of over-optimisation")


def _second_opinion(run: RunView, measure: str, start: str, other_measure: str, loss: str) -> str:
    """The outcomes by another measure, and which gains in score it does not confirm."""
    by_policy = {claim.policy.policy: claim for claim in claims(run, measure)}
    if not by_policy:
        return ""
    gained = [c for c in claims(run) if c.outcome == BETTER and c.policy.policy != BASE]  # nobody tuned it
    text = f"{start}{_outcomes(tuple(by_policy.values()), run.label(run.reference))}."
    if fooled := _labels(claim for claim in gained if _outcome_of(by_policy, claim) == WORSE):
        text += f" What {fooled} gained in score was lost in {other_measure}: that is {loss}."
    if unseen := _labels(claim for claim in gained if _outcome_of(by_policy, claim) == UNCLEAR):
        text += f" For {unseen} the gain in score is not shown to be one in {other_measure}."
    return text


def _labels(labelled: Iterable[Claim]) -> str:
    return join([claim.policy.label for claim in labelled])


def _outcome_of(table: dict[str, Claim], claim: Claim) -> str | None:
    counterpart = table.get(claim.policy.policy)
    return counterpart.outcome if counterpart else None


def _at_equal_length(run: RunView) -> str:
    """Which gains are left where both responses are equally long: "better", or only longer?"""
    gained = [claim.policy for claim in claims(run) if claim.outcome == BETTER and not claim.policy.best_of]
    groups: dict[str, list[str]] = {BETTER: [], WORSE: [], UNCLEAR: []}
    for policy in gained:
        verdict, control = length_outcome(policy), policy.length_controlled
        if verdict and control and control.matched:
            groups[verdict].append(f"{policy.label} ({control.matched.text(sign=True)})")
    words = {
        BETTER: "the gain in score remains for {}",
        UNCLEAR: "no gain is shown to remain for {}",
        WORSE: "the gain turns into a loss for {}",
    }
    clauses = [words[kind].format(join(groups[kind])) for kind in words if groups[kind]]
    return f"Between responses of equal length, {'; '.join(clauses)}." if clauses else ""


def _against_best_of(run: RunView) -> str:
    """Was training worth more than choosing the best of a few samples?"""
    best = next((policy for policy in run.policies if policy.best_of), None)
    against_best = claims(run, against=best.policy) if best else ()
    if not best or not against_best:
        return ""
    return f"Against choosing without training: {_outcomes(against_best, best.label)}."


def _against_chosen(run: RunView) -> str:
    """The policies against the responses that the data call chosen, by the same score."""
    against_chosen = tuple(claim for claim in claims(run, against=CHOSEN) if not claim.policy.best_of)
    if not against_chosen:
        return ""
    return f"Against the chosen responses, by the same score: {_outcomes(against_chosen, run.label(CHOSEN))}."


def _size(run: RunView) -> str:
    short = short_stages(run)
    if not short:
        return ""
    return f"The run is too small to show learning ({join(short)}): it shows only that the pipeline works."


def short_stages(run: RunView) -> list[str]:
    """Stages with so few steps that no lesson about the algorithm can be drawn: `ppo took 3 steps`."""
    return [
        f"{stage.name} took {stage.record.steps} step{'' if stage.record.steps == 1 else 's'}"
        for stage in run.stages
        if stage.record.steps is not None and stage.record.steps < FEW_STEPS
    ]


def second_judge_fault(run: RunView) -> str:
    """Why the second reward model confirms nothing; "" where it does, or there is none."""
    if "held_out" in usable_judges(run) or not claims(run, "held_out"):
        return ""
    if taught := taught_by_second(run):
        return f"{join([clean(name, 40) for name in taught])} learnt from the second reward model"
    accuracy = run.second_model and run.second_model.accuracy
    words = f" ({accuracy.percent()}) is {below_or_at_chance(accuracy)}" if accuracy else ""
    return f"the second reward model's accuracy{words}"


def baseline_words(baseline: str) -> str:
    """What a baseline does, as it stands after "than"."""
    if baseline == BAG_OF_WORDS:
        return "a logistic model of word counts"
    return f"always choosing the {clean(baseline, 40)} one"


def below_or_at_chance(accuracy: Estimate) -> str:
    """Words for an accuracy that is not above chance."""
    if accuracy.high is not None and accuracy.high < 0.5:
        return "worse than chance"
    return "not distinguishable from chance (50 %)"
