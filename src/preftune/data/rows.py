"""One row of a file, checked before anything else sees it, and the count of what became of the rows.

The JSON loader of `datasets` replaces bytes that are not UTF-8, turns a missing key or NaN into None and a
stray number into a column of another type; so rows are checked here first.
"""

import json
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from preftune.data.checks import BadRow, is_empty, kind, quote
from preftune.data.dialogue import Dialogue, Kind, Preference, Scored
from preftune.data.formats import ranked, single
from preftune.data.formats.messages import conversation_in
from preftune.data.formats.table import FORMS, present_columns, read_keys, recognise, with_known_names
from preftune.data.hh import RejectedRow
from preftune.data.splits import named_split
from preftune.errors import DataError

HINT = (
    'a row is {"chosen": ..., "rejected": ...} with two HH transcripts, or {"prompt", "chosen", "rejected"} '
    f"with texts or lists of {{role, content}}; {FORMS}; mend the row, or set data.on_bad_row=skip to leave "
    "such rows out"
)
FOREIGN_HINT = (
    "the rows are in none of the forms in docs/data.md, and the run's data.columns name none of their "
    "columns; rename the columns in the file, mend the row, or leave such rows out by the run's "
    "data.on_bad_row=skip"
)
EXAMPLES = 20  # bad rows that are quoted in data.json when they are skipped

OnBadRow = Literal["error", "skip"]


@dataclass(slots=True, kw_only=True)
class Tally:
    """What became of the rows of one file."""

    name: str
    split: str = "train"
    source: str = ""
    on_bad_row: OnBadRow = "error"
    columns: Mapping[str, str] = field(default_factory=dict)  # known name -> the file's (data.columns)
    foreign: bool = False  # a file besides the run's own: columns of those names may be there, or not
    sha256: str | None = None
    size: int | None = None  # bytes
    read: int = 0
    rows: list[Preference] = field(default_factory=list)
    kinds: Counter[Kind] = field(default_factory=Counter)
    undesirable: list[tuple[Preference, str]] = field(default_factory=list)  # with their splits
    splits: list[str] = field(default_factory=list)  # of each of `rows`
    forms: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    bad: int = 0
    bad_examples: list[str] = field(default_factory=list)
    ignored_columns: set[str] = field(default_factory=set)
    noted: Counter[str] = field(default_factory=Counter)  # what was read in a way worth a sentence
    notes: list[str] = field(default_factory=list)  # about files that were not read
    first_keys: str = ""
    _scored: dict[Dialogue, list[tuple[Scored, str, Mapping[str, Any]]]] = field(default_factory=dict)

    def take(self, raw: Any, where: str) -> None:
        """Count one row: a line of JSON, a record, or what its reader found wrong with it. `where`
        (file:line) is for the DataError of a malformed row.
        """
        self.read += 1
        try:
            if isinstance(raw, BadRow):
                raise raw
            record = parse_line(raw) if isinstance(raw, bytes) else raw
            if not isinstance(record, dict):
                raise BadRow(f"the row is {kind(record)}, not an object: {quote(repr(record))}")
            columns = present_columns(record, self.columns) if self.foreign else self.columns
            self._take(with_known_names(record, columns), columns)
        except RejectedRow as error:
            self.rejected[error.reason] += 1
        except BadRow as error:
            if self.on_bad_row == "error":
                raise DataError(f"{where}: {error}", FOREIGN_HINT if self.foreign else HINT) from None
            self.bad += 1
            if len(self.bad_examples) < EXAMPLES:
                self.bad_examples.append(f"{where}: {error}")

    def _take(self, record: dict[str, Any], columns: Collection[str]) -> None:
        self.first_keys = self.first_keys or quote(", ".join(map(str, record)))
        form = recognise(record, columns)
        rows = form.read(record)
        self.forms[form.name] += 1
        unread = record.keys() - read_keys(form, record)
        self.ignored_columns.update(unread)
        further = {key: record[key] for key in record if key in unread or key in single.REPLIES}
        split = record.get("split")
        home = (named_split(split) if isinstance(split, str) else None) or self.split
        self.noted["split"] += home != self.split
        self.noted["system"] += any(not is_empty(record.get(name)) for name in ("system", "system_prompt"))
        self.noted["json"] += any(
            isinstance(value, str) and value[:1] in ("[", "{") and conversation_in(value) is not None
            for value in record.values()
        )
        for row in rows:
            if isinstance(row, Scored):
                self._scored.setdefault(row.prompt, []).append((row, home, further))
            else:
                self._keep(row, form.kind, home, further)

    def finish(self) -> None:
        """Make pairs of the rated replies, prompt by prompt, now that all rows are there."""
        for group in self._scored.values():
            try:
                for pair in ranked.pairs_of([row for row, *_ in group]):
                    self._keep(pair, "pairs", *group[0][1:])
            except RejectedRow as error:
                self.rejected[error.reason] += len(group)
        self._scored.clear()

    def _keep(self, row: Preference, kind: Kind, split: str, columns: Mapping[str, Any]) -> None:
        self.kinds[kind] += 1
        row = replace(row, source=self.source, row=len(self.rows), columns=columns)
        if kind == "unpaired" and not row.chosen:
            self.undesirable.append((row, split))
        else:
            self.rows.append(row)
            self.splits.append(split)


def parse_line(line: bytes) -> Any:
    """One line of strict JSON. Raises BadRow; never any other error."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow(f"byte {error.start + 1} of the line is not UTF-8") from None
    try:
        return json.loads(text, parse_constant=no_constant, object_pairs_hook=no_duplicates)
    except json.JSONDecodeError as error:
        cut = "" if line.endswith(b"\n") else "; the last line looks cut off"
        what = error.msg.removesuffix(" at")
        raise BadRow(f"not JSON: {what} at column {error.colno}: {quote(text)}{cut}") from None
    except RecursionError:
        raise BadRow("brackets are nested too deep") from None
    except ValueError as error:  # a number too long to read
        raise BadRow(f"not JSON: {error}") from None


def no_constant(name: str) -> None:
    raise BadRow(f"{name} is not JSON")


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        twice = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
        raise BadRow(f"the key {quote(twice)} appears twice")
    return record
