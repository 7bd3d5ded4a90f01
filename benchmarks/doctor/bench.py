"""How often the doctor finds a planted fault, and how often it complains of a healthy run.

    python benchmarks/doctor/bench.py [--work DIR] [--set reported|thresholds] [--seeds N] [--healthy N]

Every fault is planted in a real run on the built-in world, by settings or by a patch of one function; the
runs of a seed share one base, SFT policy and reward model (`--from`). A fault is found if the doctor names
its kind at the stage or policy where it was planted; a healthy run raises a false alarm if the doctor names
anything. Seeds from 100 on are for setting thresholds, those from 0 on are reported. Runs lie in DIR
(runs/doctor); what is finished is not done again, but judged anew. What has run so far is in
benchmarks/results/doctor/SET.json, which is written after every run.
"""

import argparse
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent))

from preftune import api, report
from preftune.algorithms import on_policy
from preftune.errors import PreftuneError
from preftune.evaluation.stats import wilson
from preftune.report.doctor.base import Finding
from preftune.report.doctor.diagnose import PATHOLOGIES, diagnose
from preftune.report.load import load_run
from preftune.rundir import RunDir, read_jsonl, write_json, write_jsonl
from preftune.version import __version__
from preftune.world.dataset import make_world

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "doctor", ROOT / "docs" / "doctor.md"
BEGIN, END = "<!-- made by benchmarks/doctor/bench.py -->", "<!-- end -->"
FIRST = {"reported": 0, "thresholds": 100}
COMMON = (
    "model.scratch.steps=160", "data.pairs=1200", "stage.sft.rows=960", "stage.rm.rows=1200",
    "stage.ppo=none", "stage.grpo=none", "stage.dpo=none", "checkpoint.every=1000",
    "evaluation.prompts=32", "evaluation.max_new_tokens=32", "evaluation.batch_size=32", "evaluation.pool=4",
    "evaluation.resamples=500",
)  # fmt: skip
# What an online stage and a DPO stage have unless a fault says otherwise.
ONLINE = {"steps": 10, "batch_size": 32, "microbatch_size": 32, "max_new_tokens": 32, "learning_rate": 3e-4}
PPO = {
    "algorithm": "ppo",
    **ONLINE,
    "minibatches": 2,
    "epochs": 2,
    "critic_learning_rate": 1e-3,
    "kl_coef": 0.2,
}
GRPO = {"algorithm": "grpo", **ONLINE, "group_size": 4, "kl_coef": 0.5, "scale": "none"}
DPO = {"algorithm": "dpo", "rows": 960, "microbatch_size": 32, "learning_rate": 3e-4}
ALONE = {"reward_model": "none", "missing_eos_score": "none"}  # the function is the reward
UNBOUND = {**PPO, "steps": 12, "learning_rate": 2e-3, "kl_coef": 0.0, "missing_eos_score": "none"}
HARD = {**PPO, **ALONE, "steps": 12, "learning_rate": 3e-3, "kl_coef": 0.0}
Settings = dict[str, Any]
FORMER = {  # what kinds were called in results of before
    "reward is explained by length": "score is explained by length",
    "reward outside what the reward model saw": "score outside what the reward model saw",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A kind of finding, and the stage in which it is planted. `patched`: see PATCHES."""

    kind: str
    stage: str
    settings: Settings
    patched: str = ""


TRAINING = (
    Fault(kind="numbers that are not finite", stage="nan", settings=PPO, patched="nan"),
    Fault(kind="first ratio not 1", stage="ratio", settings=PPO, patched="ratio"),
    Fault(kind="learning rate too high", stage="fast", settings={**PPO, "learning_rate": 3e-2}),
    Fault(kind="learning rate without effect", stage="slow", settings={**DPO, "learning_rate": 1e-9}),
    Fault(kind="ends are falling", stage="endless",
          settings={**PPO, "missing_eos_score": 8.0, "steps": 18, "learning_rate": 3e-3, "kl_coef": 0.0}),
    Fault(kind="replies are cut off", stage="cut", settings={**GRPO, "max_new_tokens": 4}),
    Fault(kind="length runs away", stage="long", settings={**HARD, "reward_functions": "faulty:longer"}),
    Fault(kind="entropy collapses", stage="narrow",
          settings={**HARD, "steps": 30, "reward_functions": "faulty:one_word"}),
    Fault(kind="groups without variance", stage="same",
          settings={**GRPO, **ALONE, "reward_functions": "faulty:equal"}),
    Fault(kind="critic explains nothing", stage="critic", settings={**PPO, "critic_learning_rate": 1e-9}),
    Fault(kind="chosen log-probability falls", stage="down",
          settings={**DPO, "learning_rate": 2e-3, "beta": 0.02}),
    Fault(kind="replies without a reward", stage="silent",
          settings={**GRPO, **ALONE, "batch_size": 64, "reward_functions": "faulty:failing",
                    "on_reward_error": "mask"}),
)  # fmt: skip
# Runs that are evaluated: each its own reward model, or several policies of one.
POLICIES = (
    Fault(kind="score outside what the reward model saw", stage="outside",
          settings={**UNBOUND, "steps": 100, "learning_rate": 1e-3}),
    Fault(kind="KL beyond budget", stage="far",
          settings={**HARD, "steps": 20, "reward_functions": "faulty:longer"}),
    Fault(kind="diversity collapses", stage="alike",
          settings={**HARD, "steps": 30, "reward_functions": "faulty:one_word"}),
    Fault(kind="repetition", stage="again", settings={**HARD, "reward_functions": "faulty:repeats"}),
    Fault(kind="broken replies", stage="empty", settings={**HARD, "reward_functions": "faulty:shorter"}),
)  # fmt: skip
JUDGES = {
    "chance": (Fault(kind="reward model at chance", stage="reward model", settings={"data": "random"}),),
    "heart": (Fault(kind="reward model learnt its pairs by heart", stage="rm",
                    settings={"rows": 40, "epochs": 60, "data": "random"}),),
    "length": (
        Fault(kind="score is explained by length", stage="reward model", settings={"data": "longer"}),
        Fault(kind="over-optimisation", stage="over",
              settings=UNBOUND),
    ),
}  # fmt: skip
# What healthy runs change of quickstart, whose settings were not chosen with the doctor in mind.
RATES = {"ppo": 5e-4, "grpo": 5e-4, "dpo": 1e-4}
HEALTHY: tuple[tuple[str, ...], ...] = (
    (),
    tuple(f"stage.{name}.learning_rate={0.6 * rate}" for name, rate in RATES.items()),
    ("stage.ppo.kl_coef=0.4", "stage.grpo.kl_coef=1.0"),
)


@contextmanager
def nan() -> Iterator[None]:
    with patch.dict(os.environ, {"PREFTUNE_FAULT": "loss@step=3:nan"}):
        yield


@contextmanager
def ratio() -> Iterator[None]:
    """The old log-probabilities are 1 % off, as if another kernel had made them."""
    real = on_policy.collect

    def off(*given: Any, **named: Any) -> Any:
        rollout = real(*given, **named)
        return replace(rollout, logprobs=rollout.logprobs * 1.01)

    with patch.object(on_policy, "collect", off):
        yield


PATCHES: dict[str, Callable[[], AbstractContextManager]] = {"": nullcontext, "nan": nan, "ratio": ratio}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Where runs lie, and which seeds."""

    work: Path
    first: int

    def parents(self, seed: int) -> Path:
        out = self.work / f"{seed}-parents"
        self.train(seed, out, (), "rm")
        return out

    def train(self, seed: int, out: Path, words: tuple[str, ...], until: str | None) -> str:
        """A faulty run, or its stages up to one."""
        return run("tiny", seed, out, (*COMMON, *words), until, self.work / f"{seed}-parents")

    def training(self, seed: int) -> dict[str, Any]:
        """Every fault of training in a stage of its own; nothing is evaluated."""
        self.parents(seed)
        out, words = self.work / f"{seed}-training", stages({f.stage: f.settings for f in TRAINING})
        ended = {}
        for fault in TRAINING:
            with PATCHES[fault.patched]():
                if failed := self.train(seed, out, words, fault.stage):
                    ended[fault.stage] = failed
        return outcome(out, TRAINING) | {"ended": ended}

    def policies(self, seed: int) -> dict[str, Any]:
        self.parents(seed)
        out = self.work / f"{seed}-policies"
        failed = self.train(seed, out, stages({f.stage: f.settings for f in POLICIES}), None)
        return outcome(out, POLICIES) | {"ended": failed}

    def judges(self, seed: int) -> dict[str, Any]:
        found: dict[str, Any] = {"planted": {}, "others": [], "ended": {}}
        self.parents(seed)
        for name, faults in JUDGES.items():
            out = self.work / f"{seed}-{name}"
            settings = dict(faults[0].settings)
            settings["data"] = str(self.labels(seed, str(settings["data"])))
            policies = {fault.stage: fault.settings for fault in faults[1:]} or {"dpo": DPO}
            words = stages({"rm": settings, **policies})
            if failed := self.train(seed, out, words, None):
                found["ended"][name] = failed
            each = outcome(out, faults)
            found["planted"] |= each["planted"]
            found["others"] += each["others"]
        return found

    def healthy(self, number: int) -> dict[str, Any]:
        """Three runs of quickstart a seed; the first gives the others base, SFT and reward model."""
        seed, change = self.first + number // len(HEALTHY), number % len(HEALTHY)
        first, out = (self.work / f"{seed}-quickstart-{each}" for each in (0, change))
        failed = run("quickstart", seed, out, HEALTHY[change], None, first)
        return {"alarms": [[f.kind, f.where, f.evidence] for f in findings(out)], "ended": failed}

    def labels(self, seed: int, order: str) -> Path:
        """The world's pairs with another order: "random", or the longer reply first."""
        file = self.work / f"{seed}-{order}.jsonl"
        if not file.exists():
            rng, rows = random.Random(seed), []
            for pair in make_world(seed, 1200, 1, 1).train:
                sides = [pair.chosen, pair.rejected]
                rng.shuffle(sides)
                if order == "longer":
                    sides.sort(key=len, reverse=True)
                rows.append({"prompt": pair.prompt.transcript(), "chosen": sides[0], "rejected": sides[1]})
            write_jsonl(file, rows)
        return file


def run(recipe: str, seed: int, out: Path, words: tuple[str, ...], until: str | None, origin: Path) -> str:
    """What went wrong, if anything did: a fault may end a stage. Equal stages of `origin` are taken over."""
    try:
        taken = None if out == origin else str(origin)
        api.run_recipe(recipe, (f"seed={seed}", *words), out=str(out), until=until, from_run=taken)
    except PreftuneError as error:
        return f"{type(error).__name__}: {error.message}"[:300]
    return ""


def stages(settings: dict[str, Settings]) -> tuple[str, ...]:
    """Stages as words of a command line."""
    return tuple(
        f"stage.{name}.{key}={value}" for name, own in settings.items() for key, value in own.items()
    )


def findings(out: Path) -> tuple[Finding, ...]:
    return diagnose(load_run(RunDir(out))) if (out / "config.toml").is_file() else ()


def outcome(out: Path, faults: tuple[Fault, ...]) -> dict[str, Any]:
    """Which planted faults are found where they are, and what else is found. A stage that has not run yet
    counts for nothing.
    """
    symptoms = findings(out)
    ran = [f for f in faults if f.stage == "reward model" or RunDir(out).metrics(f.stage).is_file()]
    planted = {
        f.kind: [each.evidence for each in symptoms if each.kind == f.kind and each.where in places(out, f)]
        for f in ran
    }
    others = [[e.kind, e.where, e.evidence] for e in symptoms if e.kind not in planted]
    return {"planted": planted, "others": others}


def places(out: Path, fault: Fault) -> tuple[str, str]:
    """What a finding may call the place of a fault: its stage, or the policy that the stage made ("PPO")."""
    return fault.stage, load_run(RunDir(out)).label(f"policy_{fault.stage}")


def summary(runs: dict[str, dict]) -> dict[str, Any]:
    """Recall by kind and false alarms, each with Wilson's interval."""
    kinds: dict[str, list[bool]] = {}
    for run in runs.values():
        for kind, evidence in run.get("planted", {}).items():
            kinds.setdefault(kind, []).append(bool(evidence))
    healthy = [bool(run["alarms"]) for run in runs.values() if "alarms" in run]

    def share(hits: list[bool]) -> dict[str, Any]:
        return {"found": sum(hits), "n": len(hits), "interval": list(wilson(sum(hits), len(hits)))}

    recall = {kind: share(hits) for kind, hits in sorted(kinds.items())}
    return {"recall": recall, "false_alarms": share(healthy), "kinds": len(PATHOLOGIES)}


def table(found: dict[str, Any]) -> str:
    """The summary as docs/doctor.md shows it."""

    def cells(share: dict) -> str:
        low, high = (100 * end for end in share["interval"])
        return f"{share['found']} of {share['n']} | {low:.0f} to {high:.0f} %"

    lines = ["| planted | found | Wilson 95 % |", "|---|---|---|"]
    recall = found["recall"].items()
    lines += [f"| {FORMER.get(kind, kind)} | {cells(share)} |" for kind, share in recall]
    alarms = found["false_alarms"]
    if alarms["n"]:
        lines.append(f"| nothing (healthy runs): any alarm | {cells(alarms)} |")
    return "\n".join(lines)


def write_page(found: dict[str, Any]) -> None:
    """Into docs/doctor.md, between its two marks."""
    before, begin, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    PAGE.write_text(f"{before}{begin}\n{table(found)}\n{end}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("runs/doctor"))
    parser.add_argument("--set", choices=FIRST, default="reported")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--healthy", type=int, default=30)
    parser.add_argument("--parts", default="training,policies,judges,healthy")
    given = parser.parse_args()
    bench = Bench(work=given.work.resolve(), first=FIRST[given.set])
    file, target = bench.work / f"{given.set}.jsonl", RESULTS / f"{given.set}.json"
    runs = {row["name"]: row["run"] for row in read_jsonl(file)} if file.is_file() else {}
    jobs = [
        (f"{part}-{seed}", getattr(bench, part), seed)
        for seed in range(bench.first, bench.first + given.seeds)
        for part in ("training", "policies", "judges")
        if part in given.parts
    ]
    jobs += [(f"healthy-{n}", bench.healthy, n) for n in range(given.healthy) if "healthy" in given.parts]
    with patch.object(report, "is_current", lambda run: True):  # no report is read here
        for name, job, number in jobs:
            if name in runs:  # run before: judged again, by the thresholds of now
                print(f"== {name}: judged again", flush=True)
            runs[name] = job(number)
            print(f"== {name}: {json.dumps(runs[name])}", flush=True)
            write_jsonl(file, [{"name": key, "run": run} for key, run in runs.items()])
            write_json(target, {"version": __version__, "set": given.set, **summary(runs), "runs": runs})
    if given.set == "reported":
        write_page(summary(runs))


if __name__ == "__main__":
    main()
