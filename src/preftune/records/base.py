"""The ground of all records: numbers and estimates as the files hold them, and the one reader and writer."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    AliasChoices,
    AliasPath,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from preftune.errors import DataError
from preftune.rundir import read_json, read_jsonl, write_json, write_jsonl

# Of the keys. Files without a version are of the first, which lacks some of them; in the second a measured
# score was called reward. Both are read.
VERSION = 3
T = TypeVar("T")


class Record(BaseModel):
    """A frozen record. Keys may be missing, as in runs of earlier versions; a wrong type is refused."""

    model_config = ConfigDict(frozen=True, strict=True, populate_by_name=True)
    versioned: ClassVar[bool] = True  # its file carries VERSION; false where a file's bytes are compared
    remedy: ClassVar[str] = "preftune evaluate RUN measures it again"

    @model_validator(mode="before")
    @classmethod
    def _null_is_missing(cls, row: Any) -> Any:
        if not isinstance(row, Mapping):
            return row
        return {key: value for key, value in row.items() if value is not None}


def at(*path: str, default: Any = None, old: str = "") -> Any:
    """A field that lies elsewhere in the file; `old` is the first key's name in files of version 2."""
    current = AliasPath(*path)
    alias = AliasChoices(current, AliasPath(old, *path[1:])) if old else current
    return Field(default=default, validation_alias=alias)


def _bound(value: Any) -> Any:
    """An end of an interval; one that is not finite supports no claim and counts as unknown."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = float  # one that is not finite is a measurement too: a policy diverged
Bound = Annotated[float | None, BeforeValidator(_bound)]
Several = Annotated[tuple[T, ...], Field(strict=False)]  # JSON has lists only


class Estimate(Record):
    """A number with its 95 % interval and the number of items behind it; these may be unknown."""

    value: Number
    low: Bound = None
    high: Bound = None
    n: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _as_written(cls, row: Any) -> Any:
        """{"mean" or "value", "interval": [low, high], "n", ...}; a bare number has no interval."""
        if not isinstance(row, Mapping):
            return {"value": row}
        row = dict(row)
        if "mean" in row:
            row["value"] = row["mean"]
        interval = row.get("interval")
        if interval is not None:
            if not isinstance(interval, list | tuple) or len(interval) != 2:
                raise ValueError("an interval has two ends")
            row["low"], row["high"] = interval
        return row

    def text(self, *, sign: bool = False, scale: float = 1.0, digits: int | None = None) -> str:
        """`0.41 [0.22, 0.60]`, to the decimals that the interval supports, or to so many `digits`."""
        plus = "+" if sign else ""
        digits = decimals_for(self.spread * scale) if digits is None else digits
        if self.low is None or self.high is None:
            return f"{self.value * scale:{plus}.{digits}f}"
        low, high = (f"{bound * scale + 0.0:.{digits}f}" for bound in (self.low, self.high))
        return f"{self.value * scale:{plus}.{digits}f} [{low}, {high}]"

    @property
    def spread(self) -> float:
        """Half the width of the interval, or the size of the value where it has none."""
        return abs(self.value) if self.low is None or self.high is None else (self.high - self.low) / 2

    def percent(self) -> str:
        """The same for a share: `71.0 % [68.1, 73.7]`."""
        if self.low is None or self.high is None:
            return f"{100 * self.value:.1f} %"
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"

    def excludes(self, value: float) -> bool:
        """True if the interval is known and `value` lies outside of it."""
        return self.low is not None and self.high is not None and not self.low <= value <= self.high


def decimals_for(size: float) -> int:
    """Decimals that show two significant digits of `size` (an interval's half width), at most 4."""
    if not math.isfinite(size) or size <= 0:
        return 2
    return min(4, max(0, 1 - math.floor(math.log10(size))))


def decimals_alike(estimates: Iterable[Estimate | None], scale: float = 1.0) -> int:
    """Decimals for all of a column: what its narrowest interval supports, but at most three significant
    digits of its largest value.
    """
    measured = [estimate for estimate in estimates if estimate is not None]
    needed = [decimals_for(estimate.spread * scale) for estimate in measured if estimate.spread > 0]
    largest = max((abs(estimate.value * scale) for estimate in measured), default=0.0)
    return min(max(needed, default=2), decimals_for(largest) + 1)


def _or_none(row: Any) -> Any:
    """What was not measured: null, {}, or an estimate whose value is null."""
    if isinstance(row, Mapping) and row.get("mean", row.get("value")) is None:
        return None
    return row


def _only_measured(rows: Any) -> Any:
    """Without the entries that were not measured."""
    if rows is None:
        return {}
    if not isinstance(rows, Mapping):
        return rows
    return {key: row for key, row in rows.items() if _or_none(row) is not None}


Measured = Annotated[Estimate | None, BeforeValidator(_or_none)]
Estimates = Annotated[Mapping[str, Estimate], BeforeValidator(_only_measured)]
Numbers = Annotated[Mapping[str, Number], BeforeValidator(_only_measured)]

R = TypeVar("R", bound=Record)


def read_record(path: Path, kind: type[R]) -> R:
    """A record from its file. DataError naming file and field for what does not fit; as `read_json` else."""
    return _fitted(str(path), read_json(path), kind)


def read_records(path: Path, kind: type[R], *, whole: bool = True) -> list[R]:
    """The records of a JSON Lines file, each error with its line; `whole` as in `read_jsonl`."""
    rows = read_jsonl(path, whole=whole)
    return [_fitted(f"{path}:{line}", row, kind) for line, row in enumerate(rows, start=1)]


def write_record(path: Path, row: Mapping[str, Any], kind: type[Record]) -> None:
    """Write what `kind` can read, with the version of its keys. ValidationError for anything else."""
    kind.model_validate(row)
    write_json(path, {"version": VERSION, **row} if kind.versioned else row)


def write_records(path: Path, rows: Sequence[Mapping[str, Any]], kind: type[Record]) -> None:
    """The same for JSON Lines."""
    for row in rows:
        kind.model_validate(row)
    write_jsonl(path, rows)


def _fitted(where: str, row: Any, kind: type[R]) -> R:
    version = row.get("version", 1) if isinstance(row, Mapping) else 1
    if type(version) is not int or not 1 <= version <= VERSION:
        unknown = str(version)[:40]
        raise DataError(f"{where}: version {unknown} of its keys is not known here", "use a newer preftune")
    try:
        return kind.model_validate(row)
    except ValidationError as error:
        raise DataError(f"{where}: {first_fault(error)}", kind.remedy) from None


def first_fault(error: ValidationError) -> str:
    """The first thing that does not fit, as "field: reason"."""
    first = error.errors(include_url=False, include_input=False)[0]
    field = ".".join(str(part) for part in first["loc"]) or "the whole file"
    return f"{field}: {first['msg'][:1].lower()}{first['msg'][1:]}"
