"""A set of items and its judgements on disk: labels/SET/design.json, items.jsonl, one file a rater.

A rater's file only grows, and a line is on the disk before the page hears that it is saved, so that a kill at
any moment loses nothing that was said to be saved. Whoever writes holds the set's lock.
"""

import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from preftune.errors import ConfigError, DataError, InputMissing, UsageError
from preftune.hashing import sha256_file
from preftune.label.design import RATER, Design, Slot, queue, shared, slot_of
from preftune.label.items import Chosen, Item, find_source, read_items, readable
from preftune.label.judgements import Event, Judgement, Undone, standing
from preftune.records.base import first_fault, read_record, read_records, write_record
from preftune.rundir import RunDir, append_jsonl, read_object, sync, write_json, write_jsonl
from preftune.untrusted import clean

_NAMES = "raters: letters, digits, - and _"


class Conflict(Exception):
    """The slot was judged meanwhile, in another tab."""


class Store:
    """A set that has been begun. Reading needs no lock; `record`, `undo` and `tokens` are for its holder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not self._design.is_file():
            raise InputMissing(f"{folder} holds no set of items", "preftune label RUN begins one")
        self.design = read_record(self._design, Design)
        if sha256_file(self._items) != self.design.items_sha256:
            raise DataError(f"{self._items} was changed after judging began", Item.remedy)
        self.items = {item.id: item for item in read_records(self._items, Item)}
        self.events = {rater: self._read_events(rater) for rater in self._raters()}
        self._queues: dict[str, list[Slot]] = {}
        self._shared = shared(self.design, list(self.items.values()))

    @property
    def _design(self) -> Path:
        return self.folder / "design.json"

    @property
    def _items(self) -> Path:
        return self.folder / "items.jsonl"

    def file(self, rater: str) -> Path:
        return self.folder / f"{rater}.judgements.jsonl"

    def _raters(self) -> list[str]:
        """Those who are asked, and those whose judgements came from elsewhere."""
        on_disk = [
            path.name.removesuffix(".judgements.jsonl") for path in self.folder.glob("*.judgements.jsonl")
        ]
        return list(dict.fromkeys([*self.design.raters, *sorted(on_disk)]))

    def _read_events(self, rater: str) -> list[Event]:
        path = self.file(rater)
        events = read_records(path, Event, whole=False) if path.is_file() else []
        for line, event in enumerate(events, start=1):
            if not event.of and event.item not in self.items:
                raise DataError(f"{path}:{line}: no item {event.item!r:.40} in this set", Event.remedy)
        return events

    def standing(self) -> dict[str, dict[str, Event]]:
        """The judgements that stand, by rater and slot."""
        return {rater: standing(events) for rater, events in self.events.items()}

    def tokens(self) -> dict[str, str]:
        """The secret of each rater's link, and of the owner's, "": made once, for the user's eyes only."""
        path = self.folder / ".links.json"
        old: dict[str, Any] = read_object(path) if path.is_file() else {}
        tokens = {name: str(old.get(name) or secrets.token_urlsafe(24)) for name in ("", *self.design.raters)}
        if tokens != old:
            before = os.umask(0o077)  # others of this machine never see it
            try:
                write_json(path, tokens)
            finally:
                os.umask(before)
        return tokens

    def slots(self, rater: str) -> list[Slot]:
        """The rater's queue, without what somebody else has judged for her."""
        if rater not in self._queues:
            self._queues[rater] = queue(self.design, list(self.items.values()), rater)
        elsewhere = {
            event.item
            for name, events in self.events.items()
            if name != rater
            for event in standing(events).values()
        }
        judged = {event.item for event in standing(self.events[rater]).values()}
        gone = elsewhere - self._shared - judged
        return [slot for slot in self._queues[rater] if slot.item.id not in gone]

    def state(self, rater: str) -> dict[str, Any]:
        """What the rater's page shows next: how far she is, and a slot without names and scores, or None."""
        verdicts, slots = standing(self.events[rater]), self.slots(rater)
        pending = next((slot for slot in slots if slot.key not in verdicts), None)
        return {
            "rater": rater,
            "done": sum(slot.key in verdicts for slot in slots),
            "total": len(slots),
            "tags": list(self.design.tags),
            "last": list(verdicts.values())[-1].id if verdicts else None,
            "slot": pending and slot_fields(pending),
            "before": pending and self._before(rater, pending),
        }

    def _before(self, rater: str, slot: Slot) -> dict[str, Any] | None:
        """What was said of a slot and taken back, to begin from."""
        judgements = [event for event in self.events[rater] if not event.of and event.slot == slot.key]
        keys = ("verdict", "tags", "note", "corrected")
        return judgements[-1].model_dump(mode="json", include=set(keys)) if judgements else None

    def record(self, rater: str, judgement: Judgement, by: str = "page") -> None:
        """Keep a judgement; one that is kept already changes nothing. Conflict; UsageError: no such slot."""
        events = self.events[rater]
        if any(event.id == judgement.id for event in events):
            return
        if judgement.slot in standing(events):
            raise Conflict
        item, _, again = judgement.slot.partition("-")
        if by == "file":
            slot = slot_of(self.design, self.items[item], rater, again == "1")
        elif (slot := next((s for s in self.slots(rater) if s.key == judgement.slot), None)) is None:
            raise UsageError("no such item in this rater's list")
        if not set(judgement.tags) <= set(self.design.tags):
            raise UsageError("an unknown tag")
        row = judgement.model_dump(mode="json", exclude={"slot"})
        self._append(rater, {**row, "item": item, "again": again == "1", "a": slot.a, "by": by})

    def undo(self, rater: str, undone: Undone) -> None:
        """Take back the rater's last judgement; what is taken back already stays so. Conflict for another."""
        events = self.events[rater]
        if any(event.id == undone.id or event.of == undone.of for event in events):
            return
        stands = list(standing(events).values())
        if not stands or stands[-1].id != undone.of:
            raise Conflict
        self._append(rater, {"id": undone.id, "of": undone.of})

    def _append(self, rater: str, row: Mapping[str, Any]) -> None:
        seq = 1 + max((event.seq for events in self.events.values() for event in events[-1:]), default=0)
        event = Event.model_validate({"seq": seq, **row})
        path = self.file(rater)
        is_new = not path.exists()
        append_jsonl(path, {"seq": seq, **row})
        sync(path)
        if is_new:
            sync(self.folder)
        self.events[rater].append(event)


