"""ANALYSIS.md: the report's sections as Markdown, in which no text of a data set or model is markup.

Long sections of texts and settings are files of their own under analysis/, which it links.
"""

from collections.abc import Iterable, Iterator, Sequence

from preftune.report.blocks import (
    Block,
    Bullets,
    Card,
    Example,
    Explorer,
    Fold,
    Grid,
    Paragraph,
    Picture,
    Section,
    Source,
    Table,
)
from preftune.report.sentences import summary
from preftune.report.text import fenced, markdown, name
from preftune.report.view import RunView

FOLDER = "analysis"


def analysis_text(run: RunView, sections: Sequence[Section]) -> str:
    """ANALYSIS.md, which begins with the summary and links the sections that stand apart."""
    blocks = [f"# Analysis of {markdown((name(run.name),))}", markdown((summary(run),))]
    for section in sections:
        if not section.apart:
            blocks += [f"## {markdown((section.title,))}", *_blocks(section.blocks, "")]
    if links := [f"- [{markdown((s.title,))}]({FOLDER}/{s.key}.md)" for s in sections if s.apart]:
        blocks += ["## More", "\n".join(links)]
    blocks.append(
        "---\n\nWritten by preftune from the files of this run. `report.html` shows the same in a browser."
    )
    return "\n\n".join(blocks) + "\n"


def apart_texts(sections: Iterable[Section]) -> dict[str, str]:
    """The sections that stand apart, by the path of their file in the run directory."""
    return {
        f"{FOLDER}/{section.key}.md": "\n\n".join(
            [f"# {markdown((section.title,))}", *_blocks(section.blocks, "../"), "[Back](../ANALYSIS.md)\n"]
        )
        for section in sections
        if section.apart
    }


def _blocks(blocks: Iterable[Block], root: str) -> Iterator[str]:
    for block in blocks:
        yield from _lines(block, root)


def _lines(block: Block, root: str) -> Iterator[str]:
    match block:
        case Paragraph(prose=prose):
            yield markdown(prose)
        case Bullets(items=items):
            yield "\n".join(f"- {markdown(item)}" for item in items)
        case Grid(table=table):
            yield table_text(table)
        case Picture(file=file, alt=alt):
            words = alt.translate({ord("["): "(", ord("]"): ")"})  # a bracket would end the alternative text
            yield f"![{markdown((words,))}]({root}figures/{file})"
        case Example(card=card):
            yield from _card(card)
        case Explorer(cards=cards, quoted=quoted):
            for card in cards[:quoted]:
                heading = f"{card.title}: {card.note}" if card.note else card.title
                yield f"### {markdown((heading,))}"
                yield from _card(card)
        case Fold(title=title, blocks=blocks):
            yield f"**{markdown((title,))}**"
            yield from _blocks(blocks, root)
        case Source(title=title, language=language, text=text):
            yield f"{markdown((title,))}:\n\n{fenced(text, language, limit=None)}"


def _card(card: Card) -> Iterator[str]:
    for passage in card.passages:
        note = f" ({passage.note})" if passage.note else ""
        yield f"**{markdown((f'{passage.label}{note}',))}**\n\n{fenced(passage.text)}"


def table_text(table: Table) -> str:
    """A Markdown table; numbers to the right."""
    rows = [[markdown((cell,), in_table=True) for cell in row] for row in (table.headers, *table.rows)]
    rule = ["---"] * table.word_columns + ["---:"] * (len(table.headers) - table.word_columns)
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))
