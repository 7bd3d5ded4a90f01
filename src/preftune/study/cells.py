"""How STUDY.md writes a number with its interval, and a table."""

from collections.abc import Mapping, Sequence
from typing import Any


def interval(numbers: Mapping[str, Any] | None, name: str, *, sign: bool = False, digits: int = 2) -> str:
    """`name` with the ends `name_low` and `name_high`, where they are known; a dash for what is not."""
    value = None if numbers is None else numbers[name]
    if numbers is None or value is None:
        return "-"
    form = f"+.{digits}f" if sign else f".{digits}f"
    if numbers.get(f"{name}_low") is None:
        return f"{value:{form}}"
    return f"{value:{form}} [{numbers[f'{name}_low']:{form}}, {numbers[f'{name}_high']:{form}}]"


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join("-" if cell is None else str(cell) for cell in cells) + " |"

    return "\n".join([line(heads), "|" + "---|" * len(heads), *(line(row) for row in rows)])
