"""Data files on this machine, alone or in a directory: which are read, as which split, and their rows."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from preftune.data import readers
from preftune.data.readme import LONGEST, README, layout
from preftune.data.rows import OnBadRow, Tally
from preftune.data.splits import Chosen, choose, named_files, named_split
from preftune.errors import DataError, InputMissing, PermissionMissing

READERS = {
    ".jsonl": readers.json_rows,
    ".json": readers.json_rows,
    ".csv": readers.table_rows,
    ".tsv": readers.table_rows,
    ".parquet": readers.parquet_rows,
    ".arrow": readers.arrow_rows,
    ".feather": readers.arrow_rows,
}
READERS |= {f"{suffix}.gz": READERS[suffix] for suffix in (".jsonl", ".json", ".csv", ".tsv")}
SUFFIXES = tuple(READERS)
WANTED = "give a .jsonl, .json, .csv, .tsv, .parquet or .arrow file, or a directory that holds some"
# What `datasets` and model directories keep beside their data.
NO_DATA = {*("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")}
# Packed or kept in ways that are not read here: there may be rows in such files.
UNREAD = (
    *(".gz", ".tgz", ".zst", ".xz", ".bz2", ".lz4", ".zip", ".7z", ".tar", ".ndjson", ".jsonlines"),
    *(".xlsx", ".xls", ".avro", ".orc", ".db", ".sqlite"),
)
NOT_READ = "not read: kinds of files that are not read here, or links to folders; name a folder by itself"
RED_TEAM = "red-team-attempts"  # of the public HH data: transcripts without a preference


def read_files(
    root: Path,
    on_bad_row: OnBadRow = "error",
    chosen: Chosen | None = None,
    columns: Mapping[str, str] | None = None,
    foreign: bool = False,
) -> list[Tally]:
    """Read one file or, recursively, a directory of them, in the order of their paths; or those that were
    `chosen` of it. `columns`: known name to the files' (data.columns); of `foreign`
    files, where they are there.

    Raises InputMissing for what cannot be opened and DataError, naming file and line, for what cannot be
    read. The `notes` of the first tally name what was skipped.
    """
    chosen = chosen or local_files(root)
    tallies = []
    for path, split in chosen.files:
        tally = Tally(
            name=str(path),
            split=split,
            source=_source(root, path),
            on_bad_row=on_bad_row,
            columns=columns or {},
            foreign=foreign,
        )
        _read_file(path, tally)
        tallies.append(tally)
    tallies[0].notes += chosen.notes
    return tallies


def local_files(root: Path, config: str | None = None, foreign: bool = False) -> Chosen:
    """The files under `root` that are read: those that its README.md declares, else by their names. A file
    named by itself is the whole data set, to be split. `foreign`: `config` is another data set's, and may be
    missing here.
    """
    paths = find_files(root)
    if paths == [root]:
        unused = f"{root.name}: data.config = {config} is not used: a folder's README.md declares such"
        return Chosen([(root, "train")], [unused] if config is not None and not foreign else [])
    chosen = chosen_files(root, paths, readme_text(root / README), config, foreign)
    chosen.notes += _notes(root)
    return chosen


def readme_text(file: Path) -> str:
    """The beginning of a README.md; "" where there is none."""
    if not file.is_file():
        return ""
    with _readable(file), open(file, encoding="utf-8", errors="replace") as readme:
        return readme.read(LONGEST)


def chosen_files(
    root: Path, paths: Sequence[Path], readme: str = "", config: str | None = None, foreign: bool = False
) -> Chosen:
    """Those of `paths`, which need not be there yet, that are read, with their splits."""
    paths = sorted(paths)
    if (declared := layout(readme, config, foreign)) is not None:
        named = declared.split_names([path.relative_to(root).as_posix() for path in paths])
        if not named:
            raise DataError(f"{root}: no file that can be read is in the folder that README.md names", WANTED)
        names = {root / file: split for file, split in named.items() if split is not None}
        return choose(root, sorted(root / file for file in named), SUFFIXES, names or None)
    red = [path for path in paths if RED_TEAM in (root.name, *path.relative_to(root).parts)]
    preferences = [path for path in paths if path not in red]
    if not preferences:
        raise DataError(f"{root}: only {RED_TEAM}, which holds no preferences", WANTED)
    chosen = choose(root, preferences, SUFFIXES)
    if red:
        chosen.notes.append(f"{RED_TEAM}: not read: it holds no preferences")
    return chosen


def find_files(root: Path) -> list[Path]:
    """The readable files under `root` (or `root` itself), sorted; hidden ones and links to directories are
    passed by, and in a directory of `save_to_disk` all that it does not list itself.
    """
    if root.is_file():
        if not root.name.lower().endswith(SUFFIXES):
            raise DataError(f"{root}: not a kind of file that is read here", WANTED)
        return [root]
    if not root.is_dir():
        raise InputMissing(f"{root}: no such file or directory", WANTED)
    files = []
    for folder, folders, names in os.walk(root, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        listed = _saved_to_disk(Path(folder)) if "state.json" in names else names
        paths = (Path(folder, name) for name in listed if is_data(name) and not name.startswith("."))
        files += [path for path in paths if path.is_file()]
    if not files:
        but = "".join(f"; {note}" for note in _notes(root))
        raise DataError(f"{root}: no preference files in this directory{but}", WANTED)
    return sorted(files)


def _notes(root: Path) -> list[str]:
    """What to say of what is passed by."""
    return named_files([path.relative_to(root) for path in _passed_by(root)], NOT_READ)


def _passed_by(root: Path) -> list[Path]:
    """Files that may hold rows but are not read (see `UNREAD`), and links to folders."""
    skipped = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        skipped += [path for name in folders if (path := Path(folder, name)).is_symlink()]
        if "state.json" not in names:
            skipped += [Path(folder, name) for name in names if is_unread(name)]
    return sorted(skipped)


def is_unread(name: str) -> bool:
    """Whether a file of this name may hold rows that cannot be read here."""
    return name.lower().endswith(UNREAD) and not is_data(name) and not name.startswith(".")


def _refuse(error: OSError) -> None:
    with _readable(Path(error.filename)):
        raise error


def is_data(name: str) -> bool:
    """Whether a file of this name is one that is read here."""
    return name.lower().endswith(SUFFIXES) and name not in NO_DATA


def _saved_to_disk(folder: Path) -> list[str]:
    """The files of a saved `datasets.Dataset`; a cache of it may lie beside them."""
    try:
        files = json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]
        return [Path(str(file["filename"])).name for file in files]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return sorted(os.listdir(folder))


def _source(root: Path, path: Path) -> str:
    """The folders that a file lies in, as far as they do not say its split."""
    folders: Sequence[str] = () if path == root else path.parent.relative_to(root).parts
    return "/".join(name for name in folders if named_split(name) is None)


def _read_file(path: Path, tally: Tally) -> None:
    suffix = max((s for s in SUFFIXES if path.name.lower().endswith(s)), key=len)
    with _readable(path), open(path, "rb") as file:
        tally.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        tally.size = file.tell()
        file.seek(0)
        for where, row in READERS[suffix](file, path, tally):
            tally.take(row, where)
    if not tally.read:
        raise DataError(f"{path}: the file is empty", "remove it, or put rows into it")
    tally.finish()


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What the system says about a file, as errors for people."""
    try:
        yield
    except PermissionError:
        raise PermissionMissing(f"{path}: cannot be read: permission denied") from None
    except OSError as error:
        raise InputMissing(f"{path}: cannot be read: {error.strerror or error}") from None
