"""Which figures a run has numbers for. They go into figures/, for report, ANALYSIS.md and notebook."""

from collections.abc import Callable

import matplotlib

from preftune.records.base import Estimate
from preftune.records.reward_model import RewardModelRecord
from preftune.report.healthy import healthy
from preftune.report.plots import policies, reward_model
from preftune.report.plots.curves import curves, training
from preftune.report.plots.drawing import SETTINGS
from preftune.report.seen import unseen_words
from preftune.report.tables import kl_text
from preftune.report.text import clean
from preftune.report.view import RunView, StageView

Figures = dict[str, tuple[str, str]]  # file name -> (SVG text, alternative text)


def draw(run: RunView) -> Figures:
    """All figures that this run has numbers for: file name -> (SVG text, alternative text)."""
    with matplotlib.rc_context(SETTINGS):
        figures = _of_the_comparison(run) | _of_the_reward_model(run)
        for stage in run.stages:
            if courses := curves(stage):
                words = _training_words(run, stage, list(courses))
                figures[f"training_{file_part(stage.name)}.svg"] = (training(run, stage, courses), words)
    return figures


def file_part(stage: str) -> str:
    """A stage's name as part of a file name and of a link."""
    return "".join(
        letter if letter.isascii() and (letter.isalnum() or letter == "_") else "-" for letter in stage
    )[:60]


def _of_the_comparison(run: RunView) -> Figures:
    figures: Figures = {}
    axis = "Score" if run.functions else "Reward model score"
    kinds: tuple[tuple[str, policies.Value, str, Callable[[RunView], str]], ...] = (
        ("reward_kl.svg", policies.score, axis, _score_kl_words),
        ("reward_kl_gold.svg", policies.gold, "Gold score", _gold_words),
        (
            "reward_kl_held_out.svg",
            policies.held_out,
            "Second reward model's score",
            lambda _: HELD_OUT_WORDS,
        ),
    )
    for file, value, label, words in kinds:
        if any(value(policy) and policy.kl for policy in run.policies):
            figures[file] = (policies.trade_off(run, value, label), words(run))
    if spread := policies.scores(run):
        listed = ", ".join(run.label(policy) for policy in spread)
        words = f"Scores of the responses, a row of points for each policy: {listed}."
        figures["reward_distribution.svg"] = (policies.distribution(run, spread), words)
    return figures


HELD_OUT_WORDS = "The same with the score of a second reward model, which trained no policy."


def _gold_words(run: RunView) -> str:
    return f"The same with {run.gold_words},{unseen_words(run)} in place of this score."


def _score_kl_words(run: RunView) -> str:
    points = [
        f"{clean(policy.label, 30)} score {policy.score.value:.2f} at KL {kl_text(policy)}"
        for policy in run.policies
        if policy.score and policy.kl
    ]
    curve = [
        f"best of {point.n} {point.score.value:.2f} at {point.kl:.2f}"
        for point in run.best_of
        if point.score and point.n in policies.MARKED
    ]
    more = f". Dashed, choosing the best of n samples without training: {'; '.join(curve)}" if curve else ""
    return f"Score against KL to the reference in nats per response: {'; '.join(points)}{more}."


def _of_the_reward_model(run: RunView) -> Figures:
    model, figures = run.reward_model, {}
    if model is None:
        return {}
    if reward_model.groups(model):
        words = (
            "Accuracy of the reward model with 95 % intervals, by kind of pair; the table has the numbers."
        )
        figures["reward_model_groups.svg"] = (reward_model.by_group(model), words)
    if any(bin.accuracy for bin in model.reliability):
        words = "Reliability: how often the reward model is right against how sure it is; numbers are pairs."
        figures["reward_model_reliability.svg"] = (reward_model.reliability(model), words)
    if any(bin.chosen or bin.rejected for bin in model.score_by_length):
        figures["reward_model_length.svg"] = (reward_model.by_length(model), _length_words(model))
    if model.margin_counts and len(model.margin_edges) == len(model.margin_counts) + 1:
        words = "Histogram of the reward model's margins on held-out pairs; left of zero it is wrong."
        drawn = reward_model.margins(model.margin_edges, model.margin_counts)
        figures["reward_model_margins.svg"] = (drawn, words)
    return figures


def _length_words(model: RewardModelRecord) -> str:
    points = [
        f"{bin.length:.0f} tokens {_plain(bin.chosen)} and {_plain(bin.rejected)}"
        for bin in model.score_by_length
    ]
    return f"Mean score of chosen and rejected responses by length: {'; '.join(points)}."


def _plain(score: Estimate | None) -> str:
    return "none" if score is None else f"{score.value:.2f}"


def _training_words(run: RunView, stage: StageView, keys: list[str]) -> str:
    listed = []
    for key in keys:
        band = healthy(run, stage.algorithm, key)
        listed.append(clean(key, 40) + (f" (healthy: {band.meaning})" if band else ""))
    return f"Training curves of stage {clean(stage.name, 40)}: {', '.join(listed)}."
