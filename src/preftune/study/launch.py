"""`preftune study`: design, seeds side by side, then the numbers of all of them."""

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from preftune.config import load_recipe, stage_order
from preftune.config.graph import stages_until
from preftune.errors import InputMissing, UsageError, one_of
from preftune.records.base import read_record
from preftune.records.run import DataRecord
from preftune.rundir import RunDir, read_json, write_json, write_text
from preftune.runs.console import Console
from preftune.runs.inputs import absolute, check_llm_judges, variables
from preftune.runs.lock import held
from preftune.runs.reopen import checked_data
from preftune.stops import handled
from preftune.study.design import (
    FRESH_PAIRS,
    REPLIES,
    Design,
    Request,
    check_gold,
    load_design,
    make_design,
    save_design,
    swept,
)
from preftune.study.here import Here
from preftune.study.kept import keep as put_by
from preftune.study.kept import kept_file
from preftune.study.on_ray import Ray
from preftune.study.on_slurm import Slurm
from preftune.study.places import conclusions, facts_file, numbers_in, seed_dir
from preftune.study.seed import is_finished, run_seed
from preftune.study.tasks import Crew, Task, carry_out
from preftune.world.dataset import world_hash

HERE = "here"
ON = (HERE, "slurm", "submitit-local", "ray")


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Who runs the seeds, and how.

    `resources`: what a cluster gives each task, in submitit's or Ray's words. `retries`: how often a task is
    begun again that was lost or stopped. `mirror`: where machines without common storage hand results over.
    """

    on: str = HERE
    resources: Mapping[str, int | float | str] = field(default_factory=dict)
    retries: int = 3
    mirror: Path | None = None

    @property
    def threads(self) -> int:
        """Of a task's process: one for each processor that was asked for; numbers may hang on it. UsageError
        for a number that is none.
        """
        names = ("slurm_cpus_per_task", "cpus_per_task", "num_cpus")
        name = next((name for name in names if name in self.resources), "")
        try:
            return int(self.resources.get(name, 1)) or 1
        except (ValueError, OverflowError) as error:
            raise UsageError(
                f"--resource {name}={self.resources[name]}: not a number of processors"
            ) from error


def run_study(
    request: Request,
    out: Path,
    *,
    seeds: int,
    first_seed: int = 0,
    jobs: int | None = 1,
    reports: bool = True,
    keep: Path | None = None,
    placement: Placement = Placement(),
) -> Path:
    """Run what is missing of every seed, then write study.json, STUDY.md and figures; returns study.json.

    A finished seed is not run again, nor one whose numbers lie in `keep`, where those of the others are put.
    With `jobs` > 1 seeds run in processes of one thread each; a model of the built-in world gains nothing
    from a second thread. Raises UsageError or ConfigError for what cannot be studied, and PreftuneError if a
    seed fails: in a process of its own after the others have ended.
    """
    _refuse(request, seeds, jobs, first_seed, keep, placement)
    console, numbers = Console(), [first_seed + i for i in range(seeds)]
    keep = numbers_in(placement.mirror) if placement.mirror else keep
    out.mkdir(parents=True, exist_ok=True)
    with handled(), held(RunDir(out)):
        design = _design(request, out, first_seed, placement.mirror)
        if placement.mirror:
            save_design(design, placement.mirror)
        records = {seed: record for seed in numbers if keep and (record := kept_file(keep, design, seed))}
        waiting = [seed for seed in numbers if seed not in records and not is_finished(out, design, seed)]
        for seed in numbers:
            if seed not in waiting:
                console.line(f"seed {seed} already finished")
        _run(out, waiting, design, jobs, reports, placement, console, keep)
        records = {seed: records.get(seed) or _numbers(out, keep, design, seed) for seed in numbers}
        conclusion = conclusions(out, *([keep.parent] if keep else []))
        command = " ".join([*variables(design.config), _command(request, numbers, out, reports, keep)])
        _write(out, design, records, command, conclusion)
    console.line(f"study: {out / 'STUDY.md'}")
    return out / "study.json"


def _refuse(
    request: Request, seeds: int, jobs: int | None, first_seed: int, keep: Path | None, placement: Placement
) -> None:
    """UsageError for what contradicts itself."""
    counts = (seeds, 1 if jobs is None else jobs, request.fresh_pairs, request.replies)
    if min(counts) < 1 or min(first_seed, placement.retries, request.tokens or 0) < 0:
        raise UsageError(
            "--seeds, --jobs, --pairs, --replies must be 1 or more, "
            "--first-seed, --retries, --tokens 0 or more"
        )
    if any(text.partition("=")[0].strip() == "seed" for text in request.overrides):
        raise UsageError("a study sets the seeds itself", hint="use --first-seed and --seeds")
    if placement.on not in ON:
        raise UsageError(f"--on {placement.on}: no such place", one_of(placement.on, ON))
    if placement.resources and placement.on == HERE:
        raise UsageError("--resource is for a cluster", "say which one with --on slurm or --on ray")
    if keep and placement.mirror:
        raise UsageError("--mirror keeps numbers in DIR/numbers by itself", "leave --keep out")


def _numbers(out: Path, keep: Path | None, design: Design, seed: int) -> Path:
    """The seed.json of a seed that has just been made; without common storage it lies in the mirror alone."""
    if is_finished(out, design, seed):
        if keep:
            put_by(out, keep, design, seed)
        return facts_file(out, seed)
    if keep and (record := kept_file(keep, design, seed)):
        return record
    hint = "is it the same directory on every machine? Where it is not, give one that is with --mirror"
    raise InputMissing(f"seed {seed} has ended, and its numbers are not in {keep or out}", hint)


def _design(request: Request, out: Path, first_seed: int = 0, mirror: Path | None = None) -> Design:
    """The design on disk if it is of the same request, else a new one, by the first seed's data. ConfigError
    for one in which nothing stands for gold.
    """
    spared = () if request.sweep is None else request.overrides  # another point of a sweep may read them
    config = absolute(load_recipe(request.recipe, request.overrides, spared=spared).config)
    content = {
        "recipe_config": config.model_dump(mode="json"),
        "tokens": request.tokens,
        "sweep": request.sweep,
        "fresh_pairs": request.fresh_pairs,
        "replies": request.replies,
    }
    file = out / "request.json"
    if file.is_file() and read_json(file) == content:
        design = load_design(out)
        check_gold(design)
        return design
    check_llm_judges(config)
    copies = None if mirror is None else str(seed_dir(mirror, first_seed))
    dataset, _ = checked_data(config, RunDir(seed_dir(out, first_seed)), copies)
    from preftune.runs.lengths import mean_lengths

    design = make_design(request, config, dataset, mean_lengths(config, dataset))
    save_design(design, out)
    write_json(file, content)
    return design


def _run(
    out: Path,
    seeds: Sequence[int],
    design: Design,
    jobs: int | None,
    reports: bool,
    placement: Placement,
    console: Console,
    keep: Path | None = None,
) -> None:
    """Have these seeds made, here or elsewhere."""
    at_once = jobs or (1 if placement.on == HERE else len(seeds) * (1 + len(swept(design))))
    tasks = [
        replace(task, keep=keep and keep.absolute())
        for task in _tasks(out, seeds, design, reports, placement)
    ]
    if placement.on == HERE and at_once == 1:
        for task in tasks:
            console.line(task.name)
            run_seed(task)
    elif tasks:
        carry_out(tasks, _crew(out, placement), at_once=at_once, retries=placement.retries, console=console)


def _tasks(
    out: Path, seeds: Sequence[int], design: Design, reports: bool, placement: Placement
) -> list[Task]:
    """One task a seed. On a cluster with a sweep first the stages that are not of it, then each of its
    points, then what is left: the measurement.
    """
    away, stages, tasks = placement.on != HERE, design.config.stage, list[Task]()
    common = Task(
        out=out.absolute() if away else out,
        seed=0,
        reports=reports,
        mirror=placement.mirror and placement.mirror.absolute(),
        threads=placement.threads,
        folder=os.getcwd() if away else "",
    )
    points = {point: tuple(stages_until(stages, point)) for point in (swept(design) if away else ())}
    shared = tuple(name for name in stage_order(stages) if name not in points)
    for seed in seeds:
        before = list[Task]()
        if points:
            first = replace(common, seed=seed, stages=shared)
            before = [
                replace(common, seed=seed, stages=needs, point=point, after=(first,))
                for point, needs in points.items()
            ]
            tasks += [first, *before]
        tasks.append(replace(common, seed=seed, after=tuple(before)))
    return tasks


def _crew(out: Path, placement: Placement) -> Crew:
    """Who carries the tasks out. BackendMissing where that is not installed."""
    if placement.on == HERE:
        return Here()
    if placement.on == "ray":
        return Ray(placement.resources)
    cluster = "slurm" if placement.on == "slurm" else "local"
    return Slurm((placement.mirror or out).absolute() / "jobs", placement.resources, cluster)


def _write(
    out: Path, design: Design, records: Mapping[int, Path], command: str, conclusion: str | None
) -> None:
    """study.json, STUDY.md and figures/ from the finished seeds. `conclusion`: what a person wrote."""
    from preftune.study.figures import draw
    from preftune.study.page import study_text
    from preftune.study.pool import pool
    from preftune.study.sweep import sweep_records

    study = pool(records, design)
    sweeps = sweep_records(design, study)
    study["sweep"], study["more_sweeps"] = (sweeps[0], sweeps[1:]) if sweeps else (None, [])
    study |= {"command": command, "conclusions": conclusion}
    data = RunDir(seed_dir(out, next(iter(records)))).data
    world = read_record(data, DataRecord).world if data.is_file() else {}
    # Of kept seeds there is no run here; their key says that their world is the one of this code.
    todays_world = world_hash() if design.is_world and not data.is_file() else None
    study["world_sha256"] = world.get("world_sha256", todays_world)
    for name, text in draw(study).items():
        write_text(out / "figures" / name, text)
    write_text(out / "STUDY.md", study_text(study))
    write_json(out / "study.json", study)


def _command(request: Request, seeds: Sequence[int], out: Path, reports: bool, keep: Path | None) -> str:
    """The command that makes this study, whatever earlier calls made parts of it."""
    words = ["preftune", "study", request.recipe, "--seeds", len(seeds), "--first-seed", seeds[0]]
    words += [] if request.tokens is None else ["--tokens", request.tokens]
    words += [] if request.sweep is None else ["--sweep", request.sweep]
    words += [] if request.fresh_pairs == FRESH_PAIRS else ["--pairs", request.fresh_pairs]
    words += [] if request.replies == REPLIES else ["--replies", request.replies]
    words += [] if reports else ["--no-reports"]
    words += [] if keep is None else ["--keep", keep]
    return shlex.join(map(str, [*words, *request.overrides, f"out={out}"]))
