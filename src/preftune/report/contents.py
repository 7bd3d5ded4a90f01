"""What the report says, once: sections of blocks; analysis.py writes them as Markdown, page.py as HTML."""

from collections.abc import Mapping

from preftune.report.blocks import Block, Bullets, Grid, Section, Table, say
from preftune.report.doctor.diagnose import diagnose
from preftune.report.plots.curves import MAX_POINTS
from preftune.report.sections.cautions import cautions
from preftune.report.sections.collected import collected_blocks
from preftune.report.sections.comparison import comparison, pictures, quality, significance
from preftune.report.sections.data import data_blocks
from preftune.report.sections.explorers import mistakes, samples
from preftune.report.sections.reward_model import reward_model_blocks, tag_table
from preftune.report.sections.setup import configuration, setup
from preftune.report.sections.tokens import tokens
from preftune.report.text import Code, Prose, join, name
from preftune.report.view import RunView
from preftune.rundir import policy_name


def sections(run: RunView, figures: Mapping[str, str]) -> tuple[Section, ...]:
    """All sections in reading order. `figures` maps the names of drawn figures to their alternative texts."""
    every = (
        comparison(run, figures),
        significance(run),
        quality(run, figures),
        _limits(run),
        _doctor(run),
        _training(run, figures),
        _reward_model(run, figures),
        _collected_replies(run),
        _samples(run),
        tokens(run),
        _mistakes(run),
        _data(run),
        setup(run),
        configuration(run),
    )
    return tuple(section for section in every if section is not None)


def _limits(run: RunView) -> Section:
    standing: list[Prose] = []
    if run.reward_model is not None and any(policy.score for policy in run.policies):
        judge, policies = run.reward_model.stage, {policy.policy for policy in run.policies}
        names = [policy_name(stage.name) for stage in run.stages if judge in stage.record.parents]
        trained = join([run.label(policy) for policy in names if policy in policies])
        also = f", and by which {trained} learnt" if trained else ""
        words = f"The reward model is what all policies are scored by{also}: a gain in its score is a gain"
        if run.functions is not None:
            words = f"All policies are scored by {run.score_words}{also}: a gain in that is a gain"
        standing.append((f"{words} by its taste, not proof of better answers.",))
    standing += [
        (
            "One seed. The intervals cover the choice of prompts, not the luck of training; another seed can "
            "reorder policies that are close.",
        ),
    ]
    of_this_run: list[Prose] = [(text,) for text in cautions(run)]
    return Section(key="limits", title="Limits", blocks=(Bullets(items=tuple(of_this_run + standing)),))


def _doctor(run: RunView) -> Section | None:
    """What the doctor finds; left out where it finds nothing."""
    rows = tuple((name(f.where), f.kind, f.evidence, f.remedy) for f in diagnose(run))
    if not rows:
        return None
    table = Table(headers=("Where", "Finding", "Seen", "Try"), rows=rows, word_columns=4)
    return Section(key="doctor", title="Findings", blocks=(Grid(table=table),))


def _data(run: RunView) -> Section:
    if run.data is None:
        blocks: list[Block] = [say("There is no record of the data (data.json).")]
        return Section(key="data", title="Data", blocks=tuple(blocks), apart=True)
    blocks = data_blocks(run.data)
    rows = [
        (name(stage.name), name(reason), f"{count:,}")
        for stage in run.stages
        for reason, count in stage.record.left_out.items()
    ]
    if rows:
        table = Table(
            headers=("Left out when encoded for stage", "Because", "Rows"), rows=tuple(rows), word_columns=2
        )
        blocks.append(Grid(table=table))
    return Section(key="data", title="Data", blocks=tuple(blocks), apart=True)


def _reward_model(run: RunView, figures: Mapping[str, str]) -> Section | None:
    """Left out where the run has no reward model."""
    if not run.scored_by_model:
        return None
    blocks = reward_model_blocks(run, pictures(figures, "reward_model"))
    return Section(key="reward-model", title="Reward model", blocks=tuple(blocks))


def _collected_replies(run: RunView) -> Section | None:
    """What stages made as data for others; left out where none did."""
    blocks = collected_blocks(run)
    return Section(key="collected", title="Collected replies", blocks=tuple(blocks)) if blocks else None


def _training(run: RunView, figures: Mapping[str, str]) -> Section:
    figure_blocks = pictures(figures, "training_")
    if not figure_blocks:
        return Section(key="training", title="Training", blocks=(say("No stage has logged a metric."),))
    longest = max((len(stage.metrics) for stage in run.stages), default=0)
    averaged = f" Curves of more than {MAX_POINTS} steps show means over neighbours." * (longest > MAX_POINTS)
    intro = say(
        "Metrics as logged at each step; the pale line is every value, the dark one a running mean."
        f"{averaged} Shaded: the healthy range that the page of the algorithm gives (",
        Code("docs/algorithms/"),
        "), a rule of thumb for models of about 100 M parameters, not a limit.",
    )
    return Section(key="training", title="Training", blocks=(intro, *figure_blocks))


def _samples(run: RunView) -> Section:
    if not run.samples:
        return Section(key="samples", title="Samples side by side", blocks=(say("There are no samples."),))
    explorer, total = samples(run)
    n_cards = len(explorer.cards)
    shortened = "" if n_cards == total else f" This page holds the first {n_cards:,} of {total:,} prompts."
    counts = join([f"{run.label(policy)} {len(rows):,}" for policy, rows in run.samples.items()])
    intro = say(
        "The same prompt to every policy, in the order of the evaluation, not picked. Read some before "
        f"believing any number above.{shortened} All samples (",
        counts,
        ") are in ",
        Code("samples/"),
        ".",
    )
    return Section(
        key="samples", title="Samples side by side", short="Samples", blocks=(intro, explorer), apart=True
    )


SHADES = (
    "Shades show what each token did to the score so far: blue raised it, orange and underlined lowered it; "
    "the largest twentieth of all changes looks alike. Only the surest mistakes carry them, and only the "
    "score after the last token counts."
)


def _mistakes(run: RunView) -> Section | None:
    """Error patterns by tag, then the mistakes themselves, the surest first."""
    if run.reward_model is None and not run.mistakes:
        return None
    if not run.mistakes:
        blocks: list[Block] = [say("No mistakes are recorded.")]
        return Section(key="mistakes", title="Mistakes of the reward model", blocks=tuple(blocks))
    explorer, total = mistakes(run), len(run.mistakes)
    ties = sum(row.margin == 0 for row in run.mistakes)
    n_cards = len(explorer.cards)
    shortened = "" if n_cards == total else f" This page holds the first {n_cards:,}."
    blocks = [
        say(
            f"{total:,} validation pairs are ordered against their label"
            f"{f', {ties} of them ties' if ties else ''}, the most confident first.{shortened} All are in ",
            Code("analysis/reward_model_mistakes.jsonl"),
            ". A label can be wrong: some of these mistakes are not the model's.",
        )
    ]
    if tags := tag_table(run):
        blocks += [
            Grid(table=tags),
            say(
                "A mistake may carry several tags. A share says how common a pattern is among mistakes, not "
                "that it causes them; the error rate is over all pairs with that tag."
                if run.reward_model and run.reward_model.tags
                else "A mistake may carry several tags. A share says how common a pattern is among mistakes, "
                "not that it causes them."
            ),
        ]
    if any(passage.shades for card in explorer.cards for passage in card.passages):
        blocks.append(say(SHADES))
    return Section(
        key="mistakes",
        title="Mistakes of the reward model",
        short="Mistakes",
        blocks=(*blocks, explorer),
        apart=True,
    )
