"""The pipeline as Python functions: a run, its five stages, and the evaluation of what is finished.

Configuration, data and the base model's whereabouts are checked here, before torch is loaded: a mistake is
reported at once. What reads data is loaded after the look at the lock, which needs none of it.
"""

import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preftune import faults
from preftune.config import Resolved, RunConfig, from_outside, load_recipe, stage_order, stages_until
from preftune.config.rounds import round_name
from preftune.errors import ConfigError, DataError, InputMissing, UsageError, in_a_directory
from preftune.rundir import BASE, RunDir, write_result
from preftune.runs.aside import close, with_children
from preftune.runs.inputs import absolute, check_llm_judges, existing, other_run
from preftune.runs.lock import held, is_main_process, refuse_if_held
from preftune.runs.reopen import checked_data, reopen
from preftune.runs.restart import remove_run
from preftune.stops import handled

if TYPE_CHECKING:
    from preftune.data import Dataset
    from preftune.runs.console import Console
    from preftune.runs.session import Session

DEFAULT_RECIPE = "hh-colab"


def run(
    recipe: str | Path = DEFAULT_RECIPE,
    *overrides: str,
    out: str | Path | None = None,
    resume: bool = True,
    from_run: str | Path | None = None,
    redo: Sequence[str] = (),
) -> RunDir:
    """Run a recipe through all stages, evaluate, and write the report. A second call resumes, or only checks.

    `overrides` are "key=value" strings; `out` is the run directory (runs/<name> by default; "." puts models/,
    samples/ and analysis/ right here). `resume=False` removes what an earlier run left there. Stages that
    `from_run`, another run directory, has finished with the same key are copied; those in `redo`, and the
    stages that depend on them, are trained again.
    """
    return run_recipe(recipe, overrides, out=out, resume=resume, from_run=from_run, redo=redo)


def train_reward_model(
    recipe: str | Path = DEFAULT_RECIPE, *overrides: str, out: str | Path | None = None, resume: bool = True
) -> Path:
    """Train the reward model (and the stages it starts from); returns the model's directory."""
    return _train("reward", recipe, overrides, out, resume)


def supervised_finetune(
    recipe: str | Path = DEFAULT_RECIPE, *overrides: str, out: str | Path | None = None, resume: bool = True
) -> Path:
    """Fine-tune on chosen responses; returns the model's directory."""
    return _train("sft", recipe, overrides, out, resume)


def ppo_train(
    recipe: str | Path = DEFAULT_RECIPE, *overrides: str, out: str | Path | None = None, resume: bool = True
) -> Path:
    """Train a policy with PPO, missing parents first; returns the model's directory."""
    return _train("ppo", recipe, overrides, out, resume)


def grpo_train(
    recipe: str | Path = DEFAULT_RECIPE, *overrides: str, out: str | Path | None = None, resume: bool = True
) -> Path:
    """Train a policy with GRPO, missing parents first; returns the model's directory."""
    return _train("grpo", recipe, overrides, out, resume)


def dpo_train(
    recipe: str | Path = DEFAULT_RECIPE, *overrides: str, out: str | Path | None = None, resume: bool = True
) -> Path:
    """Train a policy with DPO, missing parents first; returns the model's directory."""
    return _train("dpo", recipe, overrides, out, resume)


