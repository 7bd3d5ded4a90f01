"""What the run was: stages with time and memory, versions and machine, every setting with its origin."""

from preftune.config.toml import flatten, toml_value
from preftune.report.blocks import Block, Bullets, Fold, Grid, Section, Source, Table, say
from preftune.report.sections.data import flat
from preftune.report.text import Prose, duration, name
from preftune.report.view import Row, RunView, StageView

MAX_FACT = 400  # characters of one fact about the set-up, such as all versions
FACTS = (
    "versions",
    "command",
    "commit",
    "python",
    "platform",
    "processor",
    "cores",
    "threads",
    "world_size",
    "kernel",
    "devices",
)


def setup(run: RunView) -> Section:
    model, data = run.config.get("model", {}), run.config.get("data", {})
    precision = run.record.precision or run.config.get("precision", "float32")
    facts: list[Prose] = [
        (
            "Recipe: ",
            name(run.name),
            f"; seed {run.config.get('seed', 0)}; precision {precision}.",
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
        if value := getattr(run.record, key):
            facts.append((f"{key.capitalize()}: ", name(flat(value), MAX_FACT), "."))
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
    return Section(key="setup", title="Set-up", blocks=tuple(blocks), apart=True)


def _subset(data: Row) -> tuple[str, ...]:
    return (" / ", name(data["data_dir"])) if data.get("data_dir") not in (None, "", "none") else ()


def _stage_table(stages: tuple[StageView, ...]) -> Table:
    headers = ("Stage", "Algorithm", "From", "Status", "Steps", "Time", "Peak memory (MB)")
    rows = [
        (
            name(stage.name),
            name(stage.algorithm),
            name(", ".join(stage.record.parents) or "–"),
            stage.status,
            "–" if stage.record.steps is None else str(stage.record.steps),
            duration(stage.record.seconds),
            "–" if stage.record.peak_memory_mb is None else f"{stage.record.peak_memory_mb:.0f}",
        )
        for stage in stages
    ]
    total = sum(stage.record.seconds or 0.0 for stage in stages)
    return Table(
        headers=headers, rows=(*rows, ("total", "", "", "", "", duration(total), "")), word_columns=4
    )


def configuration(run: RunView) -> Section:
    """What differs from the defaults, then all settings, each with where it comes from."""
    if not run.config_text:
        return Section(key="config", title="Configuration", blocks=(say("There is no config.toml."),))
    values = {key: name(toml_value(value), MAX_FACT) for key, value in flatten(dict(run.config)).items()}
    file = Source(title="config.toml", language="toml", text=run.config_text)
    if not run.origins:
        intro = say("This run has no record of where its settings come from (origins.json): all are listed.")
        rows = tuple((name(key), value) for key, value in values.items())
        table = Grid(table=Table(headers=("Setting", "Value"), rows=rows, word_columns=2))
        return Section(
            key="config",
            title="Configuration",
            blocks=(intro, Fold(title="All settings", blocks=(table,)), file),
            apart=True,
        )
    rows = tuple((name(key), value, name(run.origins.get(key, "–"))) for key, value in values.items())
    set_here = tuple(row for row in rows if row[2] != "default")
    from_command_line = sum(row[2] == "command line" for row in rows)
    intro = say(
        "Recipe ", name(run.recipe or "?"), f": {len(set_here)} of {len(rows)} settings are set by the "
        f"recipe or the command line ({from_command_line} by the command line), the others are defaults.",
    )  # fmt: skip
    headers = ("Setting", "Value", "From")
    blocks: list[Block] = [intro]
    blocks += [
        Fold(title=title, blocks=(Grid(table=Table(headers=headers, rows=settings, word_columns=3)),))
        for title, settings in (("Settings that are no defaults", set_here), ("All settings", rows))
        if settings
    ]
    return Section(key="config", title="Configuration", blocks=(*blocks, file), apart=True)
