"""Who is shown what, when and on which side: a function of the set's seed, so that nothing of it is state."""

from collections.abc import Sequence
from typing import Annotated, ClassVar, NamedTuple

from pydantic import Field

from preftune.config.base import Share
from preftune.label.items import Item
from preftune.records.base import Record, Several
from preftune.seeding import derive_seed

RATER = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,39}$"
GAP = 10  # items between the first showing and the second, where there are as many
Rater = Annotated[str, Field(pattern=RATER)]


class Design(Record):
    """design.json of a set. Raters may join later; all else stays as it was begun with."""

    versioned: ClassVar[bool] = False
    remedy: ClassVar[str] = "restore it from a copy, or begin another set with --set NAME"

    source: str
    seed: int = 0
    overlap: Share = 1.0  # share of the items that every rater judges; each of the others goes to one rater
    repeats: Share = 0.05  # share of a rater's items that are shown twice
    informative: bool = False
    all_pairs: bool = False
    limit: Annotated[int, Field(ge=1)] | None = None
    tags: Several[Annotated[str, Field(min_length=1, max_length=40)]] = ()
    raters: Several[Rater] = ("me",)
    items_sha256: str = ""


class Slot(NamedTuple):
    """One showing of an item to a rater; `a` is the place of the reply that stands as A."""

    item: Item
    again: bool
    a: int

    @property
    def key(self) -> str:
        return f"{self.item.id}-{int(self.again)}"


def shared(design: Design, items: Sequence[Item]) -> set[str]:
    """The items that every rater judges."""
    ranked = sorted(items, key=lambda item: derive_seed(design.seed, "overlap", item.id))
    return {item.id for item in ranked[: round(design.overlap * len(items))]}


def queue(design: Design, items: Sequence[Item], rater: str) -> list[Slot]:
    """What a rater judges, in order: the shared items and a share of the others, some of them once more with
    the sides exchanged, at least `GAP` items later where there are as many.
    """
    everybody, number = shared(design, items), design.raters.index(rater)
    unshared = [item.id for item in items if item.id not in everybody]
    dealt = everybody | set(unshared[number :: len(design.raters)])
    hand = [item for item in items if item.id in dealt]
    if not design.informative:  # each rater in an order of her own
        hand.sort(key=lambda item: derive_seed(design.seed, "order", rater, item.id))
    slots = [(float(i), slot_of(design, item, rater, False)) for i, item in enumerate(hand)]
    gap = min(GAP, len(hand) // 2)
    early = sorted(
        range(len(hand) - gap), key=lambda i: derive_seed(design.seed, "repeat", rater, hand[i].id)
    )
    for i in early[: round(design.repeats * len(hand))]:
        first = slots[i][1]
        later = i + gap + derive_seed(design.seed, "when", rater, first.item.id) % (len(hand) - gap - i)
        slots.append((later + 0.5, slot_of(design, first.item, rater, True)))
    return [slot for _, slot in sorted(slots, key=lambda pair: (pair[0], pair[1].key))]


def slot_of(design: Design, item: Item, rater: str, again: bool) -> Slot:
    """A showing of an item to a rater, also of one that is not in her queue any more."""
    side = derive_seed(design.seed, "side", rater, item.id) % 2
    return Slot(item, again, 1 - side if again else side)
