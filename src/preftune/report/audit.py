"""The reward-model section: is it good, at what is it good, and what does it get wrong?"""

from collections import Counter
from collections.abc import Iterator, Sequence

from preftune.report import claims
from preftune.report.blocks import Block, Bullets, Grid, Quotes, Table, say
from preftune.report.text import Code, Prose, Text, clean, name, number, percent
from preftune.report.view import Estimate, RewardModelView, Row, RunView

SHOWN_MISTAKES = 5
LENGTH_GROUPS = {"chosen_longer": "chosen response longer", "rejected_longer": "rejected response longer"}


def reward_model_blocks(run: RunView, pictures: Sequence[Block]) -> list[Block]:
    """The whole section, or a sentence on why there is none."""
    model = run.reward_model
    if model is None:
        return [say("The reward model has not been evaluated (evaluation/reward_model.json is missing).")]
    blocks: list[Block] = [say(*_headline(run, model))]
    if facts := _facts(model):
        blocks.append(Bullets(items=tuple(facts)))
    blocks += pictures
    groups = _group_rows(model)
    if groups:
        blocks.append(Grid(table=Table(headers=("Pairs", "n", "Accuracy"), rows=tuple(groups))))
    if model.gold_parts:
        blocks += [
            say(
                "What it sees, on pairs without noise that differ in one part of the gold score alone: 50 % "
                "and a gap of 0 mean that it does not see that part. Stacked courtesies are the blind spot "
                "that this world has on purpose: no training pair holds them."
            ),
            _grid(("Part", "n", "Accuracy", "Gap (sd of scores)"), tuple(_part_rows(model))),
        ]
    return blocks + list(_mistake_blocks(run))


def _headline(run: RunView, model: RewardModelView) -> Prose:
    """Accuracy against chance and the length rules, in one paragraph."""
    if model.accuracy is None:
        return ("Its accuracy was not measured.",)
    text = f"Accuracy on held-out pairs: {model.accuracy.percent()}"
    text += f" (n = {model.n:,}). " if model.n else ". "
    if claims.judge_is_sound(run) is True:
        text += "The interval lies above chance (50 %). "
    else:
        text += f"This is {claims.below_or_at_chance(model.accuracy)}. "
        needed = claims.pairs_needed(model.accuracy.value)
        if needed is not None:
            text += f"If the true accuracy were this, about {needed:,} pairs would be needed to show it. "
    for rule, share in model.baselines.items():
        text += f"Always choosing the {rule} response (equal lengths count half): {share.percent()}. "
    if model.best_reachable is not None:
        text += (
            f"The labels of this world are noisy on purpose; the best reachable accuracy is "
            f"{percent(model.best_reachable)}. "
        )
    return (text.strip(),)


def _facts(model: RewardModelView) -> Iterator[Prose]:
    if model.ties is not None:
        half = (
            ""
            if model.accuracy_ties_half is None
            else f"; counting each as half right gives {percent(model.accuracy_ties_half)}"
        )
        yield (f"Ties, counted as wrong above: {model.ties}{half}.",)
    if model.mean_margin is not None:
        yield (
            f"Mean margin (score of chosen minus score of rejected): {number(model.mean_margin, sign=True)}.",
        )
    if model.brier is not None and model.ece is not None:
        yield (
            f"Calibration of sigmoid(margin) as a probability: Brier score {number(model.brier)} (0.25 is a "
            "coin), "
            f"expected calibration error {number(model.ece)}.",
        )
    if model.correlation_score_length is not None:
        yield (
            "Correlation of score with response length: "
            f"{number(model.correlation_score_length, sign=True)}.",
        )
    if model.score:
        spread = ", ".join(f"{key} {number(value)}" for key, value in model.score.items())
        yield (f"Scores: {spread}.",)


def _group_rows(model: RewardModelView) -> list[tuple[str, ...]]:
    named = [(LENGTH_GROUPS.get(key, key), share) for key, share in model.by_length.items()]
    sources: list[tuple[str, Estimate]] = [(name(key), share) for key, share in model.by_source.items()]
    return [
        (title, "–" if share.n is None else f"{share.n:,}", share.percent())
        for title, share in named + sources
    ]


def _part_rows(model: RewardModelView) -> Iterator[tuple[Text, ...]]:
    for part, accuracy in model.gold_parts.items():
        gap = model.gold_gaps.get(part)
        size = "–" if accuracy.n is None else f"{accuracy.n:,}"
        yield name(part), size, accuracy.percent(), "–" if gap is None else f"{gap:+.2f}"


def _grid(headers: tuple[str, ...], rows: tuple[tuple[str, ...], ...]) -> Grid:
    return Grid(table=Table(headers=headers, rows=rows))


def _mistake_blocks(run: RunView) -> Iterator[Block]:
    """Error patterns by tag, then the mistakes it was most sure of."""
    if not run.mistakes:
        yield say("No mistakes are recorded.")
        return
    ties = sum(1 for row in run.mistakes if _margin(row) == 0)
    total = len(run.mistakes)
    yield say(
        f"Mistakes: {total:,} validation pairs are ordered against their label"
        f"{f', {ties} of them ties' if ties else ''}. All are in ",
        Code("analysis/reward_model_mistakes.jsonl"),
        ", the most confident first.",
    )
    tags = Counter(str(tag) for row in run.mistakes for tag in row.get("tags") or ())
    if tags:
        rows = tuple(
            (name(tag), f"{count:,}", percent(count / total))
            for tag, count in sorted(tags.items(), key=_by_count)
        )
        yield Grid(table=Table(headers=("Error pattern", "Mistakes", "Share of mistakes"), rows=rows))
        yield say(
            "A mistake may carry several tags. A share says how common a pattern is among mistakes, not that "
            "it causes them."
        )
    for row in run.mistakes[:SHOWN_MISTAKES]:
        yield _mistake(row)


def _by_count(item: tuple[str, int]) -> tuple[int, str]:
    return -item[1], item[0]


def _margin(row: Row) -> float:
    value = row.get("margin", 0.0)
    return float(value) if isinstance(value, int | float) else 0.0


def _mistake(row: Row) -> Quotes:
    tags = ", ".join(clean(tag, 40) for tag in row.get("tags") or ())
    note = f"margin {number(_margin(row), sign=True)}{f', {tags}' if tags else ''}"
    return Quotes(
        title=f"Validation row {clean(row.get('idx', '?'), 20)}: {note}",
        texts=(
            ("Prompt", "", str(row.get("prompt", ""))),
            ("Chosen (labelled better)", _score(row, "reward_chosen"), str(row.get("chosen", ""))),
            (
                "Rejected (scored at least as high)",
                _score(row, "reward_rejected"),
                str(row.get("rejected", "")),
            ),
        ),
    )


def _score(row: Row, key: str) -> str:
    value = row.get(key)
    return f"score {number(value)}" if isinstance(value, int | float) else ""
