"""Finished seeds that outlive the machine which ran them: their numbers alone, without models and texts.

A study of hours is made in pieces, on whatever machine there is. `keep` copies what a seed measured into a
directory that can be committed; `kept_file` takes it from there, if it is of the same design and data.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from preftune.config import config_hash
from preftune.data import Dataset
from preftune.errors import DataError
from preftune.rundir import RunDir, read_object, write_json
from preftune.runs.sources import dataset_of, with_stage_data
from preftune.study.design import VERSION, Design
from preftune.study.places import facts_file
from preftune.sums import check, read_sealed, sum_of, sums, write_sealed

RECORD = "seed.json"
_TEXTS = "samples"  # of a policy's file


def keep(out: Path, directory: Path, design: Design, seed: int) -> None:
    """Copy a finished seed's numbers to `directory`/seed-N; what is there of the same design stays."""
    if kept_file(directory, design, seed) is not None:
        return
    copy = RunDir(directory / f"seed-{seed}")
    copy.path.mkdir(parents=True, exist_ok=True)
    source = facts_file(out, seed)
    record = read_sealed(source)
    key = _key(design, seed, record.get("content_sha256"))
    files = [file for file in source.parent.glob("*.json") if file.name != RECORD]
    for file in files:
        values = read_object(file)
        write_json(copy.path / file.name, {k: v for k, v in values.items() if k != _TEXTS})
    checksums = sums(copy, [copy.path / file.name for file in files])
    write_sealed(copy.path / RECORD, {**record, "key": key, "files": checksums})


def kept_file(directory: Path, design: Design, seed: int) -> Path | None:
    """Where the seed.json of a kept seed lies; None if there is none. DataError if it is of another design or
    of other data, or if a file is not as it was written.
    """
    file = directory / f"seed-{seed}" / RECORD
    record = read_sealed(file)
    if not record:
        return None
    if record.get("key") != _key(design, seed):
        hint = "keep seeds of this study in another directory, or give the settings and data of those seeds"
        raise DataError(f"{file} is of another design, or of other data", hint)
    run = RunDir(file.parent)
    check(run, record, f"remove {run.path} and run the same command: it makes that seed again")
    return file


def kept_files(directory: Path, design: Design) -> Iterator[Path]:
    """The seed.json of every kept seed of this design, of whatever data."""
    for file in sorted(directory.glob(f"seed-*/{RECORD}")):
        record = read_sealed(file)
        seed, content = record.get("seed"), record.get("content_sha256")
        if type(seed) is int and content and record.get("key") == _key(design, seed, content):
            yield file


def contents(dataset: Dataset) -> dict[str, Any]:
    """Hashes of what every split holds, and of what stages learn from besides."""
    of_stages = [data.report["content_sha256"] for data in dataset.others.values()]
    return dataset.report["content_sha256"] | ({"others": of_stages} if of_stages else {})


def _key(design: Design, seed: int, content: Any = None) -> str:
    """What a kept seed is known by, wherever the data lie: settings, and `content`, by default that of the
    data as they are now.
    """
    config = design.for_seed(seed)
    if content is None:
        content = contents(with_stage_data(config, dataset_of(config.data, seed), {}))
    return sum_of(
        {
            "version": VERSION,
            "pairs": design.fresh_pairs,
            "replies": design.replies,
            "settings": config_hash(config.wherever()),
            "content": content,
        }
    )
