"""The command line: verbs only. Commands import what they need when they run, so that `--help` is instant."""

import shlex
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

import typer

from preftune.chat.command import chat, sample
from preftune.errors import (
    DataError,
    PreftuneError,
    UsageError,
    from_system,
    in_a_directory,
    is_of_system,
    is_out_of_memory,
)
from preftune.exits import LESS_MEMORY, complain, exit_code, finished, open_streams, say
from preftune.export.command import export
from preftune.inspection.command import inspect
from preftune.isolated import from_panic, is_panic
from preftune.label.command import label
from preftune.runs.overview import first_screen, runs
from preftune.stops import Interrupted
from preftune.study.command import Overrides, Recipe, named_directory, out_of, study, study_seed
from preftune.untrusted import passes_credential, printable
from preftune.verify.command import verify_resume
from preftune.watch.command import watch

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # errors are shown by main
    rich_markup_mode=None,  # rich would double the time of --help
    context_settings={"help_option_names": ["-h", "--help"]},  # of every command
)

Run = Annotated[str, typer.Argument(metavar="RUN", help="Directory of a run.")]
Out = Annotated[str | None, typer.Option(help="Run directory; by default runs/<name>.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show the plan and the settings with their origins, then stop.")
]
Restart = Annotated[bool, typer.Option("--restart", help="Begin again instead of resuming what is there.")]
FromRun = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="RUN",
        callback=named_directory,
        help="Take over the finished stages of RUN that are unchanged.",
    ),
]
Redo = Annotated[
    list[str] | None,
    typer.Option(metavar="STAGE", help="Train a stage, and those that depend on it, again; may be repeated."),
]
Mirror = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        callback=named_directory,
        help="Copy checkpoints and models to DIR; a new machine resumes from there.",
    ),
]
JsonFile = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", callback=in_a_directory, help="Write the result to FILE as well; - prints it alone."
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def _version(requested: bool) -> None:
    """`--version`: preftune's own; the command `version` has torch's and the others' too."""
    if requested:
        from preftune.version import __version__

        typer.echo(f"preftune {__version__}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
]


@app.callback()
def common(debug: Debug = False, version: Version = False) -> None:
    # `main` reads --debug itself, wherever it stands in the line; here it is only taken and shown by --help.
    """RLHF for small models: reward model, SFT, PPO, GRPO, DPO and others, measured and written up."""


app.command()(runs)
app.command()(inspect)


@app.command()
def run(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Out = None,
    dry_run: DryRun = False,
    restart: Restart = False,
    mirror: Mirror = None,
    from_run: FromRun = None,
    redo: Redo = None,
) -> None:
    """Run a recipe: stages, evaluation and report. A second call resumes, or checks what is finished."""
    _run(recipe, overrides, None, out, dry_run, restart, mirror, from_run, redo or ())


@app.command()
def train(
    recipe: Recipe,
    stage: Annotated[str, typer.Argument(help="Name of the stage; stages it needs run first.")],
    overrides: Overrides = None,
    out: Out = None,
    dry_run: DryRun = False,
    restart: Restart = False,
    mirror: Mirror = None,
    from_run: FromRun = None,
    redo: Redo = None,
) -> None:
    """Train one stage, and before it the stages it needs."""
    _run(recipe, overrides, stage, out, dry_run, restart, mirror, from_run, redo or ())


@app.command()
def plan(recipe: Recipe, overrides: Overrides = None) -> None:
    """Say what a run would take: rows, steps, time, memory, disk; takes three steps of every stage."""
    from preftune import api

    for line in api.plan(recipe, out_of(overrides, None)[1]):
        typer.echo(printable(line))


@app.command()
def evaluate(
    run: Run,
    pairs: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Score the models on this preference file instead."),
    ] = None,
) -> None:
    """Evaluate the models of a run, on its own held-out rows or on other pairs."""
    from preftune import api

    api.evaluate(run, pairs)


@app.command()
def compare(
    run_a: Annotated[str, typer.Argument(metavar="RUN_A", help="Directory of an evaluated run.")],
    run_b: Annotated[str, typer.Argument(metavar="RUN_B", help="Directory of another one.")],
    json: JsonFile = None,
) -> None:
    """Compare two runs on their common prompts, policy by policy."""
    from preftune import api

    with _result_in(json) as file:
        api.compare(run_a, run_b, file)


@app.command()
def cache(
    empty: Annotated[bool, typer.Option("--empty", help="Remove all of it; runs compute it again.")] = False,
) -> None:
    """Say how large the kept states of frozen blocks are, on this machine, and where they lie."""
    from preftune.models.kept import cache_lines

    typer.echo("\n".join(cache_lines(remove=empty)))


@app.command()
def audit(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A reward model or a policy, by anyone.")],
    json: JsonFile = None,
) -> None:
    """Say what is wrong with a model directory before it is used for RL. Exit code 65 if it is not usable."""
    from preftune import api

    with _result_in(json) as file:
        usable = api.audit(directory, file)["verdict"] != "not usable"
    if not usable:
        raise typer.Exit(DataError.code)


app.command()(sample)
app.command()(chat)
app.command()(export)
app.command()(label)
app.command()(watch)


@app.command()
def report(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="Directory of a run.")] = None,
    every: Annotated[
        bool, typer.Option("--all", help="One page over all runs in a folder (RUN; by default runs).")
    ] = False,
) -> None:
    """Write ANALYSIS.md, figures and report.html from a run's files; or one page over all runs."""
    from preftune import report as reports
    from preftune.rundir import RunDir

    if every:
        from preftune.report.overview import build_all

        typer.echo(build_all(run or "runs"))
        return
    if run is None:
        raise UsageError("no run is named", "preftune report RUN, or preftune report --all")
    reports.build(run)
    typer.echo(RunDir(run).analysis_text)
    typer.echo(RunDir(run).report_page)


