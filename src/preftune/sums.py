"""What was written is what is read: size and SHA-256 of every file of a finished part, in that part's record.

A record (stage.json of a stage or of the evaluation, .preftune for the run's own files) lists `files` by
their path in the run directory and carries a sum of itself. Whoever reads such a file asks `check` first. A
directory from before sums were kept has none: it is read as it is, and `unverified` names its parts.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from preftune.errors import ConfigError, DataError
from preftune.hashing import sha256_file
from preftune.rundir import RunDir, plain, read_object, write_json

WRITTEN_FOLDERS = ("models", "stages", "evaluation", "samples", "analysis", "figures", "logs", "study")
WRITTEN_FOLDERS += ("labels", "collected", "chats", ".aside")
WRITTEN_FILES = ("config.toml", "run.json", "origins.json", "data.json", "ANALYSIS.md", "report.html")
CARD = "README.md"  # of a model: written again when it has been evaluated, so it is the evaluation's file
_OWN = "record_sha256"
_REMEDY = "restore it from a copy; or remove its directory and run the same command: it is made again"
_known: dict[tuple[str, int, int, int], str] = {}  # a file that did not change is read once a command


def refuse_links(run: RunDir) -> None:
    """ConfigError if a file or folder that preftune writes to in the directory is a link."""
    folders = [run.path / name for name in WRITTEN_FOLDERS]
    inside = [path for folder in folders if not folder.is_symlink() for path in folder.glob("*")]
    deeper = [path for path in run.path.glob("stages/*/*") if not path.parent.is_symlink()]
    files = [run.path / name for name in WRITTEN_FILES]
    marks = (run.lock, run.aside, run.marker, run.report_record)
    for path in (*files, *marks, *folders, *inside, *deeper):
        if path.is_symlink():
            raise ConfigError(
                f"{path} is a link: preftune writes and deletes nothing through one",
                hint="put what it points to in its place, or use another --out DIR",
            )


def sum_of(value: Any) -> str:
    """SHA-256 of what JSON holds of a value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(plain(value), sort_keys=True).encode()).hexdigest()


def write_sealed(file: Path, record: Mapping[str, Any]) -> None:
    """Write a record with its own sum."""
    body = {key: value for key, value in record.items() if key != _OWN}
    write_json(file, {**body, _OWN: sum_of(body)})


def read_sealed(file: Path, stage: str | None = None) -> dict[str, Any]:
    """A record, {} if there is none. DataError if it is no object, or not what `write_sealed` wrote, or that
    of another stage than `stage` (by default the directory it lies in).
    """
    if not os.path.lexists(file):
        return {}
    record = read_object(file)
    digest = record.pop(_OWN, None)
    name = (stage or file.parent.name) if file.name == "stage.json" else None
    member = f"{file.parent.parent.name}/{name}"  # of an ensemble
    if name is not None and record.get("stage", name) not in (name, member):
        raise DataError(f"{file} is the record of another stage, {str(record['stage'])[:60]}", _REMEDY)
    if digest is not None and digest != sum_of(record):
        raise DataError(
            f"{file} is not what preftune wrote: it does not match its own SHA-256",
            hint=_REMEDY if name else f"remove {file} and run the same command: it is made again",
        )
    return record


def sums(run: RunDir, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Size and hash of files, by their path in the run directory."""
    return {
        file.relative_to(run.path).as_posix(): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(files)
    }


def recorded_sums(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The sums in a record; None if it has none."""
    files = record.get("files")
    return files if isinstance(files, dict) else None


def model_sum(run: RunDir, name: str) -> str | None:
    """One hash for the model, or data, that a stage has recorded; None if it has not."""
    files = recorded_sums(read_sealed(run.stage_json(name)))
    prefixes = ("models/", "collected/")
    return None if files is None else sum_of({k: v for k, v in files.items() if k.startswith(prefixes)})


def faults(run: RunDir, record: Mapping[str, Any], under: str = "") -> list[str]:
    """What differs from a record, "FILE is missing" and the like, among the files whose path begins so."""
    files = recorded_sums(record) or {}
    differences = [_fault(run, name, entry) for name, entry in files.items() if name.startswith(under)]
    models = [name for name in files if name.startswith("models/") and not name.endswith(f"/{CARD}")]
    folders = {name.rpartition("/")[0] for name in models if name.startswith(under)}
    for folder in sorted(folders):
        for file in sorted((run.path / folder).glob("*")):
            expected = f"{folder}/{file.name}" in {*files, *folders} or file.name == CARD
            if not expected and not file.name.startswith("."):  # a loader might read it
                differences.append(f"{file} is not of this model")
    return [fault for fault in differences if fault]


def check(run: RunDir, record: Mapping[str, Any], remedy: str, under: str = "") -> None:
    """DataError that names the first file that differs from its record; `remedy` is how to mend that."""
    differences = faults(run, record, under)
    if differences:
        more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
        raise DataError(f"{differences[0]}{more}", hint=f"restore it from a copy; or {remedy}")


def note(run: RunDir, files: Iterable[Path]) -> None:
    """Put the sums of the run's own files into its marker."""
    before = read_sealed(run.marker)
    after = {**before, "files": {**(recorded_sums(before) or {}), **sums(run, files)}}
    if before != after:
        write_sealed(run.marker, after)


def check_own(run: RunDir, *files: Path) -> None:
    """DataError if one of the run's own files (config.toml, data.json, ...) is not what preftune wrote."""
    record = read_sealed(run.marker)
    for file in files:
        remedy = "run the command that made the run (preftune run RECIPE), which writes it again"
        if file == run.run:
            remedy = "remove it and run the same command, which describes that command instead"
        check(run, record, remedy, file.name)


def _fault(run: RunDir, name: str, entry: Any) -> str:
    file = run.path / name
    if not isinstance(entry, dict) or Path(name).is_absolute() or ".." in Path(name).parts:
        return f"{file} has no sum in its record"
    if not file.is_file():
        return f"{file} is missing"
    size = file.stat().st_size
    if size != (recorded := entry.get("bytes")):
        before = f"{recorded:,}" if type(recorded) is int else str(recorded)[:20]
        return f"{file} is not what was written: {size:,} bytes instead of {before}"
    if _sha256(file) != entry.get("sha256"):
        return f"{file} is not what was written: it does not match its SHA-256"
    return ""


def _sha256(file: Path) -> str:
    status = file.stat()
    mark = (str(file.resolve()), status.st_ino, status.st_size, status.st_ctime_ns)
    if mark not in _known:
        _known[mark] = sha256_file(file)
    return _known[mark]
