"""What the report says, once: sections of blocks; analysis.py writes them as Markdown, page.py as HTML."""

from collections.abc import Mapping

from preftune.report import claims
from preftune.report.audit import reward_model_blocks
from preftune.report.blocks import Block, Bullets, Grid, Picture, Quotes, Section, Source, Table, say
from preftune.report.cautions import cautions
from preftune.report.datacard import data_blocks, flat
from preftune.report.tables import comparison_table, detail_table, kl_text
from preftune.report.text import Code, Prose, duration, join, name, number
from preftune.report.view import PolicyView, Row, RunView, StageView
from preftune.rundir import BASE

SHOWN_PROMPTS = 5
MAX_FACT = 400  # characters of one fact about the set-up, such as all versions
FACTS = ("versions", "command", "commit", "python", "platform", "processor", "cores", "threads", "devices")


def sections(run: RunView, figures: Mapping[str, str]) -> tuple[Section, ...]:
    """All sections in reading order. `figures` maps the names of drawn figures to their alternative texts."""
    return (
        _comparison(run, figures),
        _significance(run),
        _setup(run),
        _data(run),
        _reward_model(run, figures),
        _training(run, figures),
        _samples(run),
        _limits(run),
        _configuration(run),
    )


def _pictures(figures: Mapping[str, str], prefix: str) -> list[Block]:
    return [Picture(file=file, alt=alt) for file, alt in figures.items() if file.startswith(prefix)]


# --- the comparison -----------------------------------------------------------------------------------------


def _comparison(run: RunView, figures: Mapping[str, str]) -> Section:
    if not run.policies:
        missing = say(
            "No policy has been evaluated, so there is no table. ",
            Code("preftune evaluate RUN"),
            " makes it.",
        )
        return Section(key="comparison", title="Comparison", blocks=(missing,))
    blocks: list[Block] = [
        Grid(table=comparison_table(run)),
        say(
            "Every policy answered the same held-out prompts; reward is the normalised score of this run's "
            "reward "
            "model. Brackets are 95 % intervals from a bootstrap over prompts (shares: Wilson). Differences "
            "and win "
            "rates are paired by prompt against the reference; ties count half. KL is KL(policy || "
            "reference), exact over the "
            "vocabulary at each token and summed over the response."
        ),
        *_pictures(figures, "reward_kl"),
        *_trade_off(run),
        *_pictures(figures, "reward_distribution"),
        Grid(table=detail_table(run)),
        say(
            "k1 is the usual sampled estimate of the same KL; it is noisier and may be negative. Shares are "
            "of all "
            "responses of a policy; distinct-n depends on the amount of text and is comparable within this "
            "table only."
        ),
    ]
    return Section(key="comparison", title="Comparison", blocks=tuple(blocks))


def _trade_off(run: RunView) -> list[Block]:
    """One bullet a trained policy: what it gained, what it paid in KL, and whether best-of-n was cheaper."""
    reference = run.label(run.reference)
    best = next((policy for policy in run.policies if policy.best_of), None)
    items = [
        _paid(run, claim.policy, f"{claim.difference.text(sign=True)} reward against {reference}", best)
        for claim in claims.claims(run)
        if not claim.policy.best_of and claim.policy.policy != BASE and claim.policy.kl is not None
    ]
    return [say("What each policy paid in KL for its reward:"), Bullets(items=tuple(items))] if items else []


def _paid(run: RunView, policy: PolicyView, gain: str, best: PolicyView | None) -> Prose:
    text = f"{policy.label}: {gain} at {kl_text(policy)} nats per response."
    record = None if best is None else run.paired(policy.policy, best.policy)
    if best is None or best.kl is None or policy.kl is None or record is None:
        return (text,)
    outcome = claims.outcome(record.difference, record.p_holm)
    relation = {claims.BETTER: "more reward", claims.WORSE: "less reward"}.get(outcome, outcome)
    low = policy.kl.low if policy.kl.low is not None else policy.kl.value
    above = "for more KL" if low > best.kl.value else "and its KL is not shown to be higher"
    against = f"Against {best.label}, paired by prompt: {relation} ({record.difference.text(sign=True)})"
    return (f"{text} {against}, {above} (best-of-n's is at most {best.kl.value:.2f}).",)