def run_recipe(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    out: str | Path | None = None,
    resume: bool = True,
    until: str | None = None,
    mirror: str | None = None,
    from_run: str | Path | None = None,
    redo: Sequence[str] = (),
) -> RunDir:
    """What the command line calls: all stages and the report, or the stages up to `until` only. Stages that
    `from_run`, another run directory, has finished with the same key are copied; those in `redo`, and the
    stages that depend on them, are trained again.

    `mirror` is a directory for copies of checkpoints and models, from which a new machine resumes.
    """
    resolved = load_recipe(recipe, overrides)
    config, stages, run = _settings_meant(resolved, out, until)
    origin = None if from_run is None else other_run(from_run, run)
    anew = with_children(config.stage, redo)
    refuse_if_held(run)
    from preftune.runs.plan import check_kind

    _say_slow(f"reading {config.data.name}")
    earlier, copies = (run, mirror) if resume else (None, None)
    check_llm_judges(config, earlier, anew)
    dataset, base = checked_data(config, earlier, copies)
    check_kind(config, dataset, stages, compared=until is None)
    if until is None:
        _can_be_measured(dataset)
    faults.arm()
    began = time.monotonic()
    with handled(), held(run):
        removed = remove_run(run) if not resume and is_main_process() else []
        console = _console(config, dataset, run, stages, removed)
        if "torch" not in sys.modules:
            _say_slow("loading torch")
        from preftune.measure.write_up import measure_and_report
        from preftune.runs import provenance, runner

        if mirror is not None and not resume and is_main_process():
            _forget_mirrored(Path(mirror), run, config, console)
        with _how_to_go_on(recipe, overrides, run, config, until, redo):
            session = runner.open_session(
                config, dataset, run, console, mirror, base=base, origin=origin, redo=redo
            )
        if is_main_process():
            provenance.record_origins(run, resolved)
        _check_judges(session, stages)
        runner.train_stages(session, stages, compared=until is None)
        if until is None:
            measure_and_report(session, stages)
        else:
            console.line(f"models:   {run.models}")
        if is_main_process():
            close(run)
        _say_what_would_help(console, time.monotonic() - began)
    return run


def _settings_meant(
    resolved: Resolved, out: str | Path | None, until: str | None
) -> tuple[RunConfig, list[str], RunDir]:
    """Settings, stages and directory of a run, or of its stages up to `until`. UsageError for an empty `out`,
    as an unset variable gives one.
    """
    if out == "":
        raise UsageError("the name of a directory is empty", "give one, or leave `out` out")
    config = absolute(resolved.config)
    stages = stage_order(config.stage) if until is None else stages_until(config.stage, until)
    return config, stages, RunDir(Path(out) if out is not None else Path("runs") / config.name)


def _say_what_would_help(console: "Console", seconds: float) -> None:
    """At the end of a run: one line, if the sampling kernel is missing and would have been worth it."""
    from preftune.rollout.sample import seconds_without_kernel
    from preftune.runs.installation import kernel_hint

    if hint := kernel_hint(sum(seconds_without_kernel), seconds):
        console.line(hint)
    seconds_without_kernel.clear()


def kept_stages(
    resolved: Resolved,
    *,
    out: str | Path | None = None,
    until: str | None = None,
    from_run: str | Path | None = None,
    redo: Sequence[str] = (),
) -> list[str]:
    """What `--dry-run` says of --from and --redo: the stages that are taken over, those that are trained and
    why, those that are made anew. Reads the data, writes nothing.
    """
    config, stages, run = _settings_meant(resolved, out, until)
    anew = with_children(config.stage, redo)
    lines = [f"training again: {', '.join(anew)}"] if anew else []
    if from_run is None:
        return lines
    origin = other_run(from_run, run)
    dataset, base = checked_data(config, run)
    from preftune.runs.console import Console
    from preftune.runs.session import Session
    from preftune.runs.takeover import what_is_kept

    session = Session(
        config=config,
        dataset=dataset,
        run=run,
        console=Console(),
        located=base,
        origin=origin,
        anew=anew,
    )
    return [*lines, *what_is_kept(session, [*session.scratch, *stages])]


