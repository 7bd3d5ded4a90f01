"""What the reliability measurements and tests/faults share: small stages, made once, and lives to end."""

import contextlib
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from preftune import __version__
from preftune.rundir import RunDir, write_json, write_jsonl
from preftune.verify.attempts import Lives, different, outcome
from preftune.world.dataset import make_world

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "reliability"
STAGES = {"rm": "reward", "sft": "sft", "ppo": "ppo", "grpo": "grpo", "dpo": "dpo"}
EVERY = 2  # steps between checkpoints
_ONLINE = ("batch_size=8", "microbatch_size=4", "minibatches=1", "epochs=2", "steps=5", "max_new_tokens=8")
# `tiny`, made smaller still: five or six steps a stage, each of two microbatches (times two epochs).
SHRUNK = [
    "model.scratch.steps=8",
    "model.scratch.layers=1",
    "model.scratch.width=16",
    "model.scratch.vocab_size=500",
    "model.scratch.batch_size=8",
    *(f"stage.{name}.{setting}" for name in ("ppo", "grpo") for setting in _ONLINE),
    *(
        f"stage.{name}.{setting}"
        for name in ("sft", "rm", "dpo")
        for setting in ("rows=48", "batch_size=8", "microbatch_size=4")
    ),
    f"checkpoint.every={EVERY}",
]
_PRELOAD = [
    *("transformers.models.gpt2.modeling_gpt2", "transformers.models.auto.modeling_auto", "accelerate"),
    *("preftune.measure.write_up", "preftune.report"),
]


@dataclass
class Lab:
    """A place with the parents of every stage trained, and each stage once without trouble."""

    place: Path
    lives: Lives = field(default_factory=lambda: Lives(_PRELOAD))

    @property
    def log(self) -> Path:
        return self.place / "log.txt"

    @property
    def parents(self) -> RunDir:
        """SFT and reward model, finished."""
        return RunDir(self.place / "parents")

    def words(self, stage: str, run: Path) -> list[str]:
        """The command that trains one stage of the shrunk recipe."""
        return ["train", "tiny", stage, *SHRUNK, f"data.name={self.place / 'data'}", "--out", str(run)]

    def prepare(self, stages: tuple[str, ...] = tuple(STAGES)) -> None:
        """Train what is missing, every stage in a directory of its own."""
        if not (self.place / "data").exists():
            write_data(self.place / "data")
        if not self.parents.stage_json("rm").exists():
            self.finish("rm", self.parents.path)
        for stage in stages:
            if not self.whole(stage).path.exists():
                self.finish(stage, self.fresh(stage, self.whole(stage).path))

    def whole(self, stage: str) -> RunDir:
        """The stage, trained in one go: for SFT and reward model where the others have them from."""
        return self.parents if stage in ("sft", "rm") else RunDir(self.place / f"whole-{stage}")

    def fresh(self, stage: str, path: Path) -> Path:
        """A run directory with the stage's parents finished and the stage not begun."""
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.parents.path, path)
        for name in {"rm": ("rm",), "sft": ("sft", "rm")}.get(stage, ()):
            run = RunDir(path)
            shutil.rmtree(run.stage_dir(name), ignore_errors=True)
            shutil.rmtree(run.model_dir(name, trains_policy=name != "rm"), ignore_errors=True)
        return path

    def start(self, stage: str, path: Path, fault: str = "") -> BaseProcess:
        return self.lives.start(self.words(stage, path), self.log, fault)

    def run(self, stage: str, path: Path, fault: str = "") -> int:
        """The exit code of one life."""
        return self.lives.run(self.words(stage, path), self.log, fault)

    def finish(self, stage: str, path: Path) -> float:
        """A life that must succeed; its seconds."""
        began = time.monotonic()
        code = self.run(stage, path)
        if code != 0:
            raise SystemExit(f"{stage} ended with {code}:\n{self.log.read_text(errors='replace')[-2000:]}")
        return time.monotonic() - began

    def signalled(self, stage: str, path: Path, number: int, delay: float) -> tuple[int, float]:
        """A life that gets a signal (0: none) `delay` seconds after its stage began: its exit code, and the
        seconds from then to its end.
        """
        life, file = self.start(stage, path), RunDir(path).stage_json(stage)
        while not file.exists() and life.is_alive():
            time.sleep(0.002)
        life.join(delay)
        sent = time.monotonic()
        if life.is_alive() and life.pid is not None:
            with contextlib.suppress(ProcessLookupError):  # it ended in this very moment
                os.kill(life.pid, number)
        life.join()
        return (life.exitcode if life.exitcode is not None else 1), time.monotonic() - sent

    def differs(self, stage: str, path: Path) -> list[str]:
        """The parts in which the stage in `path` is not the one trained in one go."""
        return different(*(outcome(run, stage) for run in (self.whole(stage), RunDir(path))))


def write_data(directory: Path) -> None:
    """A few pairs of the built-in world as files: to read them takes less time than to make the world."""
    made = make_world(seed=0, pairs=80, validation=4, test=4)
    for split in ("train", "validation", "test"):
        rows = [
            {
                "chosen": pair.prompt.transcript() + pair.chosen,
                "rejected": pair.prompt.transcript() + pair.rejected,
            }
            for pair in getattr(made, split)
        ]
        write_jsonl(directory / f"{split}.jsonl", rows)


def consumed(run: RunDir, stage: str) -> list[str]:
    """Every data row that the stage consumed, in order."""
    lines = run.ledger(stage).read_text(encoding="utf-8").splitlines()
    return [row for line in lines for row in json.loads(line)["rows"]]


def write_result(name: str, result: Mapping[str, Any]) -> None:
    """benchmarks/results/reliability/<name>.json, with where and with what it was measured."""
    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    versions = {"preftune": __version__, "torch": torch.__version__}
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    record = {**result, "command": f"python benchmarks/reliability/{' '.join(words)}", "commit": commit()}
    write_json(RESULTS / f"{name}.json", {**record, "machine": {**machine, **versions}})
    print(json.dumps(record, indent=1)[:2000])


def commit() -> str:
    """Of the sources that were measured, with a + if files of theirs differ from it."""
    said = []
    for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "src"]):
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
        said.append(done.stdout.strip())
    return said[0] + "+" * bool(said[1]) or "unknown"


def seeded(name: str) -> random.Random:
    """Random choices that are the same in every repetition."""
    return random.Random(f"reliability/{name}")


def percentile(values: list[float], share: float) -> float:
    """The nearest-rank percentile."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]
