"""Files as rows: lines of JSON, a JSON array, CSV and TSV, parquet, Arrow; unpacking is bounded.

A reader yields where a row stands ("file:3", "file: row 3") and the row: bytes of JSON, a record, or a BadRow
where what follows can be read all the same.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from preftune.data.checks import BadRow
from preftune.data.formats.table import FORMS, KNOWN
from preftune.data.rows import Tally, no_constant, no_duplicates
from preftune.errors import DataError

MAX_LINE = 8 << 20  # bytes in one row
MAX_BLANK = 1_000_000  # blank lines in one file
# Text packs 3 to 10 times, a gzip bomb about 1,000 times, and parquet can repeat a value for nothing.
PACKED_FLOOR, PACKED_RATIO = 16 << 20, 50
_UNPACK = "if you trust the file, unpack it, and name the unpacked file"
_DAMAGED = "the file is truncated, damaged or of another kind: copy or download it again"

Rows = Iterator[tuple[str, Any]]


def json_rows(file: BinaryIO, path: Path, tally: Tally) -> Rows:
    """Lines of JSON; in a .json file, an array of rows too."""
    if path.name.lower().removesuffix(".gz").endswith(".json"):
        if _beginning(file, path, 4096).startswith("["):
            yield from _array(file, path, tally)
            return
        if _is_one_object(_beginning(file, path, MAX_LINE)):
            raise DataError(
                f"{path}: one JSON object over several lines, not rows",
                "a .json file is an array of rows, or one row a line; if the rows are a list inside of this "
                "object, save that list as the file",
            )
    for number, line in lines(file, path, tally.size or 0, skip=tally.on_bad_row == "skip"):
        yield f"{path}:{number}", line


def _beginning(file: BinaryIO, path: Path, length: int) -> str:
    try:
        start = (gzip.GzipFile(fileobj=file) if _is_packed(path) else file).read(length)
    except (EOFError, gzip.BadGzipFile, zlib.error, OSError):
        start = b""  # whoever reads on says so
    file.seek(0)
    return start.decode("utf-8", "replace").removeprefix("\ufeff").lstrip()


def _is_one_object(text: str) -> bool:
    """Whether a file that begins so is one object that goes on after its first line."""
    decoder, lines_of_it = json.JSONDecoder(), text.split("\n", 1)
    if not text.startswith("{") or len(lines_of_it) == 1:
        return False
    try:
        decoder.raw_decode(lines_of_it[0])
    except (ValueError, RecursionError):
        try:
            return "\n" in text[: decoder.raw_decode(text)[1]]
        except json.JSONDecodeError as error:
            return error.pos >= len(text.rstrip())  # longer than what was looked at, or cut off
        except (ValueError, RecursionError):
            return False
    return False


def _array(file: BinaryIO, path: Path, tally: Tally) -> Rows:
    """The rows of one JSON array, decoded one after the other from the text of the whole file."""
    try:
        text = b"".join(line for _, line in lines(file, path, tally.size or 0, None)).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start + 1} is not UTF-8", "save it as UTF-8") from None
    decoder = json.JSONDecoder(parse_constant=no_constant, object_pairs_hook=no_duplicates)
    at, number = _after_blank(text, text.index("[") + 1), 0
    while not text.startswith("]", at):
        where = f"{path}: row {number + 1}"
        if number:
            if not text.startswith(",", at):
                raise DataError(f"{where}: the JSON array ends early or lacks a comma", _DAMAGED)
            at = _after_blank(text, at + 1)
        try:
            try:
                row, at = decoder.raw_decode(text, at)
            except BadRow as error:  # where it ends is found without the checks
                row, at = error, json.JSONDecoder().raw_decode(text, at)[1]
        except (ValueError, RecursionError) as error:
            problem = "brackets are nested too deep" if isinstance(error, RecursionError) else error
            raise DataError(f"{where}: not JSON: {str(problem)[:200]}", "mend the file at this row") from None
        number += 1
        yield where, row
        at = _after_blank(text, at)
    if text[at + 1 :].strip():
        raise DataError(f"{path}: more text after the JSON array", "one file is one array, or a row a line")


def _after_blank(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t", "\r", "\n"):
        at += 1
    return at


def table_rows(file: BinaryIO, path: Path, tally: Tally) -> Rows:
    """CSV and TSV with a header line; every value is text. A CSV whose header holds semicolons and no comma
    is separated by those, as spreadsheets write it where the comma is the decimal point.
    """
    numbered = lines(file, path, tally.size or 0, blanks=True)
    text = ((number, _decoded(line, path, number)) for number, line in numbered)
    before, first = next(((n - 1, line) for n, line in text if line.strip()), (0, None))
    if first is None:
        return
    suffix = next(s for s in reversed(path.suffixes) if s.lower() != ".gz").lower()
    between = "\t" if suffix == ".tsv" else ";" if ";" in first and "," not in first else ","
    count = 0 if between == "\t" else first.count(between)
    spaced = 0 < count == first.count(f"{between} ")  # "a, b": quotes, too; a single column has no such sign
    old = csv.field_size_limit(MAX_LINE)
    try:
        later_lines = (line for _, line in text)
        reader = csv.reader(
            chain([first], later_lines), delimiter=between, strict=True, skipinitialspace=spaced
        )
        header = [name.strip() for name in next(reader, [])]
        if len(set(header)) < len(header):
            raise DataError(f"{path}:{before + 1}: a column name appears twice in {str(header)[:200]}", FORMS)
        for values in filter(None, reader):
            where = f"{path}:{before + reader.line_num}"
            if len(values) == len(header):
                yield where, dict(zip(header, values, strict=True))
                continue
            problem = f"{len(values)} values for the {len(header)} columns of the header"
            yield where, BadRow(f"{problem}: values with {between!r}, quotes or line ends stand in quotes")
    except csv.Error as error:
        raise DataError(f"{path}: not {suffix[1:].upper()}: {error}", "mend or export it again") from None
    finally:
        csv.field_size_limit(old)


def _decoded(line: bytes, path: Path, number: int) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        message = f"{path}:{number}: byte {error.start + 1} of the line is not UTF-8"
        raise DataError(message, "save the file as UTF-8") from None


class _Unpacked:
    """A file of `size` bytes by lines, unpacked where it is packed, and refused where that gives too much."""

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        packed = _is_packed(path)
        self.path, self.size, self.total = path, size, 0
        self.limit = unpacked_limit(size) if packed else None
        self.stream = io.BufferedReader(gzip.GzipFile(fileobj=file), 1 << 20) if packed and size else file

    def line(self, number: int, longest: int | None) -> bytes:
        """What comes next of line `number`: all of it, or `longest` bytes and one more; b"" at the end."""
        data = self.stream.readline((longest or self.limit or self.size) + 1)
        self.total += len(data)
        if self.limit and self.total > self.limit:
            unpacks = f"{self.size} bytes unpack to more than {self.limit}"
            raise DataError(f"{self.path}:{number}: {unpacks}: refused as a gzip bomb", _UNPACK)
        return data


def lines(
    file: BinaryIO,
    path: Path,
    size: int,
    longest: int | None = MAX_LINE,
    blanks: bool = False,
    skip: bool = False,
) -> Iterator[tuple[int, Any]]:
    """Number and bytes of each line, those that are blank only with `blanks`; with `skip` a BadRow in the
    place of one that is too long. Lines end at LF only: a text may hold U+2028.
    """
    unpacked = _Unpacked(file, path, size)
    number = blank = 0
    try:
        while line := unpacked.line(number + 1, longest):
            number += 1
            if longest and len(line) > longest:
                wrong = f"a line of more than {longest >> 20} MiB"
                if not skip:
                    raise DataError(
                        f"{path}:{number}: {wrong}",
                        "one row is one line; shorten the texts of this one, or remove it",
                    )
                while line and not line.endswith(b"\n"):
                    line = unpacked.line(number + 1, longest)
                yield number, BadRow(wrong)
                continue
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            full = bool(line.strip(b" \t\r\n"))
            if full or blanks:
                yield number, line
            if not full and (blank := blank + 1) > MAX_BLANK:
                raise DataError(f"{path}:{number}: more than {MAX_BLANK:,} blank lines", "remove them")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        hint = "the file is truncated or damaged: copy or download it again"
        raise DataError(
            f"{path}:{number + 1}: the gzip data ends early or is damaged ({error})", hint
        ) from None


def parquet_rows(file: BinaryIO, path: Path, tally: Tally) -> Rows:
    """The rows of a parquet file."""
    return _arrow_rows(_parquet_batches, file, path, tally)


def arrow_rows(file: BinaryIO, path: Path, tally: Tally) -> Rows:
    """The rows of an Arrow stream (`save_to_disk`) or file (Feather)."""
    return _arrow_rows(_arrow_batches, file, path, tally)


def _unread_value(value: Any) -> Any:
    """A value of a column that is not read here; None for one that Python cannot hold (nanoseconds)."""
    try:
        return value.as_py()
    except (ValueError, OverflowError, TypeError, NotImplementedError):
        return None


Batches = Callable[[BinaryIO, Callable[[list[str]], list[str]]], Iterator[Any]]


def _arrow_rows(batches: Batches, file: BinaryIO, path: Path, tally: Tally) -> Rows:
    import pyarrow  # heavy, and not needed for JSON

    def readable(names: list[str]) -> list[str]:
        usable = KNOWN | {name.split(".")[0] for name in tally.columns.values()} | set(tally.columns.values())
        if len(set(names)) < len(names):
            raise DataError(f"{path}: two columns of the same name: {', '.join(names)[:200]}", FORMS)
        tally.ignored_columns.update(set(names) - usable)
        columns = [name for name in names if name in usable]
        if not columns:
            raise DataError(f'{path}: no column "chosen" (it has: {", ".join(names)[:200]})', FORMS)
        return columns

    number, total, limit = 0, 0, unpacked_limit(tally.size or 0)
    try:
        for batch in batches(file, readable):
            names = readable(batch.schema.names)
            unread = [name for name in batch.schema.names if name not in names]  # for reward functions
            for i in range(batch.num_rows):
                number += 1
                record = {name: batch.column(name)[i].as_py() for name in names}
                record |= {name: _unread_value(batch.column(name)[i]) for name in unread}
                total += _characters(record)
                if total > limit:
                    raise DataError(
                        f"{path}: row {number}: {tally.size} bytes unpack to more than {limit}: refused",
                        _UNPACK,
                    )
                yield f"{path}: row {number}", record
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, ValueError, OverflowError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        format_name = "parquet" if batches is _parquet_batches else "Arrow data"
        raise DataError(
            f"{path}: cannot be read as {format_name} after row {number}: {reason[:200]}", _DAMAGED
        ) from None


def _parquet_batches(file: BinaryIO, readable: Callable[[list[str]], list[str]]) -> Iterator[Any]:
    """Batches of one row group after the other: pyarrow cannot read lists of dictionary-encoded texts across
    them, and with dictionaries a value that repeats stays one value in memory until its row is taken.
    """
    import pyarrow.parquet as parquet

    table = parquet.ParquetFile(file)
    readable(table.schema_arrow.names)
    columns = (table.schema.column(i) for i in range(len(table.schema)))
    texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
    table = parquet.ParquetFile(file, read_dictionary=texts)
    for group in range(table.num_row_groups):
        yield from table.iter_batches(1024, row_groups=[group])


def _arrow_batches(file: BinaryIO, readable: Callable[[list[str]], list[str]]) -> Iterator[Any]:
    import pyarrow.ipc as ipc

    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    if is_file:
        table = ipc.open_file(file)
        batches = (table.get_batch(i) for i in range(table.num_record_batches))
    else:
        batches = ipc.open_stream(file)
    for batch in batches:
        batch.validate(full=True)  # Arrow trusts offsets: damaged ones end the process
        yield batch


def unpacked_limit(size: int) -> int:
    """The most that a packed file of `size` bytes may unpack to, in bytes."""
    return PACKED_FLOOR + PACKED_RATIO * size


def _is_packed(path: Path) -> bool:
    return path.name.lower().endswith(".gz")


def _characters(value: Any) -> int:
    """Of all texts in a record; 8 for any other value."""
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    if isinstance(value, list):
        return sum(map(_characters, value))
    return len(value) if isinstance(value, str | bytes) else 8
