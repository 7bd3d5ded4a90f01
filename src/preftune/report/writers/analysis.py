"""ANALYSIS.md: the report's sections as Markdown, in which no text of a data set or model is markup."""

from collections.abc import Iterable, Iterator

from preftune.report.blocks import (
    Block,
    Bullets,
    Explorer,
    Fold,
    Grid,
    Paragraph,
    Picture,
    Section,
    Source,
    Table,
)
from preftune.report.claims import verdict
from preftune.report.text import fenced, markdown, name
from preftune.report.view import RunView


def analysis_text(run: RunView, sections: Iterable[Section]) -> str:
    """The whole of ANALYSIS.md. The first paragraph is the verdict."""
    parts = [f"# Analysis of {markdown((name(run.name),))}", markdown((verdict(run),))]
    for section in sections:
        parts.append(f"## {markdown((section.title,))}")
        for block in section.blocks:
            parts += _lines(block)
    parts.append(
        "---\n\nWritten by preftune from the files of this run. `report.html` shows the same in a browser."
    )
    return "\n\n".join(parts) + "\n"


def _lines(block: Block) -> Iterator[str]:
    match block:
        case Paragraph(prose=prose):
            yield markdown(prose)
        case Bullets(items=items):
            yield "\n".join(f"- {markdown(item)}" for item in items)
        case Grid(table=table):
            yield table_text(table)
        case Picture(file=file, alt=alt):
            words = alt.translate({ord("["): "(", ord("]"): ")"})  # a bracket would end the alternative text
            yield f"![{markdown((words,))}](figures/{file})"
        case Explorer(cards=cards, quoted=quoted):
            for card in cards[:quoted]:
                heading = f"{card.title}: {card.note}" if card.note else card.title
                yield f"### {markdown((heading,))}"
                for passage in card.passages:
                    note = f" ({passage.note})" if passage.note else ""
                    yield f"**{markdown((f'{passage.label}{note}',))}**\n\n{fenced(passage.text)}"
        case Fold(title=title, blocks=blocks):
            yield f"**{markdown((title,))}**"
            for inner in blocks:
                yield from _lines(inner)
        case Source(title=title, language=language, text=text):
            yield f"{markdown((title,))}:\n\n{fenced(text, language, limit=None)}"


def table_text(table: Table) -> str:
    """A Markdown table; numbers to the right."""
    rows = [[markdown((cell,), in_table=True) for cell in row] for row in (table.headers, *table.rows)]
    rule = ["---"] * table.left + ["---:"] * (len(table.headers) - table.left)
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))
