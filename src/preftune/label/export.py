"""Judgements as preference pairs that `preftune run`, any stage and TRL read; and a static file's results."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from preftune.errors import DataError
from preftune.label.items import Item
from preftune.label.judgements import Event, Judgement
from preftune.label.store import Conflict, Store
from preftune.records.base import first_fault
from preftune.rundir import read_object, write_jsonl


class Exported(NamedTuple):
    """How many pairs were written, how many of them with a rater's own reply, and how many judged items gave
    none.
    """

    pairs: int
    corrected: int
    without: int


def export(store: Store, path: Path) -> Exported:
    """Write the preferences in TRL's conversational form, with who judged and how many agreed.

    An item's preference is that of most raters, at their first showing of it; none where as many say
    something else, or where most say tie or both bad. A corrected reply is preferred to the one that its
    rater preferred, or to both where there was none.
    """
    by_item: dict[str, dict[str, Event]] = {}
    for rater, slots in store.standing().items():
        for event in slots.values():
            if event.verdict != "skip" and not event.again:
                by_item.setdefault(event.item, {})[rater] = event
    rows, corrected, without = [], 0, 0
    for item in store.items.values():
        by_rater = by_item.get(item.id, {})
        row = _majority(item, by_rater) if by_rater else None
        rows += [row] if row else []
        better = [row for rater, event in by_rater.items() for row in _corrections(item, rater, event)]
        rows += better
        corrected += len(better)
        without += bool(by_rater) and row is None
    if not rows:
        raise DataError(f"{store.folder} holds no preference yet", "judge first: preftune label RUN")
    write_jsonl(path, rows)
    return Exported(len(rows), corrected, without)


def _majority(item: Item, by_rater: dict[str, Event]) -> dict[str, Any] | None:
    votes = Counter(event.preferred for event in by_rater.values())
    (best, most), *runners_up = votes.most_common()
    if best is None or (runners_up and runners_up[0][1] == most):
        return None
    judges = ",".join(sorted(by_rater))
    ended = item.ended or (True, True)
    return _pair(item, item.replies[best], item.replies[1 - best]) | {
        "ended_chosen": ended[best],
        "ended_rejected": ended[1 - best],
        "judge": f"people:{judges}",
        "agreement": most / len(by_rater),
        "judgements": len(by_rater),
    }


def _corrections(item: Item, rater: str, event: Event) -> Iterator[dict[str, Any]]:
    text = event.corrected.strip()
    if not text:
        return
    ended = item.ended or (True, True)
    for place in (0, 1) if event.preferred is None else (event.preferred,):
        reply = item.replies[place]
        if text != reply.strip() and reply.strip():
            judged = {"judge": f"people:{rater}", "agreement": 1.0, "judgements": 1}
            ends = {"ended_chosen": True, "ended_rejected": ended[place]}
            yield _pair(item, text, reply) | ends | judged


def _pair(item: Item, chosen: str, rejected: str) -> dict[str, Any]:
    replies = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
    prompt = [message.model_dump() for message in item.prompt]
    return {"prompt": prompt, "chosen": replies[0], "rejected": replies[1], "item": item.id}


class Imported(NamedTuple):
    """What an import did: new judgements, and those that were there before."""

    new: int
    before: int


def take(store: Store, path: Path) -> Imported:
    """Add what a rater saved from a static file. All of it is checked first; what is there already stays.

    Any item of the set is taken: who joined after the file was made has changed who is asked what.
    DataError: not such a file, of another set, or by somebody who is not asked.
    """
    row = read_object(path)
    rater, rows = row.get("rater"), row.get("judgements")
    if row.get("set") != store.design.items_sha256 or not isinstance(rows, list):
        raise DataError(
            f"{path} holds no judgements of the set {store.folder.name}", "import it into its own set"
        )
    if not isinstance(rater, str) or rater not in store.design.raters:
        raise DataError(f"{path}: {str(rater)[:40]!r} is no rater of this set", "--rater NAME adds one")
    judgements = []
    for number, row in enumerate(rows, start=1):
        try:
            judgements.append(Judgement.model_validate(row))
        except ValidationError as error:
            raise DataError(
                f"{path}: judgement {number}: {first_fault(error)}", "ask the rater for it again"
            ) from None
        item, _, _ = judgements[-1].slot.partition("-")
        if item not in store.items or not set(judgements[-1].tags) <= set(store.design.tags):
            raise DataError(
                f"{path}: judgement {number} is of no item of this set, or has a tag that it lacks",
                "ask the rater for it again",
            )
    before = len(store.events[rater])
    for judgement in judgements:
        try:
            store.record(rater, judgement, by="file")
        except Conflict:  # judged on the page as well: the first stands
            continue
    new = len(store.events[rater]) - before
    return Imported(new, len(judgements) - new)
