"""The few kinds of block a report is made of. Strings are plain text; writers escape them."""

from dataclasses import dataclass
from typing import Literal

from preftune.report.text import Prose, Text


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of plain strings or code. The first `left` columns are words, the others are aligned right."""

    headers: tuple[str, ...]
    rows: tuple[tuple[Text, ...], ...]
    left: int = 1


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
class Quotes:
    """Texts of others side by side under a heading: each a (label, note, text)."""

    title: str
    texts: tuple[tuple[str, str, str], ...]
    kind: Literal["quotes"] = "quotes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A file shown as it is."""

    title: str
    language: str
    text: str
    kind: Literal["source"] = "source"


Block = Paragraph | Bullets | Grid | Picture | Quotes | Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A titled part of the report; `key` is its anchor."""

    key: str
    title: str
    blocks: tuple[Block, ...]


def say(*pieces: str) -> Paragraph:
    """A paragraph from pieces of plain text and code."""
    return Paragraph(prose=pieces)
