"""The command line: verbs only. Commands import what they need when they run, so that `--help` is instant."""

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from preftune.errors import PreftuneError

app = typer.Typer(
    help="RLHF for small language models: reward model, SFT, PPO, GRPO and DPO, measured and written up.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # errors are shown by main
    rich_markup_mode=None,  # rich would double the time of --help
)

Recipe = Annotated[str, typer.Argument(help="Name of a shipped recipe, or path of a .toml file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Settings to change, such as stage.ppo.learning_rate=1e-6."
    ),
]
Run = Annotated[str, typer.Argument(metavar="RUN", help="Directory of a run.")]
Out = Annotated[str | None, typer.Option(help="Run directory; by default runs/<name>.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show the plan and every setting with its origin, then stop.")
]
Restart = Annotated[bool, typer.Option("--restart", help="Begin again instead of resuming what is there.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.command()
def run(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Out = None,
    dry_run: DryRun = False,
    restart: Restart = False,
    debug: Debug = False,
) -> None:
    """Run a recipe: stages, evaluation and report. A second call resumes or does nothing."""
    _run(recipe, overrides, out=out, dry_run=dry_run, restart=restart)


@app.command()
def train(
    recipe: Recipe,
    stage: Annotated[str, typer.Argument(help="Name of the stage; stages it needs run first.")],
    overrides: Overrides = None,
    out: Out = None,
    dry_run: DryRun = False,
    restart: Restart = False,
    debug: Debug = False,
) -> None:
    """Train one stage, and before it the stages it needs."""
    _run(recipe, overrides, out=out, dry_run=dry_run, restart=restart, until=stage)


@app.command()
def evaluate(run: Run, debug: Debug = False) -> None:
    """Evaluate the models of a run."""
    from preftune.pipeline import api

    api.evaluate(run)


@app.command()
def sample(
    run: Run,
    policy: Annotated[str, typer.Option(help='A stage that trains a policy, or "base".')] = "sft",
    prompt: Annotated[list[str] | None, typer.Option(help="What to reply to; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampler.")] = 0,
    debug: Debug = False,
) -> None:
    """Sample replies from a policy to your prompts, or to held-out ones."""
    from preftune.pipeline import api

    for row in api.sample(run, policy, prompt or [], seed=seed):
        typer.echo(f"{row['prompt']}{row['response']}\n")


@app.command()
def report(run: Run, debug: Debug = False) -> None:
    """Write ANALYSIS.md, figures and report.html from a run's files."""
    from preftune import report as reports
    from preftune.rundir import RunDir

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
def selftest(
    json: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write the result to FILE as well.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Compare this installation with the reference implementations' numbers, on this machine."""
    from preftune import selftest as comparisons

    table, code = comparisons.run(json)
    typer.echo(table)
    raise typer.Exit(code)


@app.command()
def version() -> None:
    """Show versions."""
    import platform
    from importlib import metadata

    from preftune import __version__

    typer.echo(f"preftune {__version__}, Python {platform.python_version()}")
    for package in ("torch", "transformers", "accelerate", "datasets"):
        typer.echo(f"{package} {metadata.version(package)}")


def _run(
    recipe: str,
    overrides: Sequence[str] | None,
    *,
    out: str | None,
    dry_run: bool,
    restart: bool,
    until: str | None = None,
) -> None:
    """What `run` and `train` share: only `train` stops after a stage. `out=DIR` means `--out DIR`."""
    places = [text.removeprefix("out=") for text in overrides or () if text.startswith("out=")]
    out = places[-1] if places else out
    overrides = [text for text in overrides or () if not text.startswith("out=")]
    if dry_run:
        from preftune.config import load_recipe, show_plan

        typer.echo(show_plan(load_recipe(recipe, overrides), until=until))
        return
    from preftune.pipeline import api

    api.run_recipe(recipe, overrides, out=out, resume=not restart, until=until)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code (sysexits; 64 for wrong usage).

    Shows a traceback only with --debug.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        app(words, prog_name="preftune")
        return 0
    except SystemExit as stop:
        return _exit_code(stop)
    except KeyboardInterrupt:
        return _exit_code(SystemExit(130))
    except BrokenPipeError:
        _forget_output()
        return 0
    except Exception as error:
        if "--debug" in words:
            traceback.print_exception(error)
        if isinstance(error, PreftuneError):
            return _complain(error.message, error.hint, error.code)
        first_line = str(error).partition("\n")[0][:300]
        what = f"internal error: {type(error).__name__}: {first_line}"
        return _complain(what, "run again with --debug to see where, and report it", PreftuneError.code)


def _exit_code(stop: SystemExit) -> int:
    """The code for an exit of the command line library, in which 2 means wrong usage and 130 Ctrl-C.

    A reader of the output that went away (`preftune options | head`) is no failure.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _forget_output()
        return 0
    code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    if code == 130:
        print("interrupted; the same command resumes", file=sys.stderr)
    return 64 if code == 2 else code


def _complain(message: str, hint: str, code: int) -> int:
    """At most eight lines on standard error; gives the code back."""
    text = "\n".join([f"error: {message}", *([f"hint: {hint}"] if hint else [])]).split("\n")
    shown = text if len(text) <= 8 else [*text[:6], "...", text[-1]]
    print("\n".join(shown), file=sys.stderr)
    return code


def _forget_output() -> None:
    """Point standard output nowhere, so that the interpreter's last flush does not complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