def _significance(run: RunView) -> Section:
    """Every claim with its interval, its corrected p-value and what the comparison could have found."""
    items: list[Prose] = []
    for measure, words in (("score", "reward"), ("gold", "gold score")):
        for claim in claims.claims(run, measure):
            p_value = "" if claim.p_holm is None else f", p = {_p(claim.p_holm)} after Holm's correction"
            found = f"{claim.outcome} ({claim.difference.text(sign=True)}{p_value})"
            text = f"{claim.policy.label}, {words}: {found}."
            least = claims.detectable(claim.difference)
            if claim.outcome == claims.UNCLEAR and least is not None:
                text += (
                    f" A true difference of {number(least)} would be found 4 times in 5 (before correction)."
                )
                if claim.n_needed is not None and claim.n_needed > (claim.difference.n or 0):
                    text += f" To show the difference seen here would take about {claim.n_needed:,} prompts."
            items.append((text,))
    intro = say(
        "A difference is called better or worse only if its 95 % interval leaves out zero and, where several "
        "comparisons were made, its p-value survives Holm's correction at 5 %. No detectable difference does "
        "not mean "
        "equal."
    )
    nothing = say("No policy was compared with another, so nothing is significant or insignificant here.")
    blocks: tuple[Block, ...] = (intro, Bullets(items=tuple(items))) if items else (nothing,)
    return Section(key="significance", title="What is significant and what is not", blocks=blocks)


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


# --- set-up and data ----------------------------------------------------------------------------------------


def _setup(run: RunView) -> Section:
    model, data = run.config.get("model", {}), run.config.get("data", {})
    facts: list[Prose] = [
        (
            "Recipe: ",
            name(run.name),
            f"; seed {run.config.get('seed', 0)}; precision {run.config.get('precision', 'float32')}.",
        ),
        ("Base model: ", name(model.get("base", "unknown")), "."),
        (
            "Data: ",
            name(data.get("name", "unknown")),
            *_subset(data),
            "; text form ",
            name(data.get("form", "transcript")),
            ".",
        ),
    ]
    for key in FACTS:
        if run.record.get(key):
            facts.append((f"{key.capitalize()}: ", name(flat(run.record[key]), MAX_FACT), "."))
    blocks: list[Block] = [Bullets(items=tuple(facts))]
    if run.stages:
        blocks.append(Grid(table=_stage_table(run.stages)))
    else:
        blocks.append(say("No stage has started."))
    if run.missing:
        blocks += [
            say("Not there when this was written:"),
            Bullets(items=tuple((item,) for item in run.missing)),
        ]
    return Section(key="setup", title="Set-up", blocks=tuple(blocks))


def _subset(data: Row) -> tuple[str, ...]:
    return (" / ", name(data["data_dir"])) if data.get("data_dir") not in (None, "", "none") else ()


def _stage_table(stages: tuple[StageView, ...]) -> Table:
    headers = ("Stage", "Algorithm", "From", "Status", "Steps", "Time", "Peak memory (MB)")
    rows = [
        (
            name(stage.name),
            name(stage.algorithm),
            name(", ".join(stage.parents) or "–"),
            stage.status,
            "–" if stage.steps is None else str(stage.steps),
            duration(stage.seconds),
            "–" if stage.peak_memory_mb is None else f"{stage.peak_memory_mb:.0f}",
        )
        for stage in stages
    ]
    total = sum(stage.seconds or 0.0 for stage in stages)
    return Table(headers=headers, rows=(*rows, ("total", "", "", "", "", duration(total), "")), left=4)


