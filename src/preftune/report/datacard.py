"""data.json as blocks. Its keys depend on where the data came from, so nested counts become tables."""

from collections.abc import Mapping
from typing import Any

from preftune.report.blocks import Block, Bullets, Grid, Table, say
from preftune.report.text import Code, Prose, Text, name, number, percent
from preftune.report.view import Row

HASH = 12  # characters shown of a SHA-256; the file has the whole


def data_blocks(data: Row) -> list[Block]:
    """Rows kept and rejected in a sentence, then every other fact, then a table for each group of counts."""
    blocks: list[Block] = []
    rejected = data.get("rejected")
    lost = _total(rejected)
    if isinstance(data.get("read"), int) and isinstance(data.get("kept"), int):
        share = f" ({percent(lost / data['read'])})" if data["read"] else ""
        blocks.append(say(f"{data['read']:,} rows read, {data['kept']:,} kept, {lost:,} rejected{share}."))
    elif rejected is not None:
        blocks.append(say(f"{lost:,} rows rejected."))
    facts: list[Prose] = [
        (f"{_title(key)}: ", _value(key, value), ".")
        for key, value in data.items()
        if not isinstance(value, Mapping)
        and key not in ("read", "kept", "rejected")
        and value not in (None, [], "")
    ]
    if facts:
        blocks.append(Bullets(items=tuple(facts)))
    groups = [(key, value) for key, value in data.items() if isinstance(value, Mapping) and value]
    return blocks + [Grid(table=_table(key, value)) for key, value in groups]


def _total(value: Any) -> int:
    """Sum of all whole numbers in a nested count."""
    if isinstance(value, Mapping):
        return sum(_total(item) for item in value.values())
    return value if isinstance(value, int) else 0


def _table(key: str, group: Row) -> Table:
    """{name: value} as two columns; {name: {fact: value}} as a column for each fact."""
    inner = [value for value in group.values() if isinstance(value, Mapping)]
    if len(inner) != len(group):
        rows = tuple((name(part), _value(part, value)) for part, value in group.items())
        return Table(headers=(_title(key), "Rows" if key == "rejected" else "Value"), rows=rows)
    columns = list(dict.fromkeys(fact for value in inner for fact in value))
    table = tuple(
        (name(part), *(_value(fact, value[fact]) if fact in value else "–" for fact in columns))
        for part, value in group.items()
    )
    return Table(headers=(_title(key), *(_title(fact) for fact in columns)), rows=table)


def _title(key: Any) -> str:
    """`name_of_key` as words; the key may come from a file, so it is cleaned like any name."""
    words = str(name(key)).replace("_", " ")
    return words[:1].upper() + words[1:]


def _value(key: Any, value: Any) -> Text:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if "seed" not in str(key) else str(value)
    if isinstance(value, float):
        return number(value)
    if isinstance(value, str) and "sha256" in f"{key}".lower():
        return Code(name(value)[:HASH])
    return name(flat(value))


def flat(value: Any) -> str:
    """A recorded value on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {flat(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return " ".join(flat(item) for item in value)
    return number(value) if isinstance(value, float) else str(value)
