"""What the judgements say so far. Every interval holds at any look (`evaluation.anytime`)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from preftune.evaluation.agreement import alpha_interval, krippendorff_alpha
from preftune.evaluation.anytime import confidence_sequence
from preftune.label.items import Item
from preftune.label.judgements import Event
from preftune.label.store import Store
from preftune.records.base import Estimate

CONTINUOUS = (
    "Intervals marked “any time” are 95 % confidence sequences (Waudby-Smith & Ramdas 2024): they hold at "
    "every look, so that you may stop when you please."
)
HARD = (
    "The closest pairs come first in this set, so that what is judged so far is no sample of all: its shares "
    "have no interval."
)


class Line(NamedTuple):
    """A result: its key, what it is in words, its value, and how its interval is meant."""

    key: str
    words: str
    value: Estimate | None
    kind: str = "any time"


def results(store: Store) -> list[Line]:
    """All there is to say, in the order of the page; a value is None where nothing was judged for it.

    Shares are over the first judgement of each item, as they came: a second rater's or a second showing of it
    would not be a new draw. A tie and "both bad" are half a win. Skipped ones do not count.
    """
    stands = store.standing()
    came = sorted(
        (event for slots in stands.values() for event in slots.values()), key=lambda event: event.seq
    )
    heard = [event for event in came if event.verdict != "skip"]
    first: dict[str, Event] = {}
    for event in heard:
        first.setdefault(event.item, event)
    decided = [event for event in first.values() if event.preferred is not None]
    share = partial(_share, store)
    scored_higher = _larger(store, lambda item: item.scores)
    longer = _larger(store, lambda item: (len(item.replies[0]), len(item.replies[1])))
    return [
        *_wins(store, first.values()),
        share(
            "reward_model",
            "what the reward model (or judge) scores higher is preferred",
            decided,
            scored_higher,
        ),
        Line("alpha", "agreement between raters, Krippendorff's α", _alpha(stands), "bootstrap, one look"),
        _repeats(store, stands),
        share("side", "A is preferred (50 % without a bias to a side)", decided, _is_a),
        share("length", "the longer reply is preferred", decided, longer),
        share("ties", "tie or both bad", first.values(), _is_tie),
    ]


def _wins(store: Store, first: Iterable[Event]) -> list[Line]:
    """The win rate of the second policy over the first, where the set compares two."""
    names = {item.names for item in store.items.values()}
    if len(names) != 1 or len(set(*names)) != 2:
        return []
    ((before, after),) = names
    words = f"{after} is preferred to {before} (a tie is half)"
    return [_share(store, "win_rate", words, first, _won)]


def _share(
    store: Store, key: str, words: str, events: Iterable[Event], value: Callable[[Event], float | None]
) -> Line:
    values = [float(number) for event in events if (number := value(event)) is not None]
    return _line(key, words, values, drawn=not store.design.informative)


def _line(key: str, words: str, values: Sequence[float], *, drawn: bool) -> Line:
    """Their mean; the interval only where items were `drawn`, not picked as informative."""
    if not values:
        return Line(key, words, None)
    mean = sum(values) / len(values)
    if not drawn:
        return Line(key, words, Estimate(value=mean, n=len(values)), "no interval")
    low, high = confidence_sequence(values)
    return Line(key, words, Estimate(value=mean, low=min(low, mean), high=max(high, mean), n=len(values)))


def _won(event: Event) -> float:
    """By the second reply; a tie is half a win."""
    return 0.5 if event.preferred is None else event.preferred


def _is_tie(event: Event) -> float:
    return float(event.preferred is None)


def _is_a(event: Event) -> float:
    return float(event.verdict == "a")


def _larger(
    store: Store, measure: Callable[[Item], tuple[float, float] | None]
) -> Callable[[Event], float | None]:
    """1 if the preferred reply measures more, 0 if less; None if they are not known to differ, or none is
    preferred.
    """

    def value(event: Event) -> float | None:
        sides = measure(store.items[event.item])
        if sides is None or sides[0] == sides[1] or event.preferred is None:
            return None
        return float((sides[1] > sides[0]) == (event.preferred == 1))

    return value


def _alpha(stands: Mapping[str, Mapping[str, Event]]) -> Estimate | None:
    """α over what each rater said at the first showing, with an interval over items."""
    units: dict[str, list[str]] = {}
    for slots in stands.values():
        for event in slots.values():
            if event.verdict != "skip" and not event.again:
                units.setdefault(event.item, []).append(event.meaning)
    alpha = krippendorff_alpha(list(units.values()))
    if alpha is None:
        return None
    low, high = alpha_interval(list(units.values()))
    n = sum(len(unit) > 1 for unit in units.values())
    return Estimate(value=alpha, low=min(low, alpha), high=max(high, alpha), n=n)


def _repeats(store: Store, stands: Mapping[str, Mapping[str, Event]]) -> Line:
    """How often a rater said the same when an item came again with its sides exchanged."""
    same = []
    for slots in stands.values():
        for event in slots.values():
            before = slots.get(f"{event.item}-0") if event.again else None
            if before is not None and "skip" not in (event.verdict, before.verdict):
                same.append(float(event.meaning == before.meaning))
    words = "the same rater says the same again, sides exchanged"
    return _line("repeats", words, same, drawn=not store.design.informative)


def as_rows(store: Store) -> dict[str, Any]:
    """The results as text for a page or a terminal, and as numbers."""
    lines = results(store)
    rows = []
    for line in lines:
        value = line.value
        text = "–" if value is None else value.text() if line.key == "alpha" else value.percent()
        n = "0" if value is None else f"{value.n:,}"
        rows.append([line.words, text, n, line.kind if value is not None else "–"])
    return {
        "set": store.folder.name,
        "items": len(store.items),
        "headers": ["What", "Value [95 %]", "n", "Interval"],
        "rows": rows,
        "raters": [
            [rater, f"{len(slots) - again:,} items", f"{again:,} again"]
            for rater, slots in store.standing().items()
            for again in [sum(event.again for event in slots.values())]
        ],
        "notes": [HARD if store.design.informative else CONTINUOUS],
        "numbers": {line.key: line.value and line.value.model_dump(mode="json") for line in lines},
    }
