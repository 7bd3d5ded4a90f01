"""`--restart`: what an earlier run wrote in a directory goes, and nothing else.

A run directory may be "." with other things in it, so that files are known by name and place: a folder that
holds a foreign file stays, with that file.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from preftune.records.run import TOKENS
from preftune.rundir import RunDir
from preftune.runs.stages import SIDE_FILE
from preftune.sums import read_sealed, recorded_sums, refuse_links

_OF_A_STAGE = (
    "stage.json",
    "metrics.jsonl",
    "ledger.jsonl",
    "nonfinite-step-*.json",
    "parts*/*.json",
    "replies.jsonl",
    "answers.jsonl",
    "live.json",
)
_POLICIES = ("base.json", "policy_*.json", "best_of_*.json")
_OF_AN_EVALUATION = (*_POLICIES, "reward_model*.json", "comparisons.jsonl")
_OF_PAIRS = ("*.json", "*_mistakes.jsonl", "comparisons.jsonl")
_FIGURES = ("training_*.svg", "reward_*.svg")


def remove_run(run: RunDir) -> list[Path]:
    """Remove what preftune wrote; returns it. To be called under the lock, which made sure that the
    directory is preftune's.
    """
    refuse_links(run)
    removed = []
    for path in _written_files(run):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        removed.append(path)
    for folder in sorted({path.parent for path in removed} - {run.path}, key=lambda p: -len(p.parts)):
        while folder != run.path:
            with contextlib.suppress(OSError):  # something of somebody else is in it, or it is gone
                folder.rmdir()
            folder = folder.parent
    return removed


def _written_files(run: RunDir) -> Iterator[Path]:
    """Files of a run that are there, and models and checkpoints as directories."""
    names = _recorded(run)
    for path in sorted([*run.stages.glob("*"), *run.stages.glob("*/member-*")]):
        for kind in ("step-*", ".tmp-*", "corrupt"):
            yield from sorted(path.glob(f"checkpoints/{kind}"))
        for pattern in _OF_A_STAGE:
            yield from sorted(path.glob(pattern))
        name = path.relative_to(run.stages)
        yield from sorted((run.path / "tensorboard" / name).glob("events.out.tfevents.*"))
    candidates = [*run.models.glob("*"), *run.collections.glob("*")]
    yield from sorted(folder for folder in candidates if (folder / SIDE_FILE).is_file())
    for pattern in _OF_AN_EVALUATION:
        yield from sorted(run.evaluations.glob(pattern))
    for record in run.pairs_records():
        for pattern in _OF_PAIRS:
            yield from sorted(record.parent.glob(pattern))
    for pattern in _FIGURES:
        yield from sorted(file for file in run.figures.glob(pattern) if not names or file in names)
    yield from sorted(file for file in run.analysis_details.glob("*.md") if file in names)
    yield from (path for path in sorted(run.aside.glob("*")) if path.is_dir() or path.name == "request.json")
    yield from sorted(run.logs.glob("attempt-[0-9]*.log"))
    files = (run.config, run.run, run.origins, run.data, run.analysis_text, run.report_page, run.mistakes)
    files += (run.report_record, run.analysis_details / TOKENS, *run.samples_files().values())
    yield from (file for file in files if file.is_file())


def _recorded(run: RunDir) -> set[Path]:
    """The files of the last report."""
    with contextlib.suppress(Exception):
        return {run.path / name for name in recorded_sums(read_sealed(run.report_record)) or ()}
    return set()
