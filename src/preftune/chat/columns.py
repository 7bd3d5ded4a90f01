"""Replies side by side on a terminal, one below the other where that is no terminal or too narrow."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from preftune.untrusted import clean

NARROW = 28  # characters a column at least


def show(console: Console, heads: Sequence[str], texts: Sequence[str], notes: Sequence[str]) -> None:
    """`texts` are what models wrote: hidden characters are written out, nothing in them is markup."""
    texts = [clean(text.strip("\n"), None) for text in texts]
    if console.is_terminal and len(texts) > 1 and console.width // len(texts) >= NARROW:
        table = Table(box=None, padding=(0, 2, 0, 0), expand=True)
        for head in heads:
            table.add_column(Text(head, "bold"), ratio=1, overflow="fold")
        table.add_row(*map(Text, texts))
        if any(notes):
            table.add_row(*(Text(note, "bright_black") for note in notes))
        console.print(table)
        return
    for head, text, note in zip(heads, texts, notes, strict=True):
        console.print(Text(f"[{head}]{text if text.startswith(' ') else f' {text}'}"))
        if note:
            console.print(Text(f"    {note}", "bright_black"))
