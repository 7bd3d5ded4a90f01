"""What a careful reader should know before believing the table."""

from preftune.records.policy import PolicyRecord
from preftune.records.reward_model import RewardModelRecord
from preftune.records.verdict import BETTER, MIN_PROMPTS, WORSE
from preftune.report.claims import (
    BAG_OF_WORDS,
    beats_baselines,
    claims,
    judge_is_sound,
    strongest_baseline,
    usable_judges,
)
from preftune.report.doctor.results import BY_LENGTH, KL, MANY, SURVIVES
from preftune.report.sections.by_prompt import lost_on
from preftune.report.seen import seen_gold
from preftune.report.sentences import baseline_words, below_or_at_chance, second_judge_fault, short_stages
from preftune.report.text import clean, join
from preftune.report.view import RunView
from preftune.rundir import BASE

FEW_PROMPTS = 50
LOW_EOS = 0.5
REPETITIVE = 0.3  # share of repeated 4-grams


def cautions(run: RunView) -> tuple[str, ...]:
    """What a careful reader should know before believing the table, most damaging first."""
    warnings = [*run.outdated, *_lost_elsewhere(run)]
    if short := short_stages(run):  # it explains the others: always among the first, which all readers see
        warnings.append(
            f"Too small to show learning: {join(short)}. The numbers show only that the pipeline works."
        )
    warnings += [*_unended_warnings(run), *_seen_gold(run), *_judge_warnings(run)]
    if fault := second_judge_fault(run):
        warnings.append(f"{fault[0].upper()}{fault[1:]}: it confirms nothing.")
    warnings += [*_lost_on_some(run), *_policy_warnings(run)]
    early = [(s.name, why) for s in run.stages for why in (s.record.kl_budget, s.record.best)]
    warnings += [f"{how.words(clean(name, 60))}." for name, how in early if how is not None]
    prompts = max((policy.n_prompts or 0 for policy in run.policies), default=0)
    if 0 < prompts < MIN_PROMPTS:
        warnings.append(f"Only {prompts} prompts: too few for any claim; at least {MIN_PROMPTS} are needed.")
    elif 0 < prompts < FEW_PROMPTS:
        warnings.append(
            f"Only {prompts} prompts: only large differences can be detected, and intervals are rough."
        )
    return tuple(warnings)


def _lost_elsewhere(run: RunView) -> list[str]:
    """Gains in score that a judge that training did not see takes back."""
    gained = {claim.policy.policy for claim in claims(run) if claim.outcome == BETTER} - {BASE}
    warnings = []
    for measure, judge in usable_judges(run).items():
        by_judge = claims(run, measure) if measure != "score" else ()
        lost = [c.policy.label for c in by_judge if c.outcome == WORSE and c.policy.policy in gained]
        if lost:
            warnings.append(f"Over-optimisation: {join(lost)} gained in score and lost by {judge}.")
    return warnings


def _lost_on_some(run: RunView) -> list[str]:
    """Gains over all prompts that are losses on some."""
    warnings = []
    for claim in claims(run):
        if claim.outcome == BETTER and claim.policy.policy != BASE:
            losses = [f"{title}: {loss.text(sign=True)}, n {loss.n}" for title, loss in lost_on(claim.policy)]
            if losses:
                gained = f"{claim.policy.label} gained over all prompts"
                of_mix = "its gain is that of this mix"
                warnings.append(f"{gained} and lost on some ({'; '.join(losses[:3])}): {of_mix}.")
    return warnings


def _unended(run: RunView) -> list[PolicyRecord]:
    """Policies whose gain came with replies that no longer end: the score is of texts that were cut."""
    reference = run.policy(run.reference)
    usual = reference.eos_rate.low if reference is not None and reference.eos_rate is not None else None
    gained = {claim.policy.policy for claim in claims(run) if claim.outcome == BETTER}
    return [
        policy
        for policy in run.policies
        if policy.policy in gained - {BASE} and policy.eos_rate is not None
        if policy.eos_rate.high is not None and usual is not None
        if policy.eos_rate.high < min(usual, LOW_EOS)
    ]


def _unended_warnings(run: RunView) -> list[str]:
    reference, policies = run.policy(run.reference), _unended(run)
    if not policies or reference is None:
        return []
    shares = join([f"{p.label} ({p.eos_rate.percent()})" for p in policies if p.eos_rate is not None])
    usual = f" ({reference.eos_rate.percent()})" if reference.eos_rate is not None else ""
    return [
        f"Gained in score, but ended far fewer responses by themselves than {reference.label}{usual}: "
        f"{shares}. What was scored is cut at the token limit."
    ]


def _seen_gold(run: RunView) -> list[str]:
    """Policies that were trained on a judge which is called gold: their gold is a ceiling, and no check."""
    return [
        f"{clean(name, 40)} was trained on gold itself ({join(judges)}): it is a ceiling, not a contestant."
        for name, judges in seen_gold(run).items()
    ]


