"""Preference data from the Hugging Face hub: one commit's files in the local cache, read like any others."""

import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from preftune.data.files import NOT_READ, SUFFIXES, chosen_files, is_data, is_unread, read_files, readme_text
from preftune.data.readme import README, refuse_both
from preftune.data.rows import Tally
from preftune.data.snapshot import Snapshot, resolve, warn
from preftune.data.splits import Chosen, named_files
from preftune.errors import InputMissing

if TYPE_CHECKING:
    from preftune.config.run import DataConfig

ALTERNATIVES = (
    "give local files: data.name=PATH (a directory, .jsonl, .jsonl.gz or .parquet file); "
    'or run the recipe quickstart (recipe="quickstart"), which needs no download'
)


def read_hub(
    config: "DataConfig", commit: str | None = None, foreign: bool = False
) -> tuple[list[Tally], str]:
    """Read every split of a hub data set such as Anthropic/hh-rlhf, and the commit that was read: `commit`
    if one is given. A file's folder is the source of its pairs; of all files those are read that the
    configuration `config.config` of its README.md names, or its default one. `foreign` as in `read_files`.

    Raises InputMissing, within a few seconds where there is no network, if it can be had neither from the
    hub nor from the cache.
    """
    name = str(config.name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise InputMissing(f"{name}: no such path here, and no hub id (owner/name)", ALTERNATIVES)
    refuse_both(config.config, config.data_dir)
    try:
        snapshot = resolve(name, "dataset", commit, ALTERNATIVES)
    except InputMissing as error:
        error.message = f"{name}: no such path here, and {error.message}"
        raise
    chosen = _files_to_read(snapshot, config.data_dir, config.config, foreign)
    if snapshot.partial:
        count = f"only the {len(snapshot.files)} files that are in the cache"
        chosen.notes.append(f"{name}: {count} could be looked at: the list of all has never been fetched")
        warn(chosen.notes[-1])
    root = Path(snapshot.name)
    files = {file.relative_to(root).as_posix(): split for file, split in chosen.files}
    path = snapshot.fetch(files)
    chosen.files = [(path / file, split) for file, split in files.items()]
    tallies = read_files(path, config.on_bad_row, chosen, config.columns.named_columns(), foreign)
    for tally in tallies:
        tally.name = f"{name}/{Path(tally.name).relative_to(path).as_posix()}"
    return tallies, snapshot.commit


def _files_to_read(snapshot: Snapshot, data_dir: str | None, config: str | None, foreign: bool) -> Chosen:
    """The files of the data set, or of one of its folders, that are read here; by the rule of local ones."""
    folder = PurePosixPath(data_dir or "")
    inside = [file for file in map(PurePosixPath, snapshot.files) if file.is_relative_to(folder)]
    place = f"{snapshot.name}{f' (data_dir={data_dir})' if data_dir else ''}"
    if not inside:
        folders = sorted({file.split("/")[0] for file in snapshot.files if "/" in file})
        raise InputMissing(
            f"{place}: no such folder in this data set", f"it has: {', '.join(folders[:12]) or 'no folders'}"
        )
    read = [file for file in inside if _is_data(file)]
    if not read:
        names = ", ".join(sorted(str(file) for file in inside)[:6])
        raise InputMissing(
            f"{place}: holds no file of a kind that is read here ({', '.join(SUFFIXES)}), but {names}",
            ALTERNATIVES,
        )
    root = Path(snapshot.name)
    readme = "" if data_dir else _readme(snapshot)
    chosen = chosen_files(root / folder, [root / file for file in read], readme, config, foreign)
    chosen.notes += named_files([file for file in inside if is_unread(file.name)], NOT_READ)
    return chosen


def _readme(snapshot: Snapshot) -> str:
    """The README's text; "" if there is none, "" with a warning if it cannot be fetched."""
    if README not in snapshot.files:
        return ""
    try:
        return readme_text(snapshot.fetch([README]) / README)
    except InputMissing as error:
        warn(f"{error.message}; going on by the names of the files")
        return ""


def _is_data(file: PurePosixPath) -> bool:
    return is_data(file.name) and not any(name.startswith(".") for name in file.parts)
