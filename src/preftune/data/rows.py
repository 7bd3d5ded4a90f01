"""One row of a preference file, checked before anything else sees it, and the count of what became of the
rows.

The JSON loader of `datasets` replaces bytes that are not UTF-8, turns a missing key or NaN into None and a
stray number into a column of another type; so rows are checked here first.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from preftune.data.dialogue import Dialogue, Preference, Role, Turn
from preftune.data.hh import MARKER, RejectedRow, one_space, parse_prompt, parse_transcript, split_turns
from preftune.errors import DataError

COLUMNS = ("prompt", "chosen", "rejected")
ROLES: dict[str, Role] = {
    "user": "human",
    "human": "human",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",
}
HINT = (
    'a row is {"chosen": ..., "rejected": ...} with two HH transcripts, or {"prompt", "chosen", "rejected"} '
    "with texts or lists of {role, content}; mend the row, or set data.on_bad_row=skip to leave such rows out"
)
EXAMPLES = 20  # bad rows that are quoted in data.json when they are skipped

OnBadRow = Literal["error", "skip"]


class BadRow(Exception):
    """A malformed row. The message says what is wrong with it; whoever reads the file adds file and line."""


@dataclass(slots=True, kw_only=True)
class Tally:
    """What became of the rows of one file (or hub split)."""

    name: str
    split: str = "train"
    source: str = ""
    on_bad_row: OnBadRow = "error"
    sha256: str | None = None
    size: int | None = None  # bytes
    read: int = 0
    kept: list[Preference] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)
    bad: int = 0
    bad_examples: list[str] = field(default_factory=list)
    ignored_columns: set[str] = field(default_factory=set)

    def take(self, raw: bytes | Mapping[str, Any], where: str) -> None:
        """Count one row, a line of JSON or a record. `where` (file:line) is for the DataError of a malformed
        row.
        """
        self.read += 1
        try:
            record = parse_line(raw) if isinstance(raw, bytes) else raw
            others = {key: value for key, value in record.items() if key not in COLUMNS}
            place = {"source": self.source, "row": len(self.kept)}
            self.kept.append(replace(to_preference(record), columns=others, **place))
            self.ignored_columns.update(others)
        except RejectedRow as error:
            self.rejected[error.reason] += 1
        except BadRow as error:
            if self.on_bad_row == "error":
                raise DataError(f"{where}: {error}", HINT) from None
            self.bad += 1
            if len(self.bad_examples) < EXAMPLES:
                self.bad_examples.append(f"{where}: {error}")


def parse_line(line: bytes) -> dict[str, Any]:
    """One line of strict JSON that holds an object. Raises BadRow; never any other error."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow(f"byte {error.start + 1} of the line is not UTF-8") from None
    try:
        record = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        cut = "" if line.endswith(b"\n") else "; the last line looks cut off"
        raise BadRow(f"not JSON: {error.msg} at column {error.colno}: {_quote(text)}{cut}") from None
    except RecursionError:
        raise BadRow("brackets are nested too deep") from None
    except ValueError as error:  # a number too long to read
        raise BadRow(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise BadRow(f"the row is {_kind(record)}, not an object: {_quote(text)}")
    return record


def to_preference(record: Mapping[str, Any]) -> Preference:
    """A checked preference from a record in HH or TRL form. Raises BadRow (malformed) or RejectedRow
    (unusable).
    """
    chosen, rejected = _field(record, "chosen"), _field(record, "rejected")
    prompt = None
    if "prompt" in record:
        given = _field(record, "prompt")
        # A blank prompt column beside whole transcripts is a prompt left out, not an empty one.
        blank = isinstance(given, str) and not given.strip()
        if not (blank and isinstance(chosen, str) and MARKER.match(chosen)):
            prompt = parse_prompt(given) if isinstance(given, str) else _prompt_messages(given)
    return split_turns(_dialogue(chosen, prompt), _dialogue(rejected, prompt))


def _dialogue(value: str | list[Turn], prompt: Dialogue | None) -> Dialogue:
    """Prompt and response as one dialogue; a response column that repeats the prompt is accepted."""
    if isinstance(value, str):
        if prompt is None:
            return parse_transcript(value)
        if not MARKER.match(value):
            return Dialogue([*prompt, Turn("assistant", value)])
        turns = parse_transcript(value)
        if turns[: len(prompt)] != tuple(prompt):
            raise RejectedRow("role_marker_in_response")
        return turns
    if prompt is None or tuple(value[: len(prompt)]) == tuple(prompt):
        return Dialogue(value)
    return Dialogue([*prompt, *value])


def _prompt_messages(turns: list[Turn]) -> Dialogue:
    if turns[-1].role == "assistant":
        raise RejectedRow("prompt_ends_on_assistant")
    return Dialogue(turns)


def _field(record: Mapping[str, Any], key: str) -> str | list[Turn]:
    if key not in record:
        raise BadRow(f'no "{key}" in this row (it has: {_quote(", ".join(map(str, record)) or "nothing")})')
    value = record[key]
    if isinstance(value, list):
        return _messages(value, key)
    return _text(value, f'"{key}"')


def _messages(value: list[Any], key: str) -> list[Turn]:
    if not value:
        raise BadRow(f'"{key}" is an empty list')
    turns: list[Turn] = []
    unknown = False
    for number, message in enumerate(value):
        name = f'message {number + 1} of "{key}"'
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise BadRow(f'{name} is not an object with "role" and "content": {_quote(repr(message))}')
        role = _text(message["role"], f"the role of {name}")
        content = _text(message["content"], f"the content of {name}")
        unknown |= role not in ROLES
        turns.append(Turn(ROLES.get(role, "human"), one_space(content)))
    if unknown:
        raise RejectedRow("unsupported_role")
    return turns


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{name} is {_kind(value)}, not text")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRow(f"{name} holds half of a surrogate pair at character {error.start + 1}") from None
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _no_constant(name: str) -> None:
    raise BadRow(f"{name} is not JSON")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        twice = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
        raise BadRow(f"the key {_quote(twice)} appears twice")
    return record


def _quote(text: str) -> str:
    """A short piece of foreign text that is safe to print on a terminal."""
    return ascii(text if len(text) <= 60 else text[:57] + "...")
