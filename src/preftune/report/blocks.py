"""The few kinds of block a report is made of. Strings are plain text; writers escape them."""

from dataclasses import dataclass
from typing import Literal

from preftune.report.text import Prose, Text


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of plain strings or code. The first `word_columns` are words, the others are aligned right."""

    headers: tuple[str, ...]
    rows: tuple[tuple[Text, ...], ...]
    word_columns: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Paragraph:
    """Plain prose, with code for names."""

    prose: Prose
    kind: Literal["paragraph"] = "paragraph"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bullets:
    """A list."""

    items: tuple[Prose, ...]
    kind: Literal["bullets"] = "bullets"


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A table; cells are plain text or code."""

    table: Table
    kind: Literal["table"] = "table"


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A figure by its file name in figures/, with the sentence that stands for it where it cannot be seen."""

    file: str
    alt: str
    kind: Literal["picture"] = "picture"


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """A text of others. `shades` cuts it into (piece, level): how far each token moved the score, -4 to 4."""

    label: str
    note: str
    text: str
    shades: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """Texts that belong together: `lead` sums them up, `tags` and `values` are what they can be filtered by.

    `tags` are places in `Explorer.tags`; `values` are in the order of `Explorer.measures`, None if unknown.
    """

    title: str
    lead: str
    note: str
    passages: tuple[Passage, ...]
    tags: tuple[int, ...] = ()
    values: tuple[float | None, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One card, shown open."""

    card: Card
    kind: Literal["example"] = "example"


@dataclass(frozen=True, slots=True, kw_only=True)
class Explorer:
    """Cards that the page lets the reader search and filter; ANALYSIS.md quotes the first `quoted`."""

    key: str
    noun: str  # what the cards are: "prompts", "mistakes"
    quantity: str  # what the values are: "score", "confidence"
    cards: tuple[Card, ...]
    tags: tuple[tuple[str, int], ...] = ()  # with the number of cards
    measures: tuple[str, ...] = ()
    quoted: int = 5
    kind: Literal["explorer"] = "explorer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A file shown as it is."""

    title: str
    language: str
    text: str
    kind: Literal["source"] = "source"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """Details that a reader may open: closed on the page, in full in ANALYSIS.md."""

    title: str
    blocks: tuple["Block", ...]
    kind: Literal["fold"] = "fold"


Block = Paragraph | Bullets | Grid | Picture | Example | Explorer | Source | Fold


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A titled part of the report; `key` is its anchor, `short` its title in a list of sections.

    The page folds every section but the first. One that is `apart` is a file of its own beside ANALYSIS.md.
    """

    key: str
    title: str
    blocks: tuple[Block, ...]
    short: str = ""
    apart: bool = False


def say(*pieces: str) -> Paragraph:
    """A paragraph from pieces of plain text and code."""
    return Paragraph(prose=pieces)
