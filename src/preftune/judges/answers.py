"""Is the answer right, and in the format that was asked for?"""

import re
from typing import Any

_NUMBER = re.compile(
    r"(?:(?<!\w)-)?(?:\d[\d,]*(?:\.\d+)?|(?<![\w.])\.\d+)"
)  # not of "p.5", no minus in "10-15"
_BRACES = r"(?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*"  # as \frac{1}{2} has them, three deep
_MARKED = re.compile(rf"<answer>(.*?)</answer>|\\boxed\{{({_BRACES})\}}|####([^\n]*)", re.DOTALL)
_TAGGED = re.compile(
    r"\s*<think>(?:(?!</?think>|</?answer>).)+</think>\s*<answer>(?:(?!</?answer>).)+</answer>\s*", re.DOTALL
)


def exact(prompt: str, response: str, answer: Any = None) -> float | None:
    """1 if the response gives the column `answer`, else 0; None for a row without one.

    What is compared is the last part marked as an answer (`<answer>…</answer>`, `\\boxed{…}`, `#### …` to the
    end of the line), in the column as in the response: GSM8K's `answer` is a whole solution. Without such a
    mark it is the last number, where the answer is one, else the whole response. Case, punctuation at the
    ends and commas in numbers do not count.
    """
    if answer is None:
        return None
    target = _plain(_marked(str(answer)) or str(answer))
    if (marked := _marked(response)) is not None:
        return float(_plain(marked) == target)
    if _NUMBER.fullmatch(target):
        numbers = _NUMBER.findall(response)
        return float(bool(numbers) and _plain(numbers[-1]) == target)
    return float(_plain(response) == target)


def tagged(prompt: str, response: str) -> float:
    """1 for exactly `<think>…</think><answer>…</answer>`, neither of them empty; else 0."""
    return float(_TAGGED.fullmatch(response) is not None)


def _marked(text: str) -> str | None:
    marked = [next(group for group in groups if group) for groups in _MARKED.findall(text) if any(groups)]
    return marked[-1] if marked else None


def _plain(text: str) -> str:
    text = " ".join(text.split()).lstrip(" ,:;!?\"'").rstrip(" .,:;!?\"'").casefold()
    number = text.replace(",", "").lstrip("$")
    if not _NUMBER.fullmatch(number):
        return text.lstrip(" .,:;!?\"'")
    if number.lstrip("-").startswith("."):
        number = number.replace(".", "0.", 1)
    return number.rstrip("0").rstrip(".") if "." in number else number
