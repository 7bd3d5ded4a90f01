"""Checks of values in foreign rows; error messages are safe to print."""

from typing import Any


class BadRow(Exception):
    """A malformed row. The message says what is wrong with it; the reader adds file and line."""


def text_of(value: Any, name: str) -> str:
    """`value` if it is valid Unicode text. Raises BadRow."""
    if not isinstance(value, str):
        raise BadRow(f"{name} is {kind(value)}, not text")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRow(f"{name} holds half of a surrogate pair at character {error.start + 1}") from None
    return value


def number_of(value: Any, name: str) -> float:
    """A finite number, also one written as text (CSV). Raises BadRow."""
    try:
        number = float(value) if isinstance(value, int | float | str) else None
    except (ValueError, OverflowError):
        number = None
    if number is None or isinstance(value, bool) or not abs(number) < float("inf"):
        raise BadRow(f"{name} is {kind(value)}, not a number")
    return number


def truth_of(value: Any, name: str) -> bool:
    """A bool, also written as 0 and 1 or as text (CSV). Raises BadRow."""
    words = {"true": True, "false": False, "1": True, "0": False}
    truth = words.get(str(value).lower()) if isinstance(value, bool | int | str) else None
    if truth is None:
        raise BadRow(f"{name} is {kind(value)}, not true or false")
    return truth


def kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def quote(text: str) -> str:
    """A short piece of foreign text that is safe to print on a terminal."""
    return ascii(text if len(text) <= 60 else text[:57] + "...")


def is_empty(value: Any) -> bool:
    """Whether a value is empty; so is the text of an empty JSON value."""
    return value is None or value in ("", "[]", "{}", "null", "None") or value in ([], {}, ())
