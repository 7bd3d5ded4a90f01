"""The pipeline as Python functions: a run, its five stages, evaluation and samples of what is finished.

Configuration, data and the base model's whereabouts are checked here, before torch is loaded: whoever made a
mistake learns of it at once.
"""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preftune.config import RunConfig, load_recipe, stage_order, stages_until
from preftune.data import Dataset, load_dataset
from preftune.errors import ConfigError, DataError, InputMissing
from preftune.models.locate import locate
from preftune.pipeline.console import Console
from preftune.pipeline.lock import held, is_main_process
from preftune.pipeline.plan import show_plan
from preftune.pipeline.stages import SIDE_FILE
from preftune.rundir import RunDir

if TYPE_CHECKING:
    from preftune.pipeline.session import Session

DEFAULT_RECIPE = "hh-colab"


def run(recipe: str = DEFAULT_RECIPE, *overrides: str, out: str | None = None, resume: bool = True) -> RunDir:
    """Run a recipe through all stages, evaluate, and write the report. A second call resumes or does nothing.

    `overrides` are "key=value" strings; `out` is the run directory (runs/<name> by default; "." puts models/,
    samples/ and analysis/ right here). `resume=False` removes what an earlier run left there.
    """
    return run_recipe(recipe, overrides, out=out, resume=resume)


def train_reward_model(
    recipe: str = DEFAULT_RECIPE, *overrides: str, out: str | None = None, resume: bool = True
) -> Path:
    """Train the reward model (and the stages it starts from); returns the model's directory."""
    return _train("reward", recipe, overrides, out, resume)


def supervised_finetune(
    recipe: str = DEFAULT_RECIPE, *overrides: str, out: str | None = None, resume: bool = True
) -> Path:
    """Fine-tune on chosen responses; returns the model's directory."""
    return _train("sft", recipe, overrides, out, resume)


def ppo_train(
    recipe: str = DEFAULT_RECIPE, *overrides: str, out: str | None = None, resume: bool = True
) -> Path:
    """Train a policy with PPO, missing parents first; returns the model's directory."""
    return _train("ppo", recipe, overrides, out, resume)


def grpo_train(
    recipe: str = DEFAULT_RECIPE, *overrides: str, out: str | None = None, resume: bool = True
) -> Path:
    """Train a policy with GRPO, missing parents first; returns the model's directory."""
    return _train("grpo", recipe, overrides, out, resume)


def dpo_train(
    recipe: str = DEFAULT_RECIPE, *overrides: str, out: str | None = None, resume: bool = True
) -> Path:
    """Train a policy with DPO, missing parents first; returns the model's directory."""
    return _train("dpo", recipe, overrides, out, resume)


def run_recipe(
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    out: str | None = None,
    resume: bool = True,
    until: str | None = None,
) -> RunDir:
    """What the command line calls: all stages and the report, or the stages up to `until` only."""
    config = _absolute(load_recipe(recipe, overrides).config)
    stages = stage_order(config.stage) if until is None else stages_until(config.stage, until)
    dataset = _checked(config)
    if until is None:
        _can_be_measured(dataset)
    run = RunDir(Path(out) if out is not None else Path("runs") / config.name)
    with held(run):
        if not resume and is_main_process():
            _remove_run(run)
        console = Console(log=run.log(run.next_attempt()), quiet=not is_main_process())
        show_plan(console, config, dataset, run, stages)
        from preftune.pipeline import runner

        session = runner.open_session(config, dataset, run, console)
        runner.train_stages(session, stages)
        if until is None and is_main_process():
            runner.measure(session, stages)
    return run


def evaluate(path: str | Path) -> RunDir:
    """Evaluate the finished stages of a run and write its report."""
    from preftune.pipeline import runner

    session = _reopen(path)
    finished = [name for name in stage_order(session.config.stage) if session.is_trained(name)]
    if not finished:
        raise InputMissing(f"no stage of {path} is finished", hint="preftune run RECIPE trains them")
    with held(session.run):
        runner.measure(session, finished)
    return session.run


def sample(
    path: str | Path, policy: str = "sft", prompts: Sequence[str] = (), seed: int = 0, n: int = 5
) -> Iterator[dict[str, Any]]:
    """Replies of a run's policy ("base" or a stage) to given prompts, or to `n` held-out ones."""
    from preftune.pipeline.samples import replies

    yield from replies(_reopen(path), policy.removeprefix("policy_"), prompts, seed, n)


def _train(algorithm: str, recipe: str, overrides: Sequence[str], out: str | None, resume: bool) -> Path:
    config = load_recipe(recipe, overrides).config
    name = next((n for n, stage in config.stage.items() if stage.algorithm == algorithm), None)
    if name is None:
        raise ConfigError(
            f"recipe {recipe!r} has no {algorithm} stage", hint="add a table [stage.NAME] with it"
        )
    done = run_recipe(recipe, overrides, out=out, resume=resume, until=name)
    return done.model_dir(name, algorithm)


def _checked(config: RunConfig) -> Dataset:
    """The data of a run, once it is clear that the base model can be had too."""
    dataset = load_dataset(config.data, config.seed)
    if config.model.base != "scratch":
        locate(config.model.base)
    return dataset


def _can_be_measured(dataset: Dataset) -> None:
    """A run ends in a comparison: without held-out rows it would fail after all the training."""
    for split in ("validation", "test"):
        if not getattr(dataset, split):
            raise DataError(
                f"the data is too small to hold out a {split} split ({len(dataset.train)} training pairs)",
                hint=f"give a file named {split}, or more prompts; `preftune train` needs neither",
            )


def _reopen(path: str | Path) -> "Session":
    run = RunDir(Path(path))
    if not run.config.is_file():
        raise InputMissing(
            f"{path} is not a run directory: no config.toml", hint="give the directory of a run"
        )
    config = load_recipe(str(run.config)).config
    dataset = _checked(config)
    from preftune.pipeline import runner

    return runner.open_session(config, dataset, run, Console())


def _remove_run(run: RunDir) -> None:
    """Only what preftune wrote: a run directory may be "." with other things in it."""
    if not run.config.is_file():
        return
    for folder in ("stages", "evaluation", "figures", "logs"):
        shutil.rmtree(run.path / folder, ignore_errors=True)
    for model in run.models.glob("*"):
        if (model / SIDE_FILE).is_file():
            shutil.rmtree(model)
    files = (run.config, run.run, run.data, run.analysis_text, run.report_page, run.mistakes)
    for file in (*files, *run.samples_files().values()):
        file.unlink(missing_ok=True)


def _absolute(config: RunConfig) -> RunConfig:
    """Local paths in full, so that a run can be looked at from anywhere."""

    def full(name: str | None) -> str | None:
        return str(Path(name).expanduser().resolve()) if name and Path(name).expanduser().exists() else name

    data = config.data.model_copy(
        update={"name": full(config.data.name)} if config.data.name != "world" else {}
    )
    special = config.model.base in ("scratch", "smollm2")
    model = config.model.model_copy(update={} if special else {"base": full(config.model.base)})
    return config.model_copy(update={"data": data, "model": model})
