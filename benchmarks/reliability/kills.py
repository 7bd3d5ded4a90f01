"""SIGKILL at 100 random places of five kinds of stages, then 15 times in one: is anything different after?

Half of the lives end at a named place (in a step, a rollout, between inner epochs, while a checkpoint or the
model is written), the others at a random moment of the stage, sent from outside.
"""

import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from faultlab import EVERY, STAGES, Lab, consumed, seeded, write_result

from preftune.rundir import RunDir, read_jsonl
from preftune.training.checkpoint import newest_step
from preftune.verify.attempts import different, outcome
from preftune.verify.resume import fault_step, random_fault

STEPS = {"sft": 6, "rm": 6, "dpo": 6, "ppo": 5, "grpo": 5}
SECOND_EPOCH = {"ppo": 3, "grpo": 2}  # the update that begins it
ONLINE = tuple(SECOND_EPOCH)
PER_STAGE = 20


def named_faults(stage: str, rng: random.Random) -> dict[str, list[str]]:
    """Faults by kind of place."""
    steps, middle = STEPS[stage], rng.randint(2, STEPS[stage])
    saved = [step for step in range(1, steps + 1) if step % EVERY == 0 or step == steps]

    def at(place: str, hit: int = 1, step: int | None = None, action: str = "kill") -> str:
        return f"{place}@step={step or rng.randint(1, steps)},hit={hit}:{action}"

    save = rng.choice(saved)
    kinds = {
        "step": [at("step"), at("forward", 2), at("update"), at("updated", step=middle)],
        "checkpoint": [
            at("checkpoint.open", step=save),
            at("checkpoint.file", rng.randint(1, 2), rng.choice(saved), "tear"),
            at("checkpoint.manifest", step=rng.choice(saved)),
            at("checkpoint.rename", step=rng.choice(saved)),
            at("checkpoint.renamed", step=rng.choice(saved)),
            at("checkpoint.purge", step=steps),
        ],
        "model": [
            at("model.weights", step=steps),
            at("model.rename", step=steps),
            at("model.renamed", step=steps),
        ],
    }
    if stage in ONLINE:
        kinds["rollout"] = [at("rollout.token"), at("rollout.token", rng.randint(2, 6)), at("rewards")]
        kinds["inner epochs"] = [at("update", SECOND_EPOCH[stage]), at("updated", SECOND_EPOCH[stage])]
    return kinds


def plan(stage: str) -> list[tuple[str, str]]:
    """Twenty (kind, fault); an empty fault is a random moment."""
    rng = seeded(f"kills/{stage}")
    chosen = [("moment", "")] * (PER_STAGE // 2)
    kinds = named_faults(stage, rng)
    names = [name for name in kinds for _ in range(2 if name == "checkpoint" else 1)]
    while len(chosen) < PER_STAGE:
        kind = names[len(chosen) % len(names)]
        kinds = named_faults(stage, rng)
        chosen.append((kind, rng.choice(kinds[kind])))
    return chosen


def one_kill(
    lab: Lab, stage: str, kind: str, fault: str, seconds: float, rng: random.Random
) -> dict[str, Any]:
    """Kill a life of the stage, look at what it left, finish it, compare."""
    run = RunDir(lab.fresh(stage, lab.place / f"killed-{stage}"))
    code = -1
    for _ in range(5):  # a moment may fall behind the end
        if fault:
            code = lab.run(stage, run.path, fault)
        else:
            code = lab.signalled(stage, run.path, signal.SIGKILL, rng.uniform(0, seconds))[0]
        if code == -signal.SIGKILL:
            break
        lab.fresh(stage, run.path)
    metrics = run.metrics(stage)
    done = read_jsonl(metrics)[-1]["step"] if metrics.is_file() and read_jsonl(metrics) else 0
    kept = newest_step(run.checkpoints(stage))
    finished = run.model_dir(stage, trains_policy=stage != "rm").is_dir()
    lab.finish(stage, run.path)
    rows = consumed(run, stage)
    return {
        "stage": stage,
        "kind": kind,
        "fault": fault or "at a random moment",
        "killed": code == -signal.SIGKILL,
        "steps_done": done,
        "lost": 0 if finished else done - kept,
        "differs": lab.differs(stage, run.path),
        "skipped_or_doubled": abs(len(consumed(lab.whole(stage), stage)) - len(rows))
        + len(rows)
        - len(set(rows)),
        "left_behind": [str(p.relative_to(run.path)) for p in run.path.rglob("*tmp-*")],
    }


def many_in_one(lab: Lab, kills: int) -> dict[str, Any]:
    """One PPO stage of more steps, killed again and again."""
    steps, rng = kills + 3, seeded("kills/many")
    more = [f"stage.ppo.steps={steps}"]
    whole, run = (
        RunDir(lab.fresh("ppo", lab.place / "whole-long")),
        RunDir(lab.fresh("ppo", lab.place / "long")),
    )
    code = lab.lives.run([*lab.words("ppo", whole.path), *more], lab.log)
    faults: list[str] = []
    for step in range(1, steps + 1):
        fault = random_fault(rng, step, steps, EVERY, online=True)
        if len(faults) < kills and (not faults or fault_step(fault) > fault_step(faults[-1])):
            faults.append(fault)
    codes = [lab.lives.run([*lab.words("ppo", run.path), *more], lab.log, fault) for fault in faults]
    while len(codes) < kills:  # places in checkpoints skip steps: the rest come in the last one
        fault = f"rollout.token@step={steps},hit={len(codes) + 1 - len(faults)}:kill"
        codes.append(lab.lives.run([*lab.words("ppo", run.path), *more], lab.log, fault))
    code = code or lab.lives.run([*lab.words("ppo", run.path), *more], lab.log)
    differs = different(outcome(whole, "ppo"), outcome(run, "ppo"))
    return {
        "steps": steps,
        "kills": sum(c == -signal.SIGKILL for c in codes),
        "code": code,
        "differs": differs,
    }


def main(per_stage: int = PER_STAGE) -> None:
    """All of them; or a divisor of 20 a stage, spread over the same kinds, kept apart in kills_few.json."""
    with tempfile.TemporaryDirectory(prefix="preftune-kills-") as place:
        lab = Lab(Path(place))
        lab.prepare()
        began, found = time.monotonic(), []
        for stage in STAGES:
            rng = seeded(f"kills/moments/{stage}")
            seconds = lab.signalled(stage, lab.fresh(stage, lab.place / "timed"), 0, 0)[1]
            for kind, fault in plan(stage)[:: PER_STAGE // per_stage]:
                found.append(one_kill(lab, stage, kind, fault, seconds, rng))
                print(time.strftime("%H:%M:%S"), len(found), found[-1], flush=True)
        many = many_in_one(lab, 15)
        seconds = time.monotonic() - began
    same = [k for k in found if k["killed"] and not k["differs"]]
    write_result(
        "kills" if per_stage == PER_STAGE else "kills_few",
        {
            "kills": sum(k["killed"] for k in found),
            "identical": len(same),
            "by_stage": {s: sum(k["stage"] == s for k in same) for s in STAGES},
            "by_kind": {
                kind: sum(k["kind"] == kind for k in same) for kind in sorted({k["kind"] for k in found})
            },
            "interval": EVERY,
            "most_steps_lost": max(k["lost"] for k in found),
            "lost_beyond_interval": sum(max(k["lost"] - EVERY, 0) for k in found),
            "rows_skipped_or_doubled": sum(k["skipped_or_doubled"] for k in found),
            "left_behind": sum(len(k["left_behind"]) for k in found),
            "many_in_one": many,
            "seconds": seconds,
            "each": found,
        },
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
