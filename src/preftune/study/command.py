"""`preftune study`, and `preftune study-seed`, which it starts."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from preftune import faults
from preftune.errors import UsageError
from preftune.stops import end_with_parent, handled

Recipe = Annotated[str, typer.Argument(help="Name of a shipped recipe, or path of a .toml file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Settings to change, such as stage.ppo.learning_rate=1e-6."
    ),
]


def named_directory(name: str | None) -> str | None:
    """A directory that a command line names. `~` is the home in `out=~/runs` and `--out=~/runs` too, which a
    shell passes on as they are. UsageError for an empty name, as an unset variable gives one.
    """
    if name == "":
        raise UsageError("the name of a directory is empty", "give one, or leave the option out")
    return name if name is None else os.path.expanduser(name)


def out_of(overrides: Sequence[str] | None, out: str | None) -> tuple[str | None, tuple[str, ...]]:
    """The last `out=DIR` among the words, or the option; and the words without it."""
    directories = [text.removeprefix("out=") for text in overrides or () if text.startswith("out=")]
    settings = tuple(text for text in overrides or () if not text.startswith("out="))
    return named_directory(directories[-1] if directories else out), settings


def study(
    recipe: Recipe,
    overrides: Overrides = None,
    seeds: Annotated[int, typer.Option(help="How many seeds.")] = 5,
    first_seed: Annotated[int, typer.Option(help="The first; the others follow it.")] = 0,
    sweep: Annotated[
        str | None, typer.Option(metavar="KEY=A,B;KEY=C", help="Also run stages at these values of settings.")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens through each policy's training forward; by default those of the first online stage. "
            "0 keeps the recipe's own sizes."
        ),
    ] = None,
    pairs: Annotated[int, typer.Option(help="Fresh pairs that test the reward model, each set.")] = 2000,
    replies: Annotated[int, typer.Option(help="Replies of each policy to a prompt.")] = 4,
    jobs: Annotated[
        int | None,
        typer.Option(help="Seeds at a time, one thread each; by default 1, on a cluster all.", min=1),
    ] = None,
    reports: Annotated[bool, typer.Option(help="Evaluate and report every seed's run, too.")] = True,
    keep: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", callback=named_directory, help="Read and put numbers of finished seeds here."
        ),
    ] = None,
    on: Annotated[str, typer.Option(metavar="WHERE", help="here, slurm, ray, or submitit-local.")] = "here",
    resource: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="What the cluster gives a task; may be repeated."),
    ] = None,
    retries: Annotated[
        int, typer.Option(help="How often a task that was lost or stopped is begun again.")
    ] = 3,
    mirror: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            callback=named_directory,
            help="Copies of checkpoints, models and numbers, for every machine.",
        ),
    ] = None,
    out: Annotated[str | None, typer.Option(help="Directory; by default studies/<recipe>.")] = None,
) -> None:
    """Run a recipe at several seeds and pool them: score, gold score, KL, with intervals over seeds."""
    from preftune.study.design import Request
    from preftune.study.launch import Placement, run_study

    place, settings = out_of(overrides, out)
    copies = None if mirror is None else Path(mirror)
    request = Request(recipe, settings, tokens=tokens, sweep=sweep, fresh_pairs=pairs, replies=replies)
    run_study(
        request,
        Path(place or f"studies/{Path(recipe).stem}"),
        seeds=seeds,
        first_seed=first_seed,
        jobs=jobs,
        reports=reports,
        keep=None if keep is None else Path(keep),
        placement=Placement(on=on, resources=resources(resource or ()), retries=retries, mirror=copies),
    )


def study_seed(
    directory: Path,
    seed: int,
    reports: bool = True,
    child: bool = False,
    mirror: Path | None = None,
    stage: list[str] | None = None,
    point: str | None = None,
    keep: Path | None = None,
) -> None:
    """Run one seed of a study that `study` has designed, or the stages named; `study` starts it."""
    from preftune.study.seed import run_seed
    from preftune.study.tasks import Task

    with handled():
        if child:
            end_with_parent()
        faults.arm()
        run_seed(
            Task(
                out=directory,
                seed=seed,
                reports=reports,
                mirror=mirror,
                stages=tuple(stage or ()),
                point=point,
                keep=keep,
            )
        )


def resources(words: Sequence[str]) -> dict[str, int | float | str]:
    """KEY=VALUE as numbers where they are some. UsageError for a word of another form."""
    parsed = dict[str, int | float | str]()
    for word in words:
        key, sign, value = word.partition("=")
        if not sign or not key.isidentifier():
            raise UsageError(f"--resource {word}: expected KEY=VALUE", "such as --resource cpus_per_task=4")
        try:
            parsed[key] = int(value) if value.isdecimal() else float(value)
        except ValueError:
            parsed[key] = value
    return parsed
