"""stages/<stage>/stage.json: how far a stage is, and what it cost."""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from preftune.records.base import Number, Record, Several


class StageRecord(Record):
    remedy: ClassVar[str] = "remove its directory and run the same command: that stage is made anew"

    algorithm: str = ""
    status: str = ""
    seconds: Number | None = None
    peak_memory_mb: Number | None = None
    steps: int | None = None
    parents: Several[str] = ()
    taken_from: str = ""  # the run that trained it, of a stage that was taken over
    # Rows that could not be encoded, by reason.
    left_out: Mapping[str, int] = Field(default_factory=dict, validation_alias="rejected")
