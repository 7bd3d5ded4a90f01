"""verify-resume: is a stage that was killed again and again the one that nobody stopped, bit for bit?"""

import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from preftune.config import RunConfig, load_recipe, stage_order, stages_until
from preftune.errors import PreftuneError
from preftune.faults import KILL
from preftune.rundir import RunDir, read_json
from preftune.runs.stages import Stage
from preftune.verify.attempts import Lives, different, outcome

_IN_STEP = ("step:kill", "forward:kill", "update:kill", "updated:kill")
_IN_ROLLOUT = ("rollout.token:kill", "rollout.token,hit=4:kill", "rewards:kill", "update,hit=2:kill")
_IN_COLLECTING = ("step", "rollout.token")
_IN_CHECKPOINT = tuple(
    f"checkpoint.{place}" for place in ("open:kill", "file:tear", "manifest:kill", "rename:kill")
)
_PARTS = ("weights", "optimizer", "model", "metrics", "rows")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What became of one stage: `parts` is what it has, `differs` names those that are not identical."""

    stage: str
    steps: int
    kills: Sequence[str]
    parts: Sequence[str]
    differs: Sequence[str]

    def of(self, part: str) -> str:
        """A part in a word."""
        return "DIFFERS" if part in self.differs else "identical" if part in self.parts else "-"


def verify_resume(
    recipe: str,
    stage: str | None,
    overrides: Sequence[str],
    *,
    kills: int,
    seed: int,
    say: Callable[[str], None],
) -> list[Verdict]:
    """Train every stage (or one) twice in a temporary directory: in one go, and killed `kills` times.

    The directory is left for inspection if something differs. PreftuneError if a stage fails by itself.
    """
    config = load_recipe(recipe, overrides).config
    order = stage_order(config.stage)
    compared = order if stage is None else [stage]
    needed = order if stage is None else stages_until(config.stage, stage)
    directory = Path(tempfile.mkdtemp(prefix="preftune-verify-"))
    trial = _Trial(recipe, list(overrides), config, directory, Lives(), random.Random(seed))
    verdicts = []
    for name in needed:
        if name in compared:
            verdicts.append(trial.stage(name, kills))
            say(f"{name}: {len(verdicts[-1].kills)} kills, {_words(verdicts[-1])}")
        else:
            trial.train(name, trial.unbroken)
    if any(verdict.differs for verdict in verdicts):
        say(f"both runs are in {directory}")
    else:
        shutil.rmtree(directory)
    return verdicts


def table(verdicts: Sequence[Verdict]) -> str:
    """One line a stage."""
    lines = [f"{'stage':<12} {'steps':>5} {'kills':>5}  " + "  ".join(f"{key:<9}" for key in _PARTS)]
    for verdict in verdicts:
        words = "  ".join(f"{verdict.of(key):<9}" for key in _PARTS)
        lines.append(f"{verdict.stage:<12} {verdict.steps:>5} {len(verdict.kills):>5}  {words}")
    return "\n".join(lines)


def random_fault(rng: random.Random, step: int, steps: int, every: int, online: bool) -> str:
    """A place to die at or, in a checkpoint, after step `step`: "update@step=3:kill"."""
    saved = min(-(-step // every) * every, steps)
    kind, points = rng.choice(
        [(step, (*_IN_STEP, *(_IN_ROLLOUT if online else ()))), (saved, _IN_CHECKPOINT)]
    )
    name, _, action = rng.choice(points).partition(":")
    name, _, hit = name.partition(",")
    return f"{name}@step={kind}{',' if hit else ''}{hit}:{action}"


def fault_step(fault: str) -> int:
    """The step that a fault names."""
    return int(fault.partition("@step=")[2].partition(":")[0].partition(",")[0])


@dataclass(frozen=True, slots=True)
class _Trial:
    recipe: str
    overrides: list[str]
    config: RunConfig
    directory: Path
    lives: Lives
    rng: random.Random

    @property
    def unbroken(self) -> RunDir:
        return RunDir(self.directory / "whole")

    def stage(self, name: str, kills: int) -> Verdict:
        """Both ways from the same parents."""
        pieces = RunDir(self.directory / f"killed-{name}")
        self.train(name, self.unbroken)
        shutil.copytree(self.unbroken.path, pieces.path)
        trained = Stage(name=name, algorithm=self.config.stage[name].algorithm, parents=(), inputs={})
        for directory in (pieces.stage_dir(name), trained.model_dir(pieces)):
            shutil.rmtree(directory)
        steps = int(read_json(self.unbroken.stage_json(name))["steps"])
        died = [fault for fault in self._faults(name, steps, kills) if self.train(name, pieces, fault) != 0]
        self.train(name, pieces)
        unbroken, killed = (outcome(run, name) for run in (self.unbroken, pieces))
        differs = different(unbroken, killed)
        return Verdict(stage=name, steps=steps, kills=died, parts=list(unbroken), differs=differs)

    def train(self, name: str, run: RunDir, fault: str = "") -> int:
        """One life. PreftuneError if it ends in another way than it should."""
        log = self.directory / "log.txt"
        words = ["train", self.recipe, name, *self.overrides, "--out", str(run.path)]
        code = self.lives.run(words, log, fault)
        if code != 0 and not (fault and abs(code) == KILL):  # Windows has no minus
            tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").strip().split("\n")[-4:])
            raise PreftuneError(f"stage {name} ended with code {code}:\n{tail}", f"all output is in {log}")
        return code

    def _faults(self, name: str, steps: int, kills: int) -> list[str]:
        """At rising steps, so that each is reached by the life after the one before it."""
        online = self.config.stage[name].online
        faults: list[str] = []
        for step in sorted(self.rng.sample(range(1, steps + 1), min(kills, steps))):
            fault = random_fault(self.rng, step, steps, self.config.checkpoint.every, online)
            if self.config.stage[name].makes == "data":  # without updates and checkpoints
                fault = f"{self.rng.choice(_IN_COLLECTING)}@step={step}:kill"
            if not faults or fault_step(fault) > fault_step(faults[-1]):
                faults.append(fault)
        return faults


def _words(verdict: Verdict) -> str:
    return f"{', '.join(verdict.differs)} differ" if verdict.differs else "identical"
