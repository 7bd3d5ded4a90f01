"""NAME.expected.json beside a shipped recipe: what runs of it gave, seed by seed."""

from collections.abc import Mapping
from typing import ClassVar

from preftune.records.base import Number, Record, Several


class ExpectedRecord(Record):
    """Numbers of runs of one recipe that differ in their seed alone; processor seconds of whole runs, or, of
    stages that a study had finished, seconds by the clock.
    """

    remedy: ClassVar[str] = "python benchmarks/expected.py RECIPE measures it again"

    recipe: str
    settings_sha256: str  # of all settings but the seed, and where the data lie
    made: str  # the day, the commit
    machine: str
    seeds: Several[int]
    seconds: Several[Number]
    peak_mib: Number | None = None
    numbers: Mapping[str, Several[Number]]  # by what `measure.expected.numbers_of` calls them
