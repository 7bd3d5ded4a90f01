"""The forms of rows that are read, by the keys that identify them; docs/data.md shows an example of each."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from preftune.data.checks import BadRow, quote
from preftune.data.dialogue import Kind, Row
from preftune.data.formats import pairs, ranked, single

ALWAYS = {"system", "system_prompt", "split", *pairs.UNREAD_COLUMNS}


@dataclass(frozen=True, slots=True)
class Format:
    """A form of rows: the keys that identify it, what it becomes, and who reads it."""

    name: str
    needs: tuple[str, ...]
    kind: Kind
    read: Callable[[dict[str, Any]], Sequence[Row]]
    also: tuple[str, ...] = ()  # further keys that are read if the row has them

    @property
    def keys(self) -> set[str]:
        """All that it reads, the prompt's aside."""
        return {key for need in (*self.needs, *self.also) for key in need.split("|")}


# The first form whose keys are all there is taken. `a|b` is either.
FORMATS = (
    Format("preference pairs", ("chosen", "rejected"), "pairs", pairs.pair, ("prompt",)),
    Format(
        "PKU-SafeRLHF",
        ("prompt", "response_0", "response_1", "better_response_id|safer_response_id"),
        "pairs",
        pairs.safe_rlhf,
    ),
    Format(
        "HelpSteer2 preferences",
        ("prompt", "response_1", "response_2", "preference_strength"),
        "pairs",
        partial(pairs.strength, names=("response_1", "response_2"), key="preference_strength"),
    ),
    Format(
        "HelpSteer3 preferences",
        ("context|prompt", "response1", "response2", "overall_preference"),
        "pairs",
        partial(pairs.strength, names=("response1", "response2"), key="overall_preference"),
    ),
    Format("SHP", ("history", "human_ref_A", "human_ref_B", "labels"), "pairs", pairs.shp),
    Format("arena votes", ("conversation_a", "conversation_b", "winner"), "pairs", pairs.arena),
    Format("Nectar", ("prompt", "answers"), "pairs", ranked.nectar),
    Format("UltraFeedback", ("instruction|prompt", "completions"), "pairs", ranked.ultrafeedback),
    Format("HelpSteer ratings", ("prompt", "response", "helpfulness"), "pairs", ranked.helpsteer),
    Format(
        "replies",
        ("prompt|instruction|question|query", "|".join(single.REPLIES)),
        "unpaired",
        single.reply,
        single.LABELS,
    ),
    Format("conversations", ("messages|conversations",), "unpaired", single.conversation, single.LABELS),
    Format("text", ("text",), "text", single.text),
    Format("prompts", ("prompt|question|instruction|query",), "prompts", single.prompt_only),
)
SYNONYMS = {
    "chosen_response": "chosen",
    "rejected_response": "rejected",
    "chosen.responses": "chosen",
    "rejected.responses": "rejected",
    "chosen.suggestion": "chosen",
    "rejected.suggestion": "rejected",
}
KNOWN = {
    *(key for form in FORMATS for key in form.keys),
    *(*ALWAYS, *SYNONYMS, *pairs.PROMPTS),
}
FORMS = "the forms of rows are in docs/data.md; data.columns.chosen=NAME and the like say what columns mean"


def recognise(record: Mapping[str, Any], named: Collection[str] = ()) -> Format:
    """The first form that fits a row's keys; if the user `named` columns, the fitting form that reads most of
    them. Raises BadRow, which says what keys there are and what is needed.
    """
    fitting = (
        form for form in FORMATS if all(any(key in record for key in need.split("|")) for need in form.needs)
    )
    most = (lambda form: len(form.keys & set(named))) if named else None
    form = max(fitting, key=most, default=None) if most else next(fitting, None)
    if form is None:
        raise BadRow(f"{_missing_column(record)} (it has: {quote(', '.join(map(str, record)) or 'nothing')})")
    return form


def _missing_column(record: Mapping[str, Any]) -> str:
    missing = "chosen" if "chosen" not in record else "rejected"
    return f'no "{missing}" in this row, nor the columns of another form'


def read_keys(form: Format, keys: Iterable[str]) -> set[str]:
    """Those keys of a row that its form looks at: its own, one prompt, and what must be empty."""
    prompt = next((name for name in pairs.PROMPTS if name in keys), None)
    return form.keys | ALWAYS | ({prompt, "input"} if prompt == "instruction" else {str(prompt)})


def with_known_names(record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row under the names that are known here: the columns that the user named, then synonyms.

    A name may lead inside of an object: "response.text". Raises BadRow for one that is not there.
    """
    row = dict(record)
    named = {canonical: _at(record, name) for canonical, name in columns.items()}
    for name in columns.values():
        row.pop(name, None)
    row |= named
    for name, canonical in SYNONYMS.items():
        if name in row and row.get(canonical) is None:
            row[canonical] = row.pop(name)
    return row


def present_columns(record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, str]:
    """The columns that the user named, as far as the row has them."""
    columns_present = {}
    for canonical, name in columns.items():
        with suppress(BadRow):
            _at(record, name)
            columns_present[canonical] = name
    return columns_present


def _at(record: Mapping[str, Any], name: str) -> Any:
    value: Any = record
    for key in [name] if name in record else name.split("."):
        if not isinstance(value, dict) or key not in value:
            columns = quote(", ".join(map(str, record)) or "nothing")
            raise BadRow(f"no column {quote(name)}, which data.columns names (it has: {columns})")
        value = value[key]
    return value
