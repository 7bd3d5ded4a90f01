"""Is the answer right, and in the format that was asked for?"""

import re
from typing import Any

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_MARKED = re.compile(r"<answer>(.*?)</answer>|\\boxed\{([^{}]*)\}|####(.*)", re.DOTALL)
_TAGGED = re.compile(
    r"\s*<think>(?:(?!</?think>|</?answer>).)+</think>\s*<answer>(?:(?!</?answer>).)+</answer>\s*", re.DOTALL
)


def exact(prompt: str, response: str, answer: Any = None) -> float | None:
    """1 if the response gives the column `answer`, else 0; None for a row without one.

    What is compared is the last part marked as an answer (`<answer>…</answer>`, `\\boxed{…}`, `#### …`);
    without such a mark the last number, where the answer is one, else the whole response. Case, punctuation
    at the ends and commas in numbers do not count.
    """
    if answer is None:
        return None
    target = _plain(str(answer))
    marked = [next(text for text in groups if text) for groups in _MARKED.findall(response) if any(groups)]
    if marked:
        return float(_plain(marked[-1]) == target)
    if _NUMBER.fullmatch(target):
        numbers = _NUMBER.findall(response)
        return float(bool(numbers) and _plain(numbers[-1]) == target)
    return float(_plain(response) == target)


def tagged(prompt: str, response: str) -> float:
    """1 for exactly `<think>…</think><answer>…</answer>`, neither of them empty; else 0."""
    return float(_TAGGED.fullmatch(response) is not None)


def _plain(text: str) -> str:
    text = " ".join(text.split()).strip(" .,:;!?\"'").casefold()
    number = text.replace(",", "").lstrip("$")
    if not _NUMBER.fullmatch(number):
        return text
    return number.rstrip("0").rstrip(".") if "." in number else number
