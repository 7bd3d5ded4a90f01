"""What was looked at, on a terminal: in colours, and as plain text where it is piped or NO_COLOR is set.

Every text is somebody else's: hidden characters are written out, line ends are shown, nothing is markup.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from preftune.data.pieces import END, PADDING, REPLY, TEMPLATE
from preftune.inspection.rows import View
from preftune.records.run import TokenRow
from preftune.report.shades import level, scale_of
from preftune.untrusted import clean, printable

MOST = 400  # tokens that are shown of one part of a row, or of a reply
STYLES = {
    "system": "magenta",
    "human": "cyan",
    "assistant": "blue",
    TEMPLATE: "bright_black",
    REPLY: "green",
    END: "yellow",
    PADDING: "bright_black",
}
_UP = ("", "black on color(195)", "black on color(153)", "black on color(111)", "black on color(69)")
_DOWN = ("", "black on color(230)", "black on color(222)", "black on color(216)", "black on color(209)")


def visible_text(text: str) -> str:
    """A token's text on one line."""
    return clean(text, 200).replace("\n", "↵").replace("\t", "⇥")


def coloured(console: Console) -> bool:
    return console.is_terminal and not console.no_color and console.color_system is not None


def paint_views(console: Console, views: Sequence[View]) -> None:
    """A line a part: whose, how many tokens, whether the loss is taken there, and the tokens apart by "|"."""
    used = {token.part for view in views for token in view.tokens}
    legend = Text("colours: ")
    for part in (part for part in STYLES if part in used):
        legend.append(part, STYLES[part]).append("  ")
    if coloured(console):
        console.print(legend)
    for view in views:
        console.print()
        console.print(Text(printable(view.title), "bold"))
        for token, texts in view.segments:
            line = Text(f"  {token.part:<9} {len(texts):>4}  {'loss' if token.loss else '    '}  ")
            body = "" if token.part == PADDING else "|".join(map(visible_text, texts[:MOST]))
            more = f" … ({len(texts) - MOST} more tokens)" if len(texts) > MOST else ""
            line.append(body, f"{STYLES[token.part]}{' underline' if token.loss else ''}").append(more)
            if token.score:
                line.append("  <- the score is read here", "bold")
            console.print(line)
        for note in view.notes:
            console.print(Text(f"  {printable(note)}"))


def paint_replies(console: Console, rows: Sequence[Mapping[str, Any]], note: str) -> None:
    """Each reply: shaded once for each measure in colour, else a table with a line a token."""
    for number, row in enumerate(rows, start=1):
        record = TokenRow.model_validate(row)
        console.print()
        console.print(Text(printable(_heading(record, number)), "bold"))
        painted = _heat(record) if coloured(console) else _table(record)
        for line in painted:
            console.print(line)
    if note:
        console.print(Text(f"\n{note}"))


def _heading(row: TokenRow, number: int) -> str:
    facts = [f"{row.stage}: reply {number} to row {row.row}"]
    facts += [f"score {row.reply_score:+.2f}"] if row.reply_score is not None else []
    facts += [f"log(policy / {row.reference}) {sum(row.log_ratio):+.2f}, KL {sum(row.kl):.2f} nats"]
    return ", ".join([*facts, f"{len(row.texts)} tokens", "ends" if row.ended else "cut at the limit"])


def _heat(row: TokenRow) -> Iterator[Text]:
    for name, values in row.measures().items():
        scale = scale_of(values)
        line = Text(f"  {name:<20} ±{scale:<8.3g} ")
        for text, value in list(zip(row.texts, values, strict=True))[:MOST]:
            shade = level(value, scale)
            line.append(visible_text(text), _UP[shade] if shade >= 0 else f"{_DOWN[-shade]} underline")
        yield line


def _table(row: TokenRow) -> Iterator[Text]:
    measures = row.measures()
    yield Text("  " + "".join(f"{name:>21}" for name in measures) + "  token")
    for i, text in enumerate(row.texts[:MOST]):
        yield Text(
            "  " + "".join(f"{values[i]:>+21.4f}" for values in measures.values()) + f"  {visible_text(text)}"
        )
    if len(row.texts) > MOST:
        yield Text(f"  … ({len(row.texts) - MOST} more tokens)")


def paint_findings(console: Console, lines: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Each finding with its examples."""
    for text, examples in lines:
        console.print(Text(printable(text)))
        for example in examples:
            console.print(Text(f"    {visible_text(printable(example))}", STYLES[TEMPLATE]))
