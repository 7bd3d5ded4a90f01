"""The pipeline as Python functions: a whole run, its five stages, evaluation and samples of a finished
run.
"""

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from preftune import report
from preftune.config import (
    GRPOConfig,
    PPOConfig,
    RunConfig,
    dump_toml,
    load_recipe,
    stage_order,
    stages_until,
)
from preftune.data import Dialogue, Turn
from preftune.data.dataset import SPLIT_NAMES
from preftune.errors import ConfigError, InputMissing, UsageError
from preftune.models.load import load_causal_lm
from preftune.models.roles import Policy
from preftune.pipeline.console import Console
from preftune.pipeline.evaluate import distinct, evaluate_run
from preftune.pipeline.provenance import describe
from preftune.pipeline.session import Session
from preftune.pipeline.train import run_stage
from preftune.rollout.sample import ended
from preftune.rollout.sample import sample as draw
from preftune.rundir import BASE, RunDir, write_json, write_text
from preftune.seeding import derive_seed
from preftune.training.learner import effective_precision

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
    session = _open(load_recipe(recipe, overrides).config, out, resume)
    stages = stage_order(session.config.stage)
    if until is not None:
        stages = stages_until(session.config.stage, until)
    _show_plan(session, stages)
    if session.config.model.base == "scratch":
        run_stage(session, session.stage(BASE))
    for name in stages:
        run_stage(session, session.stage(name))
    if until is None:
        changed = evaluate_run(session, stages)
        _report(session, rebuild=changed)
    return session.run


def evaluate(path: str | Path) -> RunDir:
    """Evaluate the finished stages of a run and write its report."""
    session = _reopen(path)
    finished = [n for n in stage_order(session.config.stage) if session.source(n).exists()]
    if not finished:
        raise InputMissing(
            f"no stage of {path} is finished", hint="preftune run RECIPE --out DIR trains them"
        )
    evaluate_run(session, finished)
    _report(session, rebuild=True)
    return session.run


def sample(
    path: str | Path, policy: str = "sft", prompts: Sequence[str] = (), seed: int = 0, n: int = 5
) -> Iterator[dict[str, Any]]:
    """Replies of a run's policy ("base" or a stage) to given prompts, or to `n` held-out ones."""
    session = _reopen(path)
    name = policy.removeprefix("policy_")
    if name != BASE and name not in session.config.stage:
        raise UsageError(f"no policy {policy!r}", hint=f"one of: base, {', '.join(session.config.stage)}")
    source = session.source(name)
    if not source.exists():
        raise InputMissing(
            f"{name} is not trained yet in {path}", hint="preftune train RECIPE STAGE trains it"
        )
    dialogues = [Dialogue((Turn("human", f" {text.strip()}"),)) for text in prompts]
    dialogues = dialogues or [row.prompt for row in distinct(session.dataset.test, n)]
    settings = session.config.evaluation
    encoder = session.encoder(source, settings.max_new_tokens)
    model = Policy(load_causal_lm(source))
    for i, dialogue in enumerate(dialogues):
        batch = encoder.prompts([dialogue], [derive_seed(seed, "sample", i)])
        out = draw(
            model,
            batch,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            eos_id=encoder.eos_id,
        )
        ids = out.ids[0][out.response[0]].tolist()
        closed = bool(ended(out, encoder.eos_id)[0])
        yield {"prompt": dialogue.transcript(), "response": encoder.decode(ids), "ended": closed}


def _train(algorithm: str, recipe: str, overrides: Sequence[str], out: str | None, resume: bool) -> Path:
    config = load_recipe(recipe, overrides).config
    name = next((n for n, stage in config.stage.items() if stage.algorithm == algorithm), None)
    if name is None:
        raise ConfigError(
            f"recipe {recipe!r} has no {algorithm} stage", hint="add one: [stage.NAME] algorithm = ..."
        )
    done = run_recipe(recipe, overrides, out=out, resume=resume, until=name)
    return done.model_dir(name, algorithm)


def _open(config: RunConfig, out: str | None, resume: bool) -> Session:
    """The run directory with its frozen config and provenance."""
    run = RunDir(Path(out) if out is not None else Path("runs") / config.name)
    if not resume:
        _remove_run(run)
    session = Session(config=config, run=run, console=Console())
    session.save_data_record()  # input is checked before anything else is written or trained
    write_text(run.config, dump_toml(config))
    write_json(run.run, describe(config.seed))
    if effective_precision(config.precision) != config.precision:
        session.console.line(f"precision {config.precision} needs a GPU; this run uses float32")
    return session


def _reopen(path: str | Path) -> Session:
    run = RunDir(Path(path))
    if not run.config.is_file():
        raise InputMissing(
            f"{path} is not a run directory: it has no config.toml", hint="give the directory of a run"
        )
    return Session(config=load_recipe(str(run.config)).config, run=run, console=Console())


def _remove_run(run: RunDir) -> None:
    """Only what preftune writes: a run directory may be "." with other things in it."""
    for part in ("models", "samples", "analysis", "stages", "evaluation", "figures", "logs"):
        shutil.rmtree(run.path / part, ignore_errors=True)
    for file in (run.config, run.run, run.data, run.analysis_text, run.report_page):
        file.unlink(missing_ok=True)


def _show_plan(session: Session, stages: Sequence[str]) -> None:
    config, dataset = session.config, session.dataset
    counts = (f"{len(getattr(dataset, split)):,} {split}" for split in SPLIT_NAMES)
    session.console.line(f"data: {', '.join(counts)} pairs")
    rows = []
    if config.model.scratch is not None:
        s = config.model.scratch
        rows.append(
            (
                BASE,
                "pretraining",
                f"GPT-2 {s.layers} x {s.width} from scratch, {s.steps} x {s.batch_size} documents",
            )
        )
    for name in stages:
        stage = config.stage[name]
        if isinstance(stage, PPOConfig | GRPOConfig):
            parts = f"from {stage.init} and {stage.reward_model}"
            what = f"{parts}: {stage.steps} steps of {stage.batch_size} replies"
        else:
            n = min(len(dataset.train), stage.rows or len(dataset.train))
            steps = math.ceil(n * stage.epochs / stage.batch_size)
            what = f"from {stage.init}: {n:,} rows, {steps} steps of {stage.batch_size}"
        rows.append((name, stage.algorithm, what))
    session.console.plan(config.name, str(session.run.path), rows)


def _report(session: Session, rebuild: bool) -> None:
    run = session.run
    if rebuild or not run.analysis_text.exists():
        report.build(run)
    table = report.comparison_table(report.load_run(run))
    session.console.table(table.headers, table.rows)
    accuracy = (
        json.loads(run.reward_evaluation.read_text(encoding="utf-8"))
        if run.reward_evaluation.exists()
        else None
    )
    if accuracy:
        value, (low, high), n = (accuracy["accuracy"][k] for k in ("value", "interval", "n"))
        session.console.line(
            f"reward model: accuracy {value:.3f} [{low:.3f}, {high:.3f}] on {n} validation pairs"
        )
    session.console.line(f"analysis: {run.analysis_text}")
    session.console.line(f"report:   {run.report_page}")
    session.console.line(f"models:   {run.models}")
