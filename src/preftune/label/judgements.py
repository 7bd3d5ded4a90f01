"""What a rater said: as it is sent, as it is kept, and what is left of it after undoing."""

from collections.abc import Iterable
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from preftune.config.base import Settings
from preftune.records.base import Record, Several

Verdict = Literal["a", "b", "tie", "bad", "skip"]
Id = Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{8,64}$")]
Tag = Annotated[str, Field(min_length=1, max_length=40)]


class Judgement(Settings):
    """A judgement as a page sends it. `id` is drawn where it was made: what is sent twice counts once."""

    id: Id
    slot: Annotated[str, Field(pattern=r"^[0-9a-f]{16}-[01]$")]
    verdict: Verdict
    tags: Annotated[tuple[Tag, ...], Field(strict=False, max_length=20)] = ()
    note: Annotated[str, Field(max_length=4000)] = ""
    corrected: Annotated[str, Field(max_length=20000)] = ""  # a better reply, in the rater's words
    seconds: Annotated[float, Field(ge=0, le=1e6)] = 0.0


class Undone(Settings):
    """Taking a judgement back, as a page sends it."""

    id: Id
    of: Id


class Event(Record):
    """A line of a rater's file; `seq` counts the lines of all raters of the set as they came."""

    versioned: ClassVar[bool] = False
    remedy: ClassVar[str] = "restore the file from a copy, or remove that line"

    seq: int
    id: str
    of: str = ""  # the judgement that this line takes back; "" for a judgement
    item: str = ""
    again: bool = False
    a: Literal[0, 1] = 0  # place of the reply that stood as A
    verdict: Verdict = "skip"
    tags: Several[str] = ()
    note: str = ""
    corrected: str = ""
    seconds: float = 0.0
    by: Literal["page", "file"] = "page"

    @property
    def slot(self) -> str:
        return f"{self.item}-{int(self.again)}"

    @property
    def preferred(self) -> int | None:
        """Place of the preferred reply; None without one."""
        return {"a": self.a, "b": 1 - self.a}.get(self.verdict)

    @property
    def meaning(self) -> str:
        """What was said, whatever the sides: the place of the preferred reply, or the verdict."""
        return self.verdict if self.preferred is None else str(self.preferred)


def standing(events: Iterable[Event]) -> dict[str, Event]:
    """The judgements that stand, by slot, in the order in which they came."""
    events = list(events)
    undone = {event.of for event in events if event.of}
    return {event.slot: event for event in events if not event.of and event.id not in undone}
