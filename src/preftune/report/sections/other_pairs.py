"""What `evaluate --pairs FILE` found, after the run's own evaluation: does it hold on other pairs?"""

from collections.abc import Sequence

from preftune.records.policy import PairsPolicy
from preftune.records.reward_model import BaselineTest
from preftune.report import claims
from preftune.report.blocks import Block, Grid, Table, say
from preftune.report.sections.by_prompt import by_prompt
from preftune.report.sentences import baseline_words
from preftune.report.tables import column, share_text
from preftune.report.text import Code, name
from preftune.report.view import OtherPairs, RunView


def other_pairs_blocks(run: RunView) -> list[Block]:
    """A paragraph and up to two tables for every file; nothing where there is none."""
    blocks: list[Block] = []
    for evaluated in run.other_pairs:
        size = "" if evaluated.of.n is None else f" ({evaluated.of.n:,} pairs)"
        skipped = evaluated.of.seen_in_training
        left_out = f" {skipped:,} more were left out: a stage saw their prompt." if skipped else ""
        namesakes = sum(pairs.of.file == evaluated.of.file for pairs in run.other_pairs) - 1
        version = f", SHA-256 {evaluated.of.sha256[:8]}" if namesakes and evaluated.of.sha256 else ""
        source = (name(evaluated.of.file), f"{version}{size}, by ", Code("evaluate --pairs"))
        blocks.append(say("On other pairs, ", *source, f".{left_out}"))
        if evaluated.reward_models:
            blocks.append(Grid(table=_judge_table(run, evaluated)))
        if evaluated.policies:
            reference = run.label(run.reference)
            blocks += [Grid(table=policy_table(evaluated.policies, reference)), say(READING)]
            if gains := by_prompt(evaluated.policies, reference, run.gold_words):
                blocks.append(gains)
    return blocks


READING = (
    "A policy prefers the chosen response where its own log-probability says so: against the reference's, "
    "which is the reward that DPO trains implicitly, or per token as it is. 50 % is a coin. The other two "
    "columns are its samples on the prompts of these pairs, by the run's reward model."
)


def _judge_table(run: RunView, evaluated: OtherPairs) -> Table:
    headers = (
        "Reward model (stage)", "Pairs", "Accuracy", "Accuracy − best baseline (points)",
        "Against that baseline", "Accuracy on the run's own pairs",
    )  # fmt: skip
    models = [model for model in (run.reward_model, *run.other_reward_models) if model is not None]
    on_own_pairs = {model.stage: model.accuracy for model in models}
    strongest = [
        min(model.baseline_tests, key=lambda test: test.difference.value, default=None)
        for model in evaluated.reward_models
    ]
    differences = column((test and test.difference for test in strongest), sign=True, scale=100)
    rows = tuple(
        (
            name(model.stage or "?"),
            "–" if model.n is None else f"{model.n:,}",
            share_text(model.accuracy),
            difference,
            "–" if test is None else _against(test),
            share_text(on_own_pairs.get(model.stage)),
        )
        for model, test, difference in zip(evaluated.reward_models, strongest, differences, strict=True)
    )
    return Table(headers=headers, rows=rows)


def _against(test: BaselineTest) -> str:
    """Whether a model is better than a baseline, and which one that is."""
    return f"{claims.outcome(test.difference, test.p_holm)} ({baseline_words(test.baseline)})"


def policy_table(policies: Sequence[PairsPolicy], reference: str) -> Table:
    """What every policy prefers, and how its samples do. `reference`: the label of the other one."""
    headers = (
        "Policy", f"Prefers the chosen, against {reference}", "Prefers the chosen, per token",
        "Wins over the chosen", f"Score − {reference}",
    )  # fmt: skip
    differences = column((policy.score_difference for policy in policies), sign=True)
    rows = tuple(
        (
            policy.label,
            share_text(policy.prefers),
            share_text(policy.prefers_per_token),
            share_text(policy.win_rate_chosen),
            difference,
        )
        for policy, difference in zip(policies, differences, strict=True)
    )
    return Table(headers=headers, rows=rows)
