"""`preftune study`: design, seeds side by side, then the numbers of all of them."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from preftune.config import load_recipe
from preftune.errors import PreftuneError, UsageError
from preftune.records.base import read_record
from preftune.records.run import DataRecord
from preftune.rundir import RunDir, read_json, write_json, write_text
from preftune.runs.console import Console
from preftune.runs.inputs import absolute, check_reward_functions
from preftune.runs.lock import held
from preftune.runs.sources import load_dataset
from preftune.stops import PATIENCE, handled
from preftune.study.design import (
    FRESH_PAIRS,
    REPLIES,
    Design,
    Wanted,
    load_design,
    make_design,
    save_design,
)
from preftune.study.kept import keep as put_by
from preftune.study.kept import kept
from preftune.study.seed import facts_file, finished, run_seed, seed_dir

_POLL = 0.5  # seconds between looks at the seeds' processes
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def run_study(
    wanted: Wanted,
    out: Path,
    *,
    seeds: int,
    first_seed: int = 0,
    jobs: int = 1,
    reports: bool = True,
    keep: Path | None = None,
) -> Path:
    """Run what is missing of every seed, then write study.json, STUDY.md and figures; returns study.json.

    A finished seed is not run again, nor one whose numbers lie in `keep`, where those of the others are put.
    With `jobs` > 1 seeds run in processes of one thread each; a model of the built-in world gains nothing
    from a second thread. Raises UsageError or ConfigError for what cannot be studied, and PreftuneError if a
    seed fails, after the others have ended.
    """
    if min(seeds, jobs, wanted.fresh_pairs, wanted.replies) < 1 or first_seed < 0:
        raise UsageError("--seeds, --jobs, --pairs, --replies must be 1 or more, --first-seed 0 or more")
    if any(text.partition("=")[0].strip() == "seed" for text in wanted.overrides):
        raise UsageError("a study sets the seeds itself", hint="use --first-seed and --seeds")
    console, numbers = Console(), [first_seed + i for i in range(seeds)]
    out.mkdir(parents=True, exist_ok=True)
    with handled(), held(RunDir(out)):
        design = _design(wanted, out)
        places = {seed: place for seed in numbers if keep and (place := kept(keep, design, seed))}
        waiting = [seed for seed in numbers if seed not in places and not finished(out, design, seed)]
        for seed in numbers:
            if seed not in waiting:
                console.line(f"seed {seed} finished before")
        _run(out, waiting, jobs, reports, console)
        if keep:
            for seed in (seed for seed in numbers if seed not in places):
                put_by(out, keep, design, seed)
        places = {seed: places.get(seed, facts_file(out, seed)) for seed in numbers}
        _write(out, design, places, _command(wanted, numbers, out, reports, keep))
    console.line(f"study: {out / 'STUDY.md'}")
    return out / "study.json"


def _design(wanted: Wanted, out: Path) -> Design:
    """The design on disk if it is of the same request, else a new one."""
    config = absolute(load_recipe(wanted.recipe, wanted.overrides).config)
    asked = {
        "recipe_config": config.model_dump(mode="json"),
        "tokens": wanted.tokens,
        "sweep": wanted.sweep,
        "fresh_pairs": wanted.fresh_pairs,
        "replies": wanted.replies,
    }
    request = out / "request.json"
    if request.is_file() and read_json(request) == asked:
        return load_design(out)
    check_reward_functions(config)
    dataset = load_dataset(config.data, config.seed)
    from preftune.runs.lengths import mean_lengths

    design = make_design(wanted, config, dataset, mean_lengths(config, dataset))
    save_design(design, out)
    write_json(request, asked)
    return design


@dataclass(slots=True, kw_only=True)
class _Child:
    seed: int
    process: subprocess.Popen[bytes]
    log: Path
    file: IO[bytes]
    began: float


def _run(out: Path, seeds: Sequence[int], jobs: int, reports: bool, console: Console) -> None:
    if jobs == 1 or len(seeds) == 1:
        for seed in seeds:
            console.line(f"seed {seed}")
            run_seed(out, seed, reports)
        return
    waiting, running, failed = list(seeds), list[_Child](), list[_Child]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_start(out, waiting.pop(0), reports))
                console.line(f"seed {running[-1].seed} started, log {running[-1].log}")
            time.sleep(_POLL)
            for child in [c for c in running if c.process.poll() is not None]:
                running.remove(child)
                child.file.close()
                took = time.monotonic() - child.began
                if child.process.returncode == 0:
                    console.line(f"seed {child.seed} finished in {took:.0f} s")
                else:
                    failed.append(child)
                    console.line(f"seed {child.seed} FAILED with code {child.process.returncode}")
    finally:
        for child in running:  # an interrupt: the seeds resume with the next call
            child.process.terminate()
        for child in running:
            try:
                child.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
            child.file.close()
    if failed:
        raise _failure(failed[0], len(failed), len(seeds))


def _failure(child: _Child, failed: int, seeds: int) -> PreftuneError:
    """What the first failing seed complained of, with its exit code."""
    lines = child.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    said = lines[starts[-1] :][:3] if starts else lines[-1:]
    error = PreftuneError(
        f"{failed} of {seeds} seeds failed; seed {child.seed}: " + "\n".join(said).removeprefix("error: "),
        hint=f"see {child.log}; the same command runs the failed seeds again",
    )
    error.code = child.process.returncode if child.process.returncode > 0 else error.code
    return error


def _start(out: Path, seed: int, reports: bool) -> _Child:
    log = seed_dir(out, seed) / "study" / "log.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    file = log.open("ab")
    command = [sys.executable, "-m", "preftune", "study-seed", str(out), str(seed), "--child"]
    command += [] if reports else ["--no-reports"]
    environment = {**os.environ, **dict.fromkeys(_THREADS, "1")}
    process = subprocess.Popen(  # noqa: S603
        # It reads its input until that ends, which the system sees to when this process does.
        command,
        stdin=subprocess.PIPE,
        stdout=file,
        stderr=subprocess.STDOUT,
        env=environment,
    )
    return _Child(seed=seed, process=process, log=log, file=file, began=time.monotonic())


def _write(out: Path, design: Design, places: Mapping[int, Path], command: str) -> None:
    """study.json, STUDY.md and figures/ from the finished seeds."""
    from preftune.study.figures import draw
    from preftune.study.page import study_text
    from preftune.study.pool import pool
    from preftune.study.sweep import sweep_records

    study = pool(places, design)
    sweeps = sweep_records(design, study)
    study["sweep"], study["more_sweeps"] = (sweeps[0], sweeps[1:]) if sweeps else (None, [])
    study["command"] = command
    study["seeds_wanted"] = list(places)
    data = RunDir(seed_dir(out, next(iter(places)))).data
    world = read_record(data, DataRecord).world if data.is_file() else {}  # of kept seeds there is no run
    study["world_sha256"] = world.get("world_sha256")
    for name, text in draw(study).items():
        write_text(out / "figures" / name, text)
    write_text(out / "STUDY.md", study_text(study))
    write_json(out / "study.json", study)


def _command(wanted: Wanted, seeds: Sequence[int], out: Path, reports: bool, keep: Path | None) -> str:
    """The command that makes this study, whatever earlier calls made parts of it."""
    words = ["preftune study", wanted.recipe, f"--seeds {len(seeds)}", f"--first-seed {seeds[0]}"]
    words += [] if wanted.tokens is None else [f"--tokens {wanted.tokens}"]
    words += [] if wanted.sweep is None else [f"--sweep {shlex.quote(wanted.sweep)}"]
    words += [] if wanted.fresh_pairs == FRESH_PAIRS else [f"--pairs {wanted.fresh_pairs}"]
    words += [] if wanted.replies == REPLIES else [f"--replies {wanted.replies}"]
    words += [] if reports else ["--no-reports"]
    words += [] if keep is None else [f"--keep {keep}"]
    return " ".join([*words, *wanted.overrides, f"out={out}"])