@contextmanager
def _how_to_go_on(
    recipe: str | Path,
    overrides: Sequence[str],
    run: RunDir,
    config: RunConfig,
    until: str | None,
    redo: Sequence[str],
) -> Iterator[None]:
    """Add the commands that continue to the message about a stage with changed settings. With several such
    stages, `--redo` lists those that were named before, and this one.
    """
    from preftune.runs.stages import OtherSettings

    try:
        yield
    except OtherSettings as error:
        words = [
            "preftune",
            *(["run", str(recipe)] if until is None else ["train", str(recipe), until]),
            *overrides,
        ]
        directory = run.path if run.path.is_absolute() else Path(os.path.relpath(run.path))
        new = directory.with_name(f"{directory.name or config.name}-2")
        beside = [*words, "--out", str(new), "--from", str(directory)]
        way = "here, keeping the old one until then"
        again = [word for name in (*redo, error.stage) for word in ("--redo", name)]
        if error.stage == BASE:
            way, again = "from scratch, in place", ["--restart"]
        anew = [*words, "--out", str(directory), *again]
        error.hint = (
            f"train it and the stages that depend on it again {way}: {shlex.join(anew)}\n"
            f"or make another run that takes over unchanged stages: {shlex.join(beside)}"
        )
        raise


def evaluate(path: str | Path, pairs: str | Path | None = None) -> RunDir:
    """Evaluate the finished stages of a run and write its report; or, on a foreign preference file,
    write evaluation/pairs-<name>/ and leave the rest as it is.
    """
    refuse_if_held(RunDir(Path(path)))
    run = existing(path)
    load_recipe(str(run.config))  # what is wrong with it is said before anything is written
    with handled(), held(run):
        session = reopen(path)
        from preftune.measure.write_up import measure_and_report
        from preftune.runs.plan import check_kind

        finished = [name for name in stage_order(session.config.stage) if session.is_trained(name)]
        if not finished:
            raise InputMissing(f"no stage of {path} is finished", hint="preftune run RECIPE trains them")
        if pairs is None:
            check_kind(session.config, session.dataset, finished, compared=True)
            measure_and_report(session, finished)
        elif is_main_process():
            from preftune.measure.pairs import evaluate_on_pairs

            directory = evaluate_on_pairs(session, finished, Path(os.path.expanduser(pairs)))
            session.console.line(f"written:  {directory}")
        if is_main_process():
            close(run)
    return run


def compare(a: str | Path, b: str | Path, json_file: str | Path | None = None) -> dict[str, Any]:
    """Two evaluated runs side by side on their common prompts: shows a table, returns the record."""
    from preftune.measure.compare import compare_runs, show_comparison
    from preftune.runs.console import Console

    result = compare_runs(RunDir(a), RunDir(b))
    if json_file is not None:
        _write_result(Path(json_file), result)
    show_comparison(Console(), result)
    return result


def audit(directory: str | Path, json_file: str | Path | None = None) -> dict[str, Any]:
    """What is wrong with a reward model or policy directory, no matter who made it; nothing is trained."""
    if not Path(directory).is_dir():  # said at once, before torch is loaded
        raise InputMissing(f"there is no model directory at {directory}", "give one with a config.json")
    from preftune.audit import audit_directory, show_audit
    from preftune.runs.console import Console

    result = audit_directory(Path(directory))
    if json_file is not None:
        _write_result(Path(json_file), result)
    show_audit(Console(), result)
    return result


def sample(
    path: str | Path, policy: str = "sft", prompts: Sequence[str] = (), seed: int = 0, n: int = 5
) -> Iterator[dict[str, Any]]:
    """Replies of a run's policy ("base" or a stage) to given prompts, or to `n` held-out ones."""
    from preftune.measure.samples import replies

    yield from replies(reopen(path, write=False), policy.removeprefix("policy_"), prompts, seed, n)


def _train(
    algorithm: str, recipe: str | Path, overrides: Sequence[str], out: str | Path | None, resume: bool
) -> Path:
    config = load_recipe(recipe, overrides).config
    name = next((n for n, stage in config.stage.items() if stage.algorithm == algorithm), None)
    if name is None:
        raise ConfigError(
            f"recipe {str(recipe)!r} has no {algorithm} stage", hint="add a table [stage.NAME] with it"
        )
    name = round_name(name, config.stage[name].rounds)
    run = run_recipe(recipe, overrides, out=out, resume=resume, until=name)
    return run.model_dir(name, trains_policy=config.stage[name].trains_policy)


