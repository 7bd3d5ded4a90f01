"""Preference files on this machine: .jsonl, .jsonl.gz and .parquet, alone or in a directory."""

import gzip
import hashlib
import io
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from preftune.data.rows import COLUMNS, HINT, OnBadRow, Tally
from preftune.errors import DataError, InputMissing, PermissionMissing

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
}
SPLIT_NAME = re.compile(
    rf"({'|'.join(SPLITS)})(?:[-_.]\d[\w.-]*)?", re.IGNORECASE
)  # train, train-00000-of-00001

MAX_LINE = 8 << 20  # bytes in one row
MAX_BLANK = 1_000_000  # blank lines in one file
# Text packs 3 to 10 times, a gzip bomb about 1,000 times, and parquet can repeat a value for nothing.
PACKED_FLOOR, PACKED_RATIO = 16 << 20, 50
_UNPACK = "if you trust the file, unpack it, and name the unpacked file"


def read_files(root: Path, on_bad_row: OnBadRow = "error", only: Sequence[Path] | None = None) -> list[Tally]:
    """Read one file or, recursively, a directory of them, in the order of their paths; or `only` some of
    them.

    Raises InputMissing for what cannot be opened and DataError, naming file and line, for what cannot be
    read.
    """
    tallies = []
    for path in find_files(root) if only is None else only:
        folder = "" if path == root else path.parent.relative_to(root).as_posix()
        tally = Tally(
            name=str(path),
            split="train"
            if path == root
            else split_name(path),  # a file named by itself is all there is to split
            source="" if folder == "." else folder,
            on_bad_row=on_bad_row,
        )
        _read_file(path, tally)
        tallies.append(tally)
    return tallies


def find_files(root: Path) -> list[Path]:
    """The readable files under `root` (or `root` itself), sorted; hidden ones and links to directories are
    passed by.
    """
    wanted = "give a .jsonl, .jsonl.gz or .parquet file, or a directory that holds some"
    if root.is_file():
        if not root.name.lower().endswith(SUFFIXES):
            raise DataError(f"{root}: not a kind of file that is read here", wanted)
        return [root]
    if not root.is_dir():
        raise InputMissing(f"{root}: no such file or directory", wanted)
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(folder, name) for name in names if not name.startswith("."))
        found += [path for path in paths if path.name.lower().endswith(SUFFIXES) and path.is_file()]
    if not found:
        raise DataError(f"{root}: no preference files in this directory", wanted)
    return sorted(found)


def split_name(path: Path) -> str:
    """The split a file belongs to by its name; any name that is not one of `SPLITS` counts as train."""
    name = path.name.lower()
    stem = next(name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix))
    match = SPLIT_NAME.fullmatch(stem)
    return SPLITS[match[1]] if match else "train"


def _read_file(path: Path, tally: Tally) -> None:
    try:
        with open(path, "rb") as file:
            tally.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            size = tally.size = file.tell()
            file.seek(0)
            if path.name.lower().endswith(".parquet"):
                for row, record in _parquet_rows(file, path, tally):
                    tally.take(record, f"{path}: row {row}")
            else:
                for number, line in _lines(file, path, size):
                    tally.take(line, f"{path}:{number}")
    except PermissionError:
        raise PermissionMissing(f"{path}: cannot be read: permission denied") from None
    except OSError as error:
        raise InputMissing(f"{path}: cannot be read: {error.strerror or error}") from None
    if not tally.read:
        raise DataError(f"{path}: the file is empty", "remove it, or put preference rows into it")


def _lines(file: BinaryIO, path: Path, size: int) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each line that is not blank. Lines end at LF only: a text may hold U+2028."""
    packed = path.name.lower().endswith(".gz")
    limit = _limit(size) if packed else None
    stream = io.BufferedReader(gzip.GzipFile(fileobj=file), 1 << 20) if packed and size else file
    number = total = blank = 0
    try:
        while line := stream.readline(MAX_LINE + 1):
            number += 1
            total += len(line)
            if len(line) > MAX_LINE:
                raise DataError(
                    f"{path}:{number}: a line of more than {MAX_LINE >> 20} MiB",
                    "one row is one line; shorten the texts of this one, or remove it",
                )
            if limit and total > limit:
                raise DataError(
                    f"{path}:{number}: {size} bytes unpack to more than {limit}: refused as a gzip bomb",
                    _UNPACK,
                )
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip(b" \t\r\n"):
                yield number, line
            elif (blank := blank + 1) > MAX_BLANK:
                raise DataError(f"{path}:{number}: more than {MAX_BLANK:,} blank lines", "remove them")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        hint = "the file is truncated or damaged: copy or download it again"
        raise DataError(
            f"{path}:{number + 1}: the gzip data ends early or is damaged ({error})", hint
        ) from None


def _parquet_rows(file: BinaryIO, path: Path, tally: Tally) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number (from 1) and record of each row, prompt, chosen and rejected only."""
    import pyarrow  # heavy, and not needed for JSON
    import pyarrow.parquet as parquet

    number = 0
    try:
        table = parquet.ParquetFile(file)
        names = table.schema_arrow.names
        for column in ("chosen", "rejected"):
            if column not in names:
                raise DataError(f'{path}: no column "{column}" (it has: {", ".join(names)[:200]})', HINT)
        tally.ignored_columns.update(set(names) - set(COLUMNS))
        # Values that repeat stay one value in memory until their row is taken.
        columns = (table.schema.column(i) for i in range(len(table.schema)))
        texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
        table = parquet.ParquetFile(file, read_dictionary=texts)
        limit, total = _limit(tally.size or 0), 0
        for batch in table.iter_batches(1024, columns=[name for name in COLUMNS if name in names]):
            for i in range(batch.num_rows):
                number += 1
                record = {name: batch.column(name)[i].as_py() for name in batch.schema.names}
                total += _characters(record)
                if total > limit:
                    raise DataError(
                        f"{path}: row {number}: {tally.size} bytes unpack to more than {limit}: refused",
                        _UNPACK,
                    )
                yield number, record
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        hint = "the file is truncated, damaged or no parquet file: copy or download it again"
        raise DataError(
            f"{path}: cannot be read as parquet after row {number}: {reason[:200]}", hint
        ) from None


def _limit(size: int) -> int:
    """The most that a packed file of `size` bytes may unpack to, in bytes."""
    return PACKED_FLOOR + PACKED_RATIO * size


def _characters(value: Any) -> int:
    """Of all texts in a record."""
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return (
        sum(map(_characters, value))
        if isinstance(value, list)
        else len(value)
        if isinstance(value, str | bytes)
        else 8
    )
