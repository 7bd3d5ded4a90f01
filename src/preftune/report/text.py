"""Text that came from a data set, a model or a name, made safe to show; and numbers made short.

Everything a report shows passes through here once. Nothing here trusts its input: a response may hold
terminal escapes, right-to-left overrides, backticks, HTML, or half of a surrogate pair.
"""

import math
import re
from collections.abc import Iterable

from preftune.untrusted import MAX_QUOTE, clean

MAX_NAME = 120

# The last two: GitHub makes a link of a bare address.
_MARKDOWN = re.compile(r"[\\`*<>~$&]|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[:])|:(?=//)|(?<=\b[wW]{3})\.")
_BLOCK_START = re.compile(r"^(\s*\d*)([#+=-](?![\d.])|(?<=\d)[.)](?=\s))")


class Code(str):
    """A name, path or other literal: shown as code, never read as markup."""

    __slots__ = ()


Text = str | Code
Prose = tuple[Text, ...]


def name(text: object, limit: int = MAX_NAME) -> Code:
    """An untrusted name on one line, as code."""
    return Code(" ".join(clean(text, limit).split()))


def cut_note(characters: int) -> str:
    """What stands where a text was cut, as `clean` writes it."""
    return f" … ({characters} more characters)"


def fenced(text: object, language: str = "text", limit: int | None = MAX_QUOTE) -> str:
    """A Markdown code block whose fence is longer than any run of backticks inside it."""
    body = clean(str(text).strip("\n"), limit)
    fence = "`" * max(3, longest_run(body) + 1)
    return f"{fence}{language}\n{body}\n{fence}"


def code_span(text: str, *, in_table: bool = False) -> str:
    """A Markdown code span; a pipe needs a backslash inside a table even there (GFM, section 4.10)."""
    body = " ".join(clean(text).split()) or " "
    ticks = "`" * (longest_run(body) + 1)
    pad = " " if body[0] == "`" or body[-1] == "`" else ""
    return f"{ticks}{pad}{body.replace('|', chr(92) + '|') if in_table else body}{pad}{ticks}"


def markdown(pieces: Prose, *, in_table: bool = False) -> str:
    """Pieces of prose as one line of Markdown in which only our own structure is markup."""
    rendered = [
        code_span(piece, in_table=in_table) if isinstance(piece, Code) else _escape(piece, in_table)
        for piece in pieces
    ]
    line = "".join(rendered)
    return line if in_table else _BLOCK_START.sub(r"\1\\\2", line)


def _escape(text: str, in_table: bool) -> str:
    line = re.sub(r"\s*\n\s*", " ", clean(text, None))
    escaped = _MARKDOWN.sub(r"\\\g<0>", line)
    return escaped.replace("|", r"\|") if in_table else escaped


def longest_run(text: str) -> int:
    """Length of the longest run of backticks."""
    return max((len(run) for run in re.findall("`+", text)), default=0)


def number(value: float | None, *, sign: bool = False) -> str:
    """A number with three significant digits (at least two decimals below 100); a dash for none."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    if size and size < 0.001:
        text = f"{value:.1e}"
        return f"+{text}" if sign and value > 0 else text
    text = f"{value:.{_decimals(size)}f}"
    return f"+{text}" if sign and value > 0 else text


def numbers(values: Iterable[float | None]) -> list[str]:
    """The cells of a column of numbers, each with the decimals that `number` gives the largest of them."""
    cells = list(values)
    largest = max((abs(value) for value in cells if value is not None and math.isfinite(value)), default=0.0)
    decimals = _decimals(largest)
    return [
        number(value)
        if value is None or not math.isfinite(value) or largest < 0.001
        else f"{value:.{decimals}f}"
        for value in cells
    ]


def _decimals(size: float) -> int:
    integer_digits = len(str(int(size))) if size >= 1 else 0
    return max(0 if size >= 100 else 2, 3 - integer_digits)


def percent(value: float | None) -> str:
    """A share as a percentage."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{100 * value:.1f} %"


def duration(seconds: float | None) -> str:
    """Seconds as a person would say them."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, left_over = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {left_over} s"


def join(items: list[str]) -> str:
    """Items as English: a, a and b, a, b and c."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else ""
