"""`preftune verify-resume`: the command's options and what it does."""

from typing import Annotated

import typer

from preftune.errors import PreftuneError, UsageError


def verify_resume(
    recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe, or path of a .toml file.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[STAGE] [KEY=VALUE]...", help="A stage (by default all), settings to change."
        ),
    ] = None,
    kills: Annotated[int, typer.Option(min=1, help="How often each stage is killed.")] = 3,
    seed: Annotated[int, typer.Option(help="Where it is killed follows from this number.")] = 0,
) -> None:
    """Train stages in one go and killed at random places; exit with 70 if results differ in one bit."""
    from preftune.verify import resume

    stages = [word for word in words or () if "=" not in word]
    if len(stages) > 1:
        raise UsageError(f"more than one stage: {' '.join(stages)}", hint="give one stage, or none for all")
    overrides = [word for word in words or () if "=" in word]
    stage = stages[0] if stages else None
    verdicts = resume.verify_resume(recipe, stage, overrides, kills=kills, seed=seed, say=typer.echo)
    typer.echo(resume.table(verdicts))
    raise typer.Exit(PreftuneError.code if any(verdict.differs for verdict in verdicts) else 0)
