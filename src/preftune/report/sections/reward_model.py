"""The reward-model section: is it good, at what is it good, and can its score be trusted?"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import cast

from preftune.records.base import Estimate
from preftune.records.reward_model import Band, RewardModelRecord
from preftune.report import claims
from preftune.report.blocks import Block, Bullets, Fold, Grid, Table, say
from preftune.report.plots.reward_model import LENGTH_GROUPS
from preftune.report.sections.other_pairs import other_pairs_blocks
from preftune.report.sentences import baseline_words, below_or_at_chance
from preftune.report.tables import column, share_text
from preftune.report.text import Prose, Text, clean, name, number, percent
from preftune.report.view import RunView


def reward_model_blocks(run: RunView, pictures: Sequence[Block]) -> list[Block]:
    """The whole section, or a sentence on why there is none."""
    model = run.reward_model
    if model is None:
        return [say("The reward model has not been evaluated (evaluation/reward_model.json is missing).")]
    blocks: list[Block] = [say(*_headline(run, model))]
    if model.band is not None:
        blocks.append(say(*_band(model.band, model.accuracy)))
    if model.baselines:
        blocks.append(Grid(table=_baseline_table(model)))
    if pictures:
        blocks += [say(GROUPS, BY_LENGTH * bool(model.score_by_length)), *pictures]
    if facts := list(_facts(model)):
        blocks.append(Bullets(items=tuple(facts)))
    if groups := tuple(_group_rows(model)):
        table = _grid(("Pairs", "n", "Accuracy"), groups)
        blocks.append(Fold(title="Accuracy by kind of pair, in numbers", blocks=(table,)))
    blocks += _sanity(model)
    if model.gold_parts:
        blocks += [
            say(
                "What it sees, on pairs without noise that differ in one part of the gold score alone: 50 % "
                "and a gap of 0 mean that it does not see that part. Stacked courtesies are the blind spot "
                "that this world has on purpose: no training pair holds them."
            ),
            _grid(("Part", "n", "Accuracy", "Gap (sd of scores)"), tuple(_part_rows(model))),
        ]
    return blocks + _other_models_table(run) + other_pairs_blocks(run)


GROUPS = "Accuracy by kind of pair: the line is chance, the dashed one the best baseline."
BY_LENGTH = (
    " Score by length: a slope that both lines share is a taste for length, the gap between them what it "
    "knows beside it."
)


def _headline(run: RunView, model: RewardModelRecord) -> Prose:
    """Accuracy against chance and the length rules, in one paragraph."""
    if model.accuracy is None:
        return ("Its accuracy was not measured.",)
    text = f"Accuracy on held-out pairs: {model.accuracy.percent()}"
    text += f" (n = {model.n:,}). " if model.n else ". "
    if claims.judge_is_sound(run) is True:
        text += "The interval lies above chance (50 %). "
    else:
        text += f"This is {below_or_at_chance(model.accuracy)}. "
        if model.power is not None and model.power.n_needed is not None:
            needed = f"about {model.power.n_needed:,} pairs would be needed to show it"
            text += f"If the true accuracy were this, {needed}. "
    text += _power(model)
    if model.best_reachable is not None:
        text += (
            f"The labels of this world are noisy on purpose; the best reachable accuracy is "
            f"{percent(model.best_reachable)}. "
        )
    return (text.strip(),)


def _power(model: RewardModelRecord) -> str:
    """What so many pairs can show at all."""
    power = model.power
    if power is None or power.detectable is None or power.n is None:
        return ""
    text = (
        f"With {power.n:,} pairs, an accuracy of {percent(power.detectable)} or more would be "
        "detected as above chance with 80 % power. "
    )
    if power.n_needed_baseline is not None and power.baseline_name:
        text += (
            f"If the accuracies are as measured, {power.n_needed_baseline:,} pairs are needed to "
            f"distinguish it from {baseline_words(power.baseline_name)}. "
        )
    return text


def _band(band: Band, accuracy: Estimate | None) -> Prose:
    """Is that a good number? What others reached, with its source, and where the interval lies."""
    text = f"What to expect: {clean(band.text, 600).rstrip('.')}"
    text += f" (source: {clean(band.source, 300)})." if band.source else "."
    if accuracy is None or None in (band.low, band.high, accuracy.low, accuracy.high):
        return (text,)
    low, high = cast(tuple[float, float], (band.low, band.high))
    if accuracy.excludes(low) and accuracy.excludes(high):
        inside = low < accuracy.value < high
        place = "lies within it" if inside else "lies below it" if accuracy.value < low else "lies above it"
    else:
        place = "overlaps with it"
    return (f"{text} The interval measured here {place}.",)


def _baseline_table(model: RewardModelRecord) -> Table:
    """What rules without a model reach on the same pairs, and whether the reward model is better."""
    tests = {test.baseline: test for test in model.baseline_tests}
    rows: list[tuple[Text, ...]] = []
    tests_of_rules = [tests.get(rule) for rule in model.baselines]
    gaps = column((test and test.difference for test in tests_of_rules), sign=True, scale=100)
    for (rule, share), test, gap in zip(model.baselines.items(), tests_of_rules, gaps, strict=True):
        words = baseline_words(rule)
        verdict = "–" if test is None else claims.outcome(test.difference, test.p_holm)
        rows.append((words[:1].upper() + words[1:], share.percent(), *[gap, verdict] * bool(tests)))
    headers = ("Baseline on the same pairs", "Accuracy")
    more = ("Reward model − baseline (points)", "Reward model is") if tests else ()
    return Table(headers=(*headers, *more), rows=tuple(rows))


def _facts(model: RewardModelRecord) -> Iterator[Prose]:
    if model.ties is not None:
        half = model.accuracy_ties_half
        more = "" if half is None else f"; counting each as half right gives {half.percent()}"
        yield (f"Ties, counted as wrong above: {model.ties:,}{more}.",)
    if model.mean_margin is not None:
        margin = model.mean_margin.text(sign=True)
        yield (f"Mean margin (score of chosen minus score of rejected): {margin}.",)
    yield from _members(model)
    yield from _calibration(model)
    yield from _temperature(model)
    if model.correlation_score_length is not None:
        size = model.correlation_score_length.text(sign=True)
        yield (f"Correlation of score with response length: {size}.",)
    yield from _invariance(model)
    if model.score:
        spread = ", ".join(f"{key} {number(value)}" for key, value in model.score.items())
        yield (f"Scores: {spread}.",)


def _members(model: RewardModelRecord) -> Iterator[Prose]:
    """Of an ensemble: what its members reach alone, and what their agreement is worth."""
    if not model.members:
        return
    shares = ", ".join(f"{100 * share.value:.1f}" for share in model.members.values())
    how = clean(model.combine, 40)
    text = f"An ensemble of {len(model.members)} (score: {how}); its members reach {shares} % each"
    if model.unanimous is not None and model.unanimous.n is not None:
        pairs = f"{model.unanimous.n:,} pairs on which all agree"
        text += f", and together {model.unanimous.percent()} on the {pairs}"
    if model.disagreement is not None:
        text += f". The sd of a margin among them is {model.disagreement.text()} on average"
    yield (f"{text}.",)


def _calibration(model: RewardModelRecord) -> Iterator[Prose]:
    """Brier score and calibration error; the second is above 0 by chance alone, so it says how far."""
    if model.brier is None or model.ece is None:
        return
    text = (
        f"Calibration of sigmoid(margin) as a probability: Brier score {model.brier.text()} (0.25 is a "
        f"coin), expected calibration error {number(model.ece)}."
    )
    if model.ece_if_calibrated is not None:
        miscalibrated = model.ece > model.ece_if_calibrated
        text += (
            f" Perfect calibration would show up to {number(model.ece_if_calibrated)} on so many pairs (19 "
            f"times in 20): it is {'' if miscalibrated else 'not shown to be '}miscalibrated."
        )
    yield (text,)


def _temperature(model: RewardModelRecord) -> Iterator[Prose]:
    """The temperature that calibrates best, and whether it helps on pairs that it was not fitted on."""
    best = model.temperature
    if best is None:
        return
    if not math.isfinite(best.value):
        yield ("Best temperature: infinite. The size of a margin says nothing about being right.",)
        return
    text = f"Best temperature (margins divided by it are best calibrated): {number(best.value)}"
    if best.before is None or best.after is None:
        yield (f"{text}.",)
        return
    text += (
        f"; negative log-likelihood {number(best.before)} without and {number(best.after)} with it, each "
        f"half of the pairs by the other's temperature (a coin: {math.log(2):.3f})."
    )
    if best.after >= best.before:
        yield (f"{text} It does not help on other pairs.",)
    elif best.gain is not None and not best.gain.excludes(0):
        yield (f"{text} It is not shown to help on other pairs ({best.gain.text(sign=True)}).",)
    else:
        yield (f"{text} The margins claim too {'much' if best.value > 1 else 'little'}.",)


def _invariance(model: RewardModelRecord) -> Iterator[Prose]:
    probe = model.invariance
    if probe is None or probe.ok is None:
        return
    size = f"padding moves a raw score by at most {number(probe.padding)}, the batch by {number(probe.batch)}"
    verb = "does not depend" if probe.ok else "DEPENDS"
    rows = f" (n = {probe.n})" if probe.n else ""
    limit = "" if probe.tolerance is None else f", tolerance {number(probe.tolerance)}"
    yield (f"The score {verb} on how it is computed: {size}{rows}{limit}.",)


def _group_rows(model: RewardModelRecord) -> Iterator[tuple[Text, ...]]:
    lengths = {LENGTH_GROUPS.get(key, key): share for key, share in model.by_length.items()}
    finer = {f"chosen − rejected, tokens: {key}": share for key, share in model.by_length_difference.items()}
    turns = {f"human turns: {key}": share for key, share in model.by_turns.items()}
    sources = {name(key): share for key, share in model.by_source.items()}
    for title, share in [*lengths.items(), *finer.items(), *turns.items(), *sources.items()]:
        yield title, "–" if share.n is None else f"{share.n:,}", share.percent()


def _sanity(model: RewardModelRecord) -> list[Block]:
    """Does it put nonsense below the chosen responses?"""
    if not model.sanity:
        return []
    scores = column(row.score for row in model.sanity)
    rows = tuple(
        (clean(row.label, 60), score, share_text(row.below_chosen))
        for row, score in zip(model.sanity, scores, strict=True)
    )
    size = model.sanity[0].score.n if model.sanity[0].score else None
    of = "The same prompts" if size is None else f"The same {size:,} prompts"
    intro = say(f"{of} with responses of known worth; 50 % below the chosen one is a coin.")
    return [intro, _grid(("Response", "Raw score", "Below the chosen one"), rows)]


def _part_rows(model: RewardModelRecord) -> Iterator[tuple[Text, ...]]:
    for component, accuracy in model.gold_parts.items():
        gap = model.gold_gaps.get(component)
        size = "–" if accuracy.n is None else f"{accuracy.n:,}"
        yield name(component), size, accuracy.percent(), "–" if gap is None else f"{gap:+.2f}"


PAIRS_OF = {
    True: "other prompts",
    False: "shares prompts with the first",
    None: "not known",
}


def _other_models_table(run: RunView) -> list[Block]:
    """Reward models that no policy was trained on."""
    rows = tuple(
        (
            name(model.stage or "?"),
            "–" if model.n is None else f"{model.n:,}",
            share_text(model.accuracy),
            PAIRS_OF[model.held_out],
        )
        for model in run.other_reward_models
    )
    if not rows:
        return []
    return [_grid(("Other reward models (stage)", "n", "Accuracy", "Trained on"), rows)]


def _grid(headers: tuple[str, ...], rows: tuple[tuple[Text, ...], ...]) -> Grid:
    return Grid(table=Table(headers=headers, rows=rows))


def tag_table(run: RunView) -> Table | None:
    """How common each kind of pair is among mistakes; with the error rate over all such pairs if known."""
    model = run.reward_model
    if model is not None and model.tags:
        ordered = sorted(model.tags.items(), key=lambda item: (-item[1].mistakes, item[0]))
        rows = tuple(
            (
                name(tag),
                f"{count.mistakes:,}",
                percent(count.share),
                percent(count.share_of_pairs),
                share_text(count.error_rate),
            )
            for tag, count in ordered
        )
        headers = ("Kind of pair", "Mistakes", "Share of mistakes", "Share of all pairs", "Error rate [95 %]")
        return Table(headers=headers, rows=rows)
    tags = Counter(tag for row in run.mistakes for tag in row.tags)
    if not tags:
        return None
    ordered = sorted(tags.items(), key=lambda item: (-item[1], item[0]))
    rows = tuple((name(tag), f"{count:,}", percent(count / len(run.mistakes))) for tag, count in ordered)
    return Table(headers=("Error pattern", "Mistakes", "Share of mistakes"), rows=rows)
