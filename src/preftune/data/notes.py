"""What became of the rows, for data.json and, in sentences, for the terminal before anything is trained."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from preftune.data.hh import REASONS
from preftune.data.rows import Tally

NAMED = "data.columns.chosen=NAME data.columns.rejected=NAME"
HOW = {
    "split": "rows of the split that their column split names",
    "system": "rows with a system column, which is read as the system message",
    "json": "rows with conversations as JSON text, which are read as conversations",
}


def rows_report(tallies: Sequence[Tally]) -> dict[str, Any]:
    """Counts by file and by reason; JSON-able."""
    rejected = sum((tally.rejected for tally in tallies), Counter[str]())
    files = [
        {
            "path": tally.name,
            "split": tally.split,
            "source": tally.source,
            "sha256": tally.sha256,
            "bytes": tally.size,
            "read": tally.read,
            "kept": len(tally.rows),
            "rejected": dict(sorted(tally.rejected.items())),
            "skipped": tally.bad,
        }
        for tally in tallies
    ]
    report = {
        "rows_read": sum(tally.read for tally in tallies),
        "rows_kept": sum(len(tally.rows) for tally in tallies),
        "rejected": dict(sorted(rejected.items())),
        "reasons": {reason: REASONS[reason] for reason in sorted(rejected)},
        "rows_skipped": sum(tally.bad for tally in tallies),
        "skipped_examples": [example for tally in tallies for example in tally.bad_examples][:20],
        "ignored_columns": sorted(set().union(*(tally.ignored_columns for tally in tallies))),
        "files": files,
    }
    notes = list(_notes(tallies))
    return report | ({"notes": notes} if notes else {})


def reasons_of(tallies: Sequence[Tally]) -> str:
    """Counts of the rows that cannot be used, each with its reason in words."""
    rejected = sum((tally.rejected for tally in tallies), Counter[str]())
    return ", ".join(f"{n} {reason} ({REASONS[reason]})" for reason, n in rejected.most_common())


def _notes(tallies: Sequence[Tally]) -> Iterator[str]:
    for tally in tallies:
        yield from tally.notes
    forms = sum((tally.forms for tally in tallies), Counter[str]())
    if set(forms) - {"preference pairs"}:
        yield "rows read as " + ", ".join(f"{name} ({n:,})" for name, n in forms.most_common())
    noted = sum((tally.noted for tally in tallies), Counter[str]())
    yield from (f"{HOW[kind]}: {n:,}" for kind, n in noted.items() if n)
    if reasons := reasons_of(tallies):
        yield f"left out: {reasons}"
    if undesirable := sum(len(tally.undesirable) for tally in tallies):
        yield f"{undesirable:,} undesirable replies: read by stages that learn from labels, by no other"
    if bad := sum(tally.bad for tally in tallies):
        yield f"left out: {bad:,} malformed rows; examples are in data.json"
    if ignored := sorted(set().union(*(tally.ignored_columns for tally in tallies))):
        more = f" and {len(ignored) - 12} more" if len(ignored) > 12 else ""
        yield f"columns not read: {', '.join(map(ascii, ignored[:12]))}{more}"
    if len(ignored) > 1 and set(forms) == {"prompts"}:
        yield f"if two of them are replies, say which: {NAMED}"