@app.command()
def options(
    markdown: Annotated[bool, typer.Option("--markdown", help="As the text of docs/config.md.")] = False,
) -> None:
    """List every setting with its type, default and meaning."""
    from preftune.config import options_markdown, options_text

    typer.echo(options_markdown() if markdown else options_text(), nl=not markdown)


@app.command()
def selftest(json: JsonFile = None) -> None:
    """Compare this installation with the reference implementations' numbers, on this machine."""
    from preftune import selftest as comparisons

    with _result_in(json) as file:
        table, code = comparisons.run(file)
        typer.echo(table)
    raise typer.Exit(code)


@app.command()
def doctor(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="Directory of a run.")] = None,
    json: JsonFile = None,
) -> None:
    """Name what is wrong with a run, with evidence and remedy; without RUN, check the installation."""
    if run is None:
        if json is not None:
            hint = "preftune doctor RUN --json FILE, or preftune selftest --json FILE"
            raise UsageError("--json is for the findings about a run, and no run is named", hint)
        from preftune import selftest as comparisons
        from preftune.runs.installation import check

        table, code = check(comparisons.run)
        typer.echo(printable(table))
        raise typer.Exit(code)
    from preftune.report.doctor import examine

    with _result_in(json) as file:
        typer.echo(printable(examine(run, file)))


app.command()(study)
app.command("study-seed", hidden=True)(study_seed)
app.command("verify-resume")(verify_resume)


@app.command()
def version() -> None:
    """Show versions."""
    import platform
    from importlib import metadata

    from preftune.version import __version__

    typer.echo(f"preftune {__version__}, Python {platform.python_version()}")
    for package in ("torch", "transformers", "accelerate", "datasets"):
        typer.echo(f"{package} {metadata.version(package)}")


@contextmanager
def _result_in(json: str | None) -> Iterator[str | None]:
    """The file for a result. For "-" it is printed, and what people read goes to the error stream."""
    if json != "-":
        yield json
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        with redirect_stdout(sys.stderr):
            yield str(file)
        typer.echo(file.read_text(encoding="utf-8"), nl=False)


def _run(
    recipe: str,
    overrides: Sequence[str] | None,
    until: str | None,
    out: str | None,
    dry_run: bool,
    restart: bool,
    mirror: str | None,
    from_run: str | None,
    redo: Sequence[str],
) -> None:
    """What `run` and `train` share: only `train` stops after a stage. `out=DIR` means `--out DIR`."""
    out, overrides = out_of(overrides, out)
    if restart and redo:
        raise UsageError("--restart makes everything anew, --redo a part", "give one of the two")
    if dry_run:
        from preftune.config import load_recipe, show_plan

        resolved = load_recipe(recipe, overrides)
        typer.echo(printable(show_plan(resolved, until=until)))
        if resolved.config.trains_parts():
            from preftune.config.graph import stages_until
            from preftune.runs.sizes import sizes  # it builds the model, without weights

            stages = resolved.config.stage
            names = stages_until(stages, until) if until else list(stages)
            typer.echo("\n" + "\n".join(sizes(resolved.config, None, names)))
        if from_run is not None or redo:
            from preftune import api

            lines = api.kept_stages(resolved, out=out, until=until, from_run=from_run, redo=redo)
            typer.echo(printable("\n" + "\n".join(lines)))
        if until is None:
            command = shlex.join(["preftune", "plan", recipe, *(overrides or ())])
            typer.echo(f"\nrows that are kept, time, memory, disk: {printable(command)}")
        return
    from preftune import api

    api.run_recipe(
        recipe,
        overrides,
        out=out,
        until=until,
        resume=not restart,
        mirror=mirror,
        from_run=from_run,
        redo=redo,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code (sysexits; 64 for wrong usage).

    Shows a traceback only with --debug, which may stand anywhere in the line.
    """
    open_streams()
    return finished(_main(list(sys.argv[1:] if arguments is None else arguments)))


def _main(words: list[str]) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that knows ASCII only gets escapes
    if bad := [word for word in words if passes_credential(word)]:
        return complain(
            f"the command line holds what looks like a password or token: {bad[0]}",
            "everyone on this machine can read command lines; log in with `hf auth login`, or set HF_TOKEN",
            UsageError.code,
        )
    if debug := "--debug" in words:
        words = ["--debug", *(word for word in words if word != "--debug")]
    try:
        if not words:  # without typer, which would load more than this takes
            print(printable(first_screen()))
            return 0
        app(words, prog_name="preftune")
        return 0
    except SystemExit as stop:
        return exit_code(stop)
    except KeyboardInterrupt:
        return exit_code(SystemExit(130))
    except Interrupted as stop:
        say(stop.message)
        return stop.code
    except BrokenPipeError:
        return 0
    except BaseException as error:
        if is_panic(error):
            error = from_panic(error)
        if not isinstance(error, Exception):
            raise
        if debug:
            say(printable("".join(traceback.format_exception(error))))
        if isinstance(error, OSError) and is_of_system(error):
            error = from_system(error)
        if isinstance(error, PreftuneError):
            return complain(error.message, error.hint, error.code)
        first_line = str(error).partition("\n")[0][:300]
        if is_out_of_memory(error):
            return complain(f"out of memory: {first_line}", LESS_MEMORY, PreftuneError.code)
        message = f"internal error: {type(error).__name__}: {first_line}"
        return complain(message, "run again with --debug to see where, and report it", PreftuneError.code)