def _judge_warnings(run: RunView) -> list[str]:
    model = run.reward_model
    if model is None or model.accuracy is None:
        scored = run.scored_by_model and any(policy.score is not None for policy in run.policies)
        return ["The reward model was not measured on held-out pairs: its scores may mean nothing."] * scored
    warnings = []
    if judge_is_sound(run) is not True:
        words = below_or_at_chance(model.accuracy)
        warnings.append(
            f"The reward model's accuracy ({model.accuracy.percent()}) is {words}: scores say nothing about "
            "quality."
        )
    else:
        rule = strongest_baseline(run)
        if rule and not beats_baselines(run):
            little = "single words" if rule[0] == BAG_OF_WORDS else "length"
            warnings.append(
                f"The reward model ({model.accuracy.percent()}) is not shown to be better than "
                f"{baseline_words(rule[0])} ({100 * rule[1].value:.1f} %): its scores may measure little but "
                f"{little}."
            )
    warnings += [
        f"On {clean(source, 60)} the reward model prefers the rejected response more often than not: "
        f"{share.percent()} right."
        for source, share in model.by_source.items()
        if len(model.by_source) > 1 and share.high is not None and share.high < 0.5
    ]
    size = model.correlation_score_length
    if size is not None and abs(size.value) >= BY_LENGTH:
        warnings.append(
            f"The reward model's score follows length (correlation {size.value:+.2f}): gains may be length."
        )
    return warnings + _sanity_warnings(model)


_IN_A_SENTENCE = {  # labels of evaluation.sanity
    "rejected": "the rejected ones",
    "chosen, its words shuffled": "the words of the chosen responses in random order",
    "its first word, over and over": "the first word of the chosen responses, over and over",
}


def _sanity_warnings(model: RewardModelRecord) -> list[str]:
    """Responses that nobody would prefer, yet which the reward model does not put below the chosen one."""
    warnings = []
    for row in model.sanity:
        below, degraded = row.below_chosen, _IN_A_SENTENCE.get(row.label, clean(row.label, 60))
        if below is None or below.low is None or below.high is None or below.low > 0.5:
            continue
        relation = "prefers" if below.high < 0.5 else "is not shown to prefer the chosen responses to"
        warnings.append(f"The reward model {relation} {degraded} ({below.percent()} score below the chosen).")
    if model.invariance is not None and model.invariance.ok is False:
        warnings.append(
            "The reward model's score changes with padding or batch: scores depend on how they are run."
        )
    return warnings


def _policy_warnings(run: RunView) -> list[str]:
    texts = []
    unended = {policy.policy for policy in _unended(run)}
    reference = run.policy(run.reference)
    gained = {claim.policy.policy for claim in claims(run) if claim.outcome == BETTER}
    for policy in run.policies:
        if policy.policy not in (run.reference, BASE) and reference is not None:
            texts += _length_warning(policy, reference)
        surviving = policy.length_controlled.surviving if policy.length_controlled else None
        much = surviving is None or surviving.high is None or surviving.high >= SURVIVES
        if policy.policy in gained and surviving is not None and not much:
            texts.append(
                f"Less than half of the gain of {policy.label} is left at equal length "
                f"({surviving.percent()})."
            )
        if policy.eos_rate is not None and policy.eos_rate.value < LOW_EOS and policy.policy not in unended:
            share = policy.eos_rate.percent()
            texts.append(
                f"{policy.label} ends only {share} of its responses by itself: most are cut at the token "
                "limit."
            )
        if policy.kl_sequence is not None and policy.policy != BASE and not policy.kl_sequence.value <= KL:
            far = policy.kl_sequence.text()
            texts.append(
                f"{policy.label} is far from {run.label(run.reference)} ({far} nats per response): suspect "
                "over-optimisation."
            )
        for key, words in (("empty_share", "are empty"), ("role_leakage", "also write the human's turn")):
            if policy.shares.get(key, 0.0) >= MANY:
                texts.append(f"{100 * policy.shares[key]:.0f} % of the responses of {policy.label} {words}.")
        if policy.shares.get("repetition_4", 0.0) >= REPETITIVE:
            texts.append(
                f"{policy.label} repeats itself: {100 * policy.shares['repetition_4']:.0f} % of its 4-grams."
            )
    return texts


def _length_warning(policy: PolicyRecord, reference: PolicyRecord) -> list[str]:
    """Did the policy only get longer? Said where the two length intervals do not even touch."""
    length, usual = policy.length, reference.length
    if length is None or usual is None:
        return []
    if length.low is not None and usual.high is not None and length.low > usual.high:
        change = "longer"
    elif length.high is not None and usual.low is not None and length.high < usual.low:
        change = "shorter"
    else:
        return []
    return [
        f"{policy.label} writes {change} responses than {reference.label} ({length.text()} against "
        f"{usual.text()} tokens): part of any change in score may be length."
    ]
