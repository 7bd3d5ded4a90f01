"""One seed of a study: a full run directory, and what was measured beside it."""

import time
from pathlib import Path
from typing import Any

from preftune.config import stage_order
from preftune.records.study import SeedRecord
from preftune.rundir import RunDir
from preftune.runs.console import Console
from preftune.runs.inputs import check_reward_functions
from preftune.runs.lock import held
from preftune.runs.sources import load_dataset
from preftune.study.design import Design, load_design
from preftune.study.tokens import spent_tokens
from preftune.sums import check, read_sealed, sums, write_sealed


def seed_dir(out: Path, seed: int) -> Path:
    return out / f"seed-{seed}"


def facts_file(out: Path, seed: int) -> Path:
    """Written last: a seed that has it is finished."""
    return seed_dir(out, seed) / "study" / "seed.json"


def finished(out: Path, design: Design, seed: int) -> bool:
    """Whether this seed is done with just this design. DataError if a file of its numbers is not as it was
    written.
    """
    record, run = read_sealed(facts_file(out, seed)), RunDir(seed_dir(out, seed))
    if record.get("key") != design.key(seed):
        return False
    check(run, record, f"remove {run.path / 'study'} and run the same command: it measures that seed again")
    return True


def run_seed(out: Path, seed: int, reports: bool = True) -> None:
    """Train, evaluate and measure one seed; what exists is not made again."""
    design = load_design(out)
    if finished(out, design, seed):
        return
    config, began = design.for_seed(seed), time.monotonic()
    check_reward_functions(config)
    dataset = load_dataset(config.data, seed)
    run = RunDir(seed_dir(out, seed))
    with held(run):
        console = Console(log=run.log(run.next_attempt()))
        from preftune.measure.write_up import measure_and_report
        from preftune.runs import runner
        from preftune.study.measure import measure_seed

        session = runner.open_session(config, dataset, run, console)
        order = stage_order(config.stage)
        runner.train_stages(session, order)
        if reports:
            measure_and_report(session, [name for name in order if name in design.own])
        facts = measure_seed(session, design)
        tuned = [n for n, s in config.stage.items() if s.tunes]
        record: dict[str, Any] = {
            "seed": seed,
            "key": design.key(seed),
            "seconds": time.monotonic() - began,  # of the last attempt
            **facts,
            "tokens": {name: spent_tokens(run, name) for name in tuned},
        }
        SeedRecord.model_validate(record)
        numbers = [file for file in facts_file(out, seed).parent.glob("*.json") if file.name != "seed.json"]
        write_sealed(facts_file(out, seed), {**record, "files": sums(run, numbers)})
