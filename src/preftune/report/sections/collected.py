"""What stages have collected: who judged what, how often, how well it agrees."""

from collections.abc import Iterator

from preftune.records.base import Estimate
from preftune.records.stage import AskedRecord, CollectedRecord
from preftune.report.blocks import Block, Bullets, Grid, Table, say
from preftune.report.text import Code, Prose, name, number, percent
from preftune.report.view import RunView

HEADERS = ("Stage", "Policy", "Judge", "Prompts", "Replies", "Pairs", "Left out", "Mean score")
HEADERS += ("Labels agree", "Best reachable")


def collected_blocks(run: RunView) -> list[Block]:
    """A table of the stages that collected, then what else is known of their judgements; [] for none."""
    found = {stage.name: stage.record for stage in run.stages if stage.record.collected is not None}
    if not found:
        return []
    rows, facts = [], list[Prose]()
    for stage, record in found.items():
        made, settings = record.collected, record.inputs.get("settings")
        assert made is not None
        policy = settings.get("init", "–") if isinstance(settings, dict) else "–"
        counts = (made.prompts, made.replies, made.pairs, made.left_out_pairs)
        shares = (percent(made.labels_agree), percent(made.best_reachable))
        words = (name(stage), name(policy), name(made.judge))
        rows.append((*words, *(f"{count:,}" for count in counts), number(made.score_mean), *shares))
        facts += _facts(stage, made)
    table = Table(headers=HEADERS, rows=tuple(rows), left=3)
    intro = say(
        "Replies of a policy that were judged and paired, as data of other stages. Best reachable is the "
        "accuracy that the judge itself is expected to have on its labels. The files are in ",
        Code("collected/"),
        ".",
    )
    return [intro, Grid(table=table), *([Bullets(items=tuple(facts))] if facts else [])]


def _facts(stage: str, made: CollectedRecord) -> Iterator[Prose]:
    for other, rate in made.beats.items():
        same = " to the same prompts, by the same judge: "
        yield (name(stage), ": win rate over the replies of ", name(other), same, _share(rate), ".")
    if made.longer_wins is not None:
        yield (name(stage), f": the longer reply is chosen in {_share(made.longer_wins)} of unequal pairs.")
    if made.llm is not None:
        yield from _asked(stage, made.llm)


def _asked(stage: str, asked: AskedRecord) -> Iterator[Prose]:
    cost = "" if asked.cost is None else f", cost {number(asked.cost)}"
    yield (
        name(stage),
        f": a language model was asked {asked.questions:,} questions: {asked.ties:,} ties, "
        f"{asked.no_verdict:,} answers without a verdict ({asked.refused:,} refused); "
        f"{asked.tokens_in:,} tokens in, {asked.tokens_out:,} out{cost}.",
    )
    if asked.both_orders is not None and asked.first_wins is not None:
        yield (
            name(stage),
            f": it says the same in both orders in {_share(asked.both_orders)} of comparisons, and finds for "
            f"the reply that stands first in {_share(asked.first_wins)} (without a preference: half).",
        )


def _share(estimate: Estimate) -> str:
    count = "" if estimate.n is None else f" (n = {estimate.n:,})"
    return f"{estimate.percent()}{count}"
