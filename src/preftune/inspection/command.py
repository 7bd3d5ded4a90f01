"""`preftune inspect`: a recipe, a run, or a file of rows, looked at closely. Nothing is trained."""

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from preftune.errors import UsageError, in_a_directory, one_of
from preftune.rundir import RunDir, json_text, write_jsonl, write_result

if TYPE_CHECKING:
    from rich.console import Console

    from preftune.runs.session import Session


def inspect(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE or RUN] [ROW] [KEY=VALUE]...",
            help="What to look at, the number of a training row (by default the first taken), settings.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Look at these rows instead: repeats, contradictions, length bias, overlap, phrases.",
        ),
    ] = None,
    stage: Annotated[list[str] | None, typer.Option(help="This stage alone; may be repeated.")] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Keep a run's replies by token, and put them into its report.")
    ] = False,
    json: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            callback=in_a_directory,
            help="Write what is shown to FILE as data; - prints it instead.",
        ),
    ] = None,
) -> None:
    """Show what a stage sees of a row, token by token; of a run, what its policies did; or check data."""
    from rich.console import Console

    target, row, overrides = _arguments(words or ())
    console = Console(highlight=False, soft_wrap=True, quiet=json == "-")
    if data is not None:
        if target is not None or report or stage:
            raise UsageError("--data looks at rows alone", "leave out recipe, --stage and --report")
        result: Any = _data(console, data, overrides)
    elif target is None:
        raise UsageError("nothing to look at", "preftune inspect RECIPE, inspect RUN or inspect --data PATH")
    else:
        result = _tokens(console, target, row, overrides, stage or (), report)
    if json == "-":
        typer.echo(json_text(result), nl=False)
    elif json is not None:
        write_result(Path(json), result)


def _arguments(words: Sequence[str]) -> tuple[str | None, int | None, list[str]]:
    """What to look at, the row, and settings."""
    overrides = [word for word in words if "=" in word and not os.path.exists(word)]
    positional = [word for word in words if word not in overrides]
    rows = [word for word in positional[1:] if word.isascii() and word.isdigit()]
    if len(positional) - len(rows) > 1 or len(rows) > 1:
        raise UsageError(
            f"cannot read {' '.join(positional)!r}", "give one recipe or run, and the number of a row"
        )
    return (positional[0] if positional else None), (int(rows[0]) if rows else None), overrides


def _data(console: "Console", path: str, overrides: Sequence[str]) -> list[dict[str, Any]]:
    from preftune.config import load_recipe
    from preftune.inspection.dataset import examine, lines
    from preftune.inspection.paint import paint_findings
    from preftune.runs.sources import dataset_of

    config = load_recipe("tiny", [*overrides, f"data.name={path}"]).config
    dataset = dataset_of(config.data, config.seed)
    findings = examine(dataset)
    paint_findings(console, list(lines(dataset, findings)))
    return [asdict(finding) for finding in findings]


def _tokens(
    console: "Console",
    target: str,
    row: int | None,
    overrides: Sequence[str],
    stages: Sequence[str],
    report: bool,
) -> dict[str, Any]:
    is_run = RunDir(target).config.is_file()
    if is_run and overrides:
        raise UsageError("a run has its settings", "leave them out, or give a recipe")
    if not is_run and report:
        raise UsageError("a recipe has no report", "give the directory of a run")
    session = _session(target, is_run, overrides)
    names = list(session.config.stage)
    if bad := [name for name in stages if name not in names]:
        raise UsageError(f"there is no stage {bad[0]!r}", one_of(bad[0], names))
    from preftune.inspection.paint import paint_replies, paint_views
    from preftune.inspection.rows import row_to_show, views

    training_row = row_to_show(session, row)
    row_views = list(views(session, stages or names, training_row, only=row is not None))
    paint_views(console, row_views)
    result: dict[str, Any] = {"rows": [asdict(view) for view in row_views], "replies": []}
    if is_run:
        from preftune.inspection.replies import note_of, token_rows, trained_policies

        for name in trained_policies(session, stages or names):
            rows = token_rows(session, name, training_row)
            paint_replies(console, rows, note_of(session, name))
            result["replies"] += rows
        if report:
            _keep(session, result["replies"])
            console.print(f"\nin the report: {session.run.report_page}")
    return result


def _session(target: str, is_run: bool, overrides: Sequence[str]) -> "Session":
    from preftune.runs.console import Console
    from preftune.runs.reopen import found_data, reopen

    if is_run:
        return reopen(target, write=False)
    from preftune.config import load_recipe
    from preftune.runs.inputs import absolute, existing

    if not target.endswith(".toml") and "/" in target:  # no recipe's name
        existing(target, "give a run, or a recipe's name")
    config = absolute(load_recipe(target, overrides).config)
    dataset, base = found_data(config, None)
    from preftune.runs.session import Session

    nowhere = RunDir(Path(".no-run"))  # a recipe is looked at as if nothing were trained
    return Session(
        config=config, dataset=dataset, run=nowhere, console=Console(quiet=True), trains=False, located=base
    )


def _keep(session: "Session", rows: list[dict[str, Any]]) -> None:
    """Into analysis/, and the report anew."""
    from preftune.records.run import TOKENS
    from preftune.report.build import build
    from preftune.runs.lock import held

    with held(session.run):
        write_jsonl(session.run.analysis_details / TOKENS, rows)
        build(session.run)