def _say_slow(activity: str) -> None:
    """What takes a while before the log is there, for whoever sits at the terminal."""
    from preftune.untrusted import printable

    on_terminal: Callable[[], bool] = getattr(sys.stderr, "isatty", lambda: False)  # None has none
    if is_main_process() and on_terminal():
        print(printable(f"{activity} ..."), file=sys.stderr)


def plan(recipe: str | Path, overrides: Sequence[str] = ()) -> list[str]:
    """What a run would take, in lines: rows that are really used, steps, time, memory, disk, from a few
    steps of every stage in a directory that is thrown away; and what its evaluation could find.
    """
    config = absolute(load_recipe(recipe, overrides).config)
    from preftune.runs.plan import check_kind

    _say_slow(f"reading {config.data.name}")
    dataset, base = checked_data(config, None)
    check_kind(config, dataset, stage_order(config.stage), compared=True)
    _can_be_measured(dataset)
    _say_slow("loading torch, then a few steps of every stage")
    from preftune.measure.planned import planned

    with handled():
        return list(planned(config, dataset, base, _say_slow))


def _forget_mirrored(mirror: Path, run: RunDir, config: RunConfig, console: "Console") -> None:
    """Remove what the mirror keeps of an earlier run."""
    from preftune.runs.mirror import Mirror

    earlier = Mirror(directory=mirror, run=run, say=console.line)
    earlier.forget([BASE, *config.stage], commits=True)


def _console(
    config: RunConfig, dataset: "Dataset", run: RunDir, stages: Sequence[str], removed: Sequence[Path]
) -> "Console":
    """What a run says goes to the terminal and to its log, beginning with what it is about to do and what was
    `removed` of an earlier run.
    """
    from preftune.runs.console import Console
    from preftune.runs.plan import show_plan
    from preftune.watch.command import panel

    log, quiet = run.log(run.next_attempt()), not is_main_process()
    console = Console(log=log, quiet=quiet, panel=panel(run, config, stages))
    show_plan(console, config, dataset, run, stages)
    if removed:
        names = ", ".join(str(path.relative_to(run.path)) for path in removed)
        console.line(f"removed of an earlier run: {names}")
    return console


def _check_judges(session: "Session", stages: Sequence[str]) -> None:
    """Audit reward models from elsewhere before a stage that asks them is trained. DataError for one that is
    not usable; what else was found is said.
    """
    from preftune.audit import audit_directory
    from preftune.runs.stages import is_finished

    unfinished = [name for name in stages if not is_finished(session.run, session.stage(name))]
    asking = [session.config.stage[name] for name in unfinished]
    judges = dict.fromkeys(stage.scored_by or stage.judge_directory for stage in asking)
    for judge in judges:
        if judge is None or not from_outside(judge):
            continue
        audit = audit_directory(Path(session.source(judge).path))
        lines = [f"{c['name']}: {c['found']}" for c in audit["checks"] if c["status"] in ("warning", "fault")]
        if audit["kind"] != "reward model" or audit["verdict"] == "not usable":
            why = audit["verdict"] if audit["kind"] != "policy" else "a policy, which has no number to give"
            raise DataError(
                f"reward_model = {judge}: {why}: " + "; ".join(lines),
                hint=f"preftune audit {session.source(judge).path} shows all checks",
            )
        for line in lines:
            session.console.line(f"{judge}: {line}")


def _can_be_measured(dataset: "Dataset") -> None:
    """A run ends in a comparison: without held-out rows it would fail after all the training."""
    for split in ("validation", "test"):
        if not getattr(dataset, split):
            raise DataError(
                f"the data is too small to hold out a {split} split ({len(dataset.train)} training pairs)",
                hint=f"give a file named {split}, or more prompts; `preftune train` needs neither",
            )


def _write_result(file: Path, result: dict[str, Any]) -> None:
    in_a_directory(str(file))
    write_result(file, result)