def slot_fields(slot: Slot) -> dict[str, Any]:
    """A slot as a rater sees it: blind, and with hidden characters made visible."""
    a, b = slot.item.replies[slot.a], slot.item.replies[1 - slot.a]
    prompt = [{"role": message.role, "text": clean(message.content, None)} for message in slot.item.prompt]
    return {"key": slot.key, "prompt": prompt, "a": clean(a, None), "b": clean(b, None)}


def find_set(run: RunDir, name: str | None, source: str | None) -> tuple[Path, Chosen | None]:
    """The folder of the set `name`, and what to make it of: None for a set that has been begun, unless
    `source` asks for something. A set that has been begun is on disk, whatever became of the models since.
    """
    if name is not None and not re.fullmatch(RATER, name):
        raise UsageError(f"{name[:40]!r} is no name of a set", "letters, digits, - and _")
    if name and (run.labels(name) / "design.json").is_file():
        return run.labels(name), find_source(run, source) if source else None
    origin = find_source(run, source)
    title = name or origin.name
    begun = {file.parent.name for file in run.path.glob("labels/*/design.json")}
    return run.labels(title), origin if title in begun else readable(run, origin)


def begin(folder: Path, source: Chosen | None, options: Mapping[str, Any]) -> Store:
    """Open a set, or begin it with these `options` (fields of `Design`; None where nothing was asked for).

    Raters may be added to a set that has been begun; another wish is a ConfigError.
    """
    settings = {key: value for key, value in options.items() if value is not None}
    if source is None:
        return _reopened(folder, settings)
    if (folder / "design.json").is_file():
        return _reopened(folder, settings | {"source": source.name})
    try:
        design = Design.model_validate({"source": source.name, **settings})
    except ValidationError as error:
        fault = first_fault(error)
        raise UsageError(f"{fault} ({_NAMES})" if fault.startswith("raters") else fault) from None
    items = read_items(source, design.seed, informative=design.informative, all_pairs=design.all_pairs)
    path = folder / "items.jsonl"
    write_jsonl(path, [item.model_dump(mode="json") for item in items[: design.limit]])
    row = design.model_dump(mode="json") | {"items_sha256": sha256_file(path)}
    write_record(folder / "design.json", row, Design)
    return Store(folder)


def _reopened(folder: Path, settings: Mapping[str, Any]) -> Store:
    store = Store(folder)
    row = store.design.model_dump(mode="json")
    for key, value in settings.items():
        if key != "raters" and row[key] != value:
            raise ConfigError(
                f"{folder} was begun with {key} {row[key]}, not {value}",
                "leave that option out, or begin another set with --set NAME",
            )
    joined = list(dict.fromkeys([*store.design.raters, *settings.get("raters", ())]))
    if joined == list(store.design.raters):
        return store
    try:
        write_record(folder / "design.json", row | {"raters": joined}, Design)
    except ValidationError as error:
        raise UsageError(f"{first_fault(error)} ({_NAMES})") from None
    return Store(folder)
