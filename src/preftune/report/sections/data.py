"""data.json as blocks. Its keys depend on where the data came from, so nested counts become tables."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from preftune.records.run import DataFile, DataRecord
from preftune.report.blocks import Block, Bullets, Fold, Grid, Table, say
from preftune.report.text import Code, Prose, Text, clean, name, number, numbers, percent
from preftune.report.view import Row

HASH = 12  # characters shown of a SHA-256; the file has the whole
MAX_FILES = 20
FILE_COLUMNS = ("split", "read", "kept", "skipped", "sha256")
COUNTED = ("rows_read", "rows_kept", "rows_skipped", "files", "skipped_examples", "reasons", "notes")
BY_SPLIT = ("splits", "distinct_prompts", "words", "content_sha256", "prompt_overlap")
FACTS = {
    "duplicates": "Pairs that repeat another one word for word",
    "swapped": "Pairs that stand there both ways round",
}
LENGTHS = {"prompt": "Words of a prompt", "chosen": "Of a chosen response", "rejected": "Of a rejected one"}


def data_blocks(data: DataRecord) -> list[Block]:
    """Rows kept and rejected in a sentence, the splits in a table, other facts, a table for each group."""
    blocks: list[Block] = [*_rows(data), *_overlap(data.prompt_overlap)]
    if data.splits:
        blocks.append(Grid(table=_splits(data)))
    keys_above = (*COUNTED, *(BY_SPLIT if data.splits else ()))
    other_facts = {key: value for key, value in data.facts.items() if key not in keys_above}
    blocks += _facts(other_facts, data.notes)
    for key, value in other_facts.items():
        if key == "world":
            world = (*_facts(data.world), *(Grid(table=table) for table in _tables(data.world)))
            blocks.append(Fold(title="The world that the data was drawn from", blocks=world))
        elif key == "rejected" and data.reasons and data.rejected:
            blocks.append(Grid(table=_rejected(data)))
        else:
            blocks += [Grid(table=table) for table in _tables({key: value})]
    files = tuple(_files(data.files))
    return [*blocks, Fold(title="Files", blocks=files)] if files else blocks


def _facts(group: Row, notes: Sequence[str] = ()) -> Iterator[Block]:
    """What is no group of its own, as bullets, and notes in the end."""
    facts: list[Prose] = [
        (f"{FACTS.get(key) or _title(key)}: ", _value(key, value), ".")
        for key, value in group.items()
        if not isinstance(value, Mapping) and value not in (None, [], "")
    ]
    facts += [(f"{clean(note, 300)}.",) for note in notes]
    if facts:
        yield Bullets(items=tuple(facts))


def _tables(group: Row) -> Iterator[Table]:
    yield from (_table(key, value) for key, value in group.items() if isinstance(value, Mapping) and value)


def _overlap(overlap: Mapping[str, int]) -> Iterator[Block]:
    """Prompts that stand in two splits: a model could have seen in training what it is measured on."""
    if not overlap:
        return
    overlaps = [(name(pair), " ", _value("prompts", count)) for pair, count in overlap.items() if count]
    if not overlaps:
        yield say("No prompt is in two splits.")
        return
    pieces = [piece for pair in overlaps for piece in (", ", *pair)][1:]
    yield say("Prompts that stand in two splits: ", *pieces, ".")


def _splits(data: DataRecord) -> Table:
    """A row for each split: pairs, prompts, lengths (median, 95th percentile, longest), hash of its texts."""
    words, hashes = data.words, data.content_sha256
    kinds = [kind for kind in LENGTHS if any(kind in words.get(split, {}) for split in data.splits)]
    rows = []
    for split, size in data.splits.items():
        lengths = [_lengths(words.get(split, {}).get(kind, ())) for kind in kinds]
        prompts = data.distinct_prompts.get(split)
        distinct = "–" if prompts is None else _value("distinct", prompts)
        digest = "–" if split not in hashes else _value("sha256", hashes[split])
        rows.append((name(split), f"{size:,}", distinct, *lengths, digest))
    titles = [f"{LENGTHS[kind]} (median / 95 % / most)" for kind in kinds]
    return Table(headers=("Split", "Pairs", "Distinct prompts", *titles, "SHA-256"), rows=tuple(rows))


def _lengths(values: Sequence[int]) -> str:
    return " / ".join(f"{value:,}" for value in values) or "–"


def _rows(data: DataRecord) -> Iterator[Block]:
    """How many rows were read, kept, rejected and skipped."""
    read, accepted, skipped = data.rows_read, data.rows_kept, data.rows_skipped
    if read is None or accepted is None:
        return
    rejected = sum(data.rejected.values())
    share = f" ({percent(rejected / read)})" if read else ""
    malformed = f", {skipped:,} skipped as malformed" if skipped else ""
    yield say(f"{read:,} rows read, {accepted:,} kept, {rejected:,} rejected{share}{malformed}.")


def _files(files: Sequence[DataFile]) -> Iterator[Block]:
    """The files read, with their hashes."""
    if not files:
        return
    rows = tuple(
        (name(row.path), *(_value(column, _or_dash(getattr(row, column))) for column in FILE_COLUMNS))
        for row in files[:MAX_FILES]
    )
    yield Grid(table=Table(headers=("File", *(_title(column) for column in FILE_COLUMNS)), rows=rows))
    if len(files) > MAX_FILES:
        yield say(f"{len(files) - MAX_FILES} more files are listed in ", Code("data.json"), ".")


def _or_dash(value: int | str | None) -> int | str:
    return "–" if value is None else value


def _rejected(data: DataRecord) -> Table:
    """Rows by the reason why they were left out, in words where data.json has them."""
    rows = tuple(
        (name(reason), clean(data.reasons.get(reason, "–"), 200), _value("rows", count))
        for reason, count in data.rejected.items()
    )
    return Table(headers=("Rejected", "Because", "Rows"), rows=rows, word_columns=2)


def _table(key: str, group: Row) -> Table:
    """{name: value} as two columns; {name: {fact: value}} as a column for each fact."""
    inner = [value for value in group.values() if isinstance(value, Mapping)]
    if len(inner) != len(group):
        rows = tuple((name(label), _value(f"{key} {label}", value)) for label, value in group.items())
        return Table(headers=(_title(key), "Value" if "sha256" in key else "Rows"), rows=rows)
    columns = list(dict.fromkeys(fact for value in inner for fact in value))
    cells = [_column(fact, [value.get(fact, "–") for value in inner]) for fact in columns]
    table = zip(map(name, group), *cells, strict=True)
    return Table(headers=(_title(key), *(_words(fact) for fact in columns)), rows=tuple(table))


def _column(fact: Any, values: Sequence[Any]) -> list[Text]:
    """The cells of one fact; numbers that are not whole all have as many decimals."""
    number_texts = numbers(value if isinstance(value, float) else None for value in values)
    return [
        text if isinstance(value, float) else _value(fact, value)
        for value, text in zip(values, number_texts, strict=True)
    ]


def _words(key: Any) -> str:
    """`name_of_key` as words; the key may come from a file, so it is cleaned like any name."""
    return str(name(key)).replace("_", " ").replace("sha256", "SHA-256")


def _title(key: Any) -> str:
    words = _words(key)
    return words[:1].upper() + words[1:]


def _value(key: Any, value: Any) -> Text:
    """One fact as a cell; hashes are shortened."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return str(value) if "seed" in str(key) else f"{value:,}"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, str) and "sha256" in str(key):
        return Code(name(value)[:HASH])
    return name(flat(value))


def flat(value: Any) -> str:
    """A recorded value on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {flat(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return " ".join(flat(item) for item in value)
    return number(value) if isinstance(value, float) else str(value)
