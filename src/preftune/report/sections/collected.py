"""What stages have collected: who judged what, how often, how well it agrees."""

from collections.abc import Iterator

from preftune.records.base import Estimate
from preftune.records.stage import AskedRecord, CollectedRecord
from preftune.report.blocks import Block, Bullets, Grid, Table, say
from preftune.report.text import Code, Prose, name, number, numbers, percent
from preftune.report.view import RunView

HEADERS = ("Stage", "Policy", "Judge", "Prompts", "Replies", "Pairs", "Left out", "Mean score")
HEADERS += ("Labels agree", "Best reachable")


def collected_blocks(run: RunView) -> list[Block]:
    """A table of the stages that collected, then what else is known of their judgements; [] for none."""
    records = {stage.name: stage.record for stage in run.stages if stage.record.collected is not None}
    if not records:
        return []
    rows, facts = [], list[Prose]()
    scores = numbers(r.collected and r.collected.score_mean for r in records.values())
    for (stage, record), score in zip(records.items(), scores, strict=True):
        collected, settings = record.collected, record.inputs.get("settings")
        assert collected is not None
        policy = settings.get("init", "–") if isinstance(settings, dict) else "–"
        counts = (collected.prompts, collected.replies, collected.pairs, collected.left_out_pairs)
        shares = (percent(collected.labels_agree), percent(collected.best_reachable))
        words = (name(stage), name(policy), name(collected.judge))
        rows.append((*words, *(f"{count:,}" for count in counts), score, *shares))
        facts += _facts(stage, collected)
    table = Table(headers=HEADERS, rows=tuple(rows), word_columns=3)
    intro = say(
        "Replies of a policy that were judged and paired, as data of other stages. Best reachable is the "
        "accuracy that the judge itself is expected to have on its labels. The files are in ",
        Code("collected/"),
        ".",
    )
    return [intro, Grid(table=table), *([Bullets(items=tuple(facts))] if facts else [])]


def _facts(stage: str, collected: CollectedRecord) -> Iterator[Prose]:
    for policy, rate in collected.beats.items():
        same = " to the same prompts, by the same judge: "
        yield (name(stage), ": win rate over the replies of ", name(policy), same, _share(rate), ".")
    if collected.longer_wins is not None:
        longer = _share(collected.longer_wins)
        yield (name(stage), f": the longer reply is chosen in {longer} of unequal pairs.")
    if collected.llm is not None:
        yield from _questions(stage, collected.llm)


def _questions(stage: str, judge: AskedRecord) -> Iterator[Prose]:
    cost = "" if judge.cost is None else f", cost {number(judge.cost)}"
    yield (
        name(stage),
        f": a language model was asked {judge.questions:,} questions: {judge.ties:,} ties, "
        f"{judge.no_verdict:,} answers without a verdict ({judge.refused:,} refused); "
        f"{judge.tokens_in:,} tokens in, {judge.tokens_out:,} out{cost}.",
    )
    if judge.both_orders is not None and judge.first_wins is not None:
        yield (
            name(stage),
            f": it says the same in both orders in {_share(judge.both_orders)} of comparisons, and prefers "
            f"the first reply in {_share(judge.first_wins)} (without a preference: half).",
        )


def _share(estimate: Estimate) -> str:
    count = "" if estimate.n is None else f" (n = {estimate.n:,})"
    return f"{estimate.percent()}{count}"
