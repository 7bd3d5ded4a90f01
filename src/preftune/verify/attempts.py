"""Commands that may be killed, each in a process forked from one that has imported torch already, or, where
nothing forks (Windows), in one that imports it anew.
"""

import gc
import multiprocessing
import os
import runpy
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from preftune import faults
from preftune.hashing import sha256_file
from preftune.rundir import RunDir, read_json, read_jsonl
from preftune.runs.stages import Stage

TIMES = frozenset({"time", "step_seconds", "sampling_seconds"})  # of metrics: what two runs may differ in


class Lives:
    """Starts `preftune WORDS...` quickly, with a fault in it if wanted. Only one is needed in a process."""

    def __init__(self, preload: Sequence[str] = ()) -> None:
        forks = "forkserver" in multiprocessing.get_all_start_methods()
        get = multiprocessing.get_context
        self._context = get("forkserver") if forks else get("spawn")
        if forks:
            self._context.set_forkserver_preload(["preftune.cli", "preftune.runs.runner", *preload])

    def start(self, words: Sequence[str], log: Path, fault: str = "") -> BaseProcess:
        """A process that runs the command; its output is appended to `log`."""
        process = self._context.Process(target=_command, args=(list(words), str(log), fault))
        process.start()
        return process

    def run(self, words: Sequence[str], log: Path, fault: str = "") -> int:
        """Run the command to its end: the exit code, or minus the number of the signal that killed it."""
        process = self.start(words, log, fault)
        process.join()
        code = process.exitcode
        assert code is not None
        return code


def _command(words: list[str], log: str, fault: str) -> None:
    gc.freeze()  # what was imported before the fork is not looked at, and stays shared
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ[faults.VARIABLE] = fault
    sys.argv = ["preftune", *words]
    runpy.run_module("preftune", run_name="__main__", alter_sys=True)


def outcome(run: RunDir, stage: str) -> dict[str, Any]:
    """What a finished stage came to: everything but its times. Of one that makes data, `model` is these."""
    record = read_json(run.stage_json(stage))
    finished = Stage(name=stage, algorithm=record["algorithm"], parents=(), inputs={})
    model, state = finished.model_dir(run), record.get("state_sha256", {})
    moments = {name: digest for name, digest in state.items() if name.endswith("-optimizer.safetensors")}
    weights = {name: state[name] for name in state.keys() - moments.keys()}
    return {
        **({"weights": weights, "optimizer": moments} if finished.makes_model else {}),
        "model": {
            file.relative_to(model).as_posix(): sha256_file(file)
            for file in model.rglob("*")
            if file.is_file() and file.name != "README.md"
        },
        "metrics": [
            {name: number for name, number in row.items() if name not in TIMES}
            for row in read_jsonl(run.metrics(stage))
        ],
        "rows": read_jsonl(run.ledger(stage)),
    }


def different(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """The parts of two outcomes that are not equal, or that say nothing because they are empty."""
    return [key for key in a if a[key] != b[key] or not a[key]]