def _data(run: RunView) -> Section:
    if not run.data:
        return Section(key="data", title="Data", blocks=(say("There is no record of the data (data.json)."),))
    blocks = data_blocks(run.data)
    rows = [
        (name(stage.name), name(reason), f"{count:,}")
        for stage in run.stages
        for reason, count in stage.left_out.items()
    ]
    if rows:
        table = Table(
            headers=("Left out when encoded for stage", "Because", "Rows"), rows=tuple(rows), left=2
        )
        blocks.append(Grid(table=table))
    return Section(key="data", title="Data", blocks=tuple(blocks))


# --- the reward model ---------------------------------------------------------------------------------------


def _reward_model(run: RunView, figures: Mapping[str, str]) -> Section:
    blocks = reward_model_blocks(run, _pictures(figures, "reward_model"))
    return Section(key="reward-model", title="Reward model", blocks=tuple(blocks))


def _training(run: RunView, figures: Mapping[str, str]) -> Section:
    pictures = _pictures(figures, "training_")
    intro = say("Metrics as logged at each step; the pale line is every value, the dark one a running mean.")
    nothing = say("No stage has logged a metric.")
    return Section(key="training", title="Training", blocks=(intro, *pictures) if pictures else (nothing,))


# --- samples, limits, configuration -------------------------------------------------------------------------


def _samples(run: RunView) -> Section:
    if not run.samples:
        return Section(key="samples", title="Samples", blocks=(say("There are no samples."),))
    blocks: list[Block] = [
        say(
            "The first prompts of the evaluation, not picked, each with one response from every policy. Read "
            "them "
            "before believing any number above."
        )
    ]
    prompts = list(dict.fromkeys(str(row.get("prompt", "")) for rows in run.samples.values() for row in rows))
    for index, prompt in enumerate(prompts[:SHOWN_PROMPTS], start=1):
        answers = []
        for policy, rows in run.samples.items():
            row = next((row for row in rows if str(row.get("prompt", "")) == prompt), None)
            if row is not None:
                answers.append((run.label(policy), _note(row), str(row.get("response", ""))))
        blocks.append(Quotes(title=f"Prompt {index}", texts=(("Prompt", "", prompt), *answers)))
    counts = join([f"{run.label(policy)} {len(rows)}" for policy, rows in run.samples.items()])
    blocks.append(say("All samples (", counts, ") are in ", Code("samples/"), "."))
    return Section(key="samples", title="Samples side by side", blocks=tuple(blocks))


def _note(row: Row) -> str:
    """Score, KL, length, end and gold of one sample."""
    parts = [
        f"{words} {number(row[key])}"
        for key, words in (("score", "score"), ("gold", "gold"), ("kl", "KL"))
        if isinstance(row.get(key), int | float)
    ]
    if isinstance(row.get("length"), int):
        parts.append(f"{row['length']} token{'' if row['length'] == 1 else 's'}")
    if row.get("ended") is False:
        parts.append("cut at the limit")
    if not str(row.get("response", "")).strip():
        parts.append("empty")
    return ", ".join(parts)


def _limits(run: RunView) -> Section:
    standing: list[Prose] = [
        (
            "The reward model is both what PPO and GRPO were trained on and what all policies are scored by: "
            "a gain in "
            "its score is a gain by its taste, not proof of better answers.",
        ),
        (
            "One seed. The intervals cover the choice of prompts, not the luck of training; another seed can "
            "reorder "
            "policies that are close.",
        ),
    ]
    found: list[Prose] = [(text,) for text in cautions(run)]
    return Section(key="limits", title="Limits", blocks=(Bullets(items=tuple(found + standing)),))


def _configuration(run: RunView) -> Section:
    if not run.config_text:
        return Section(key="config", title="Configuration", blocks=(say("There is no config.toml."),))
    return Section(
        key="config",
        title="Configuration",
        blocks=(Source(title="config.toml", language="toml", text=run.config_text),),
    )
