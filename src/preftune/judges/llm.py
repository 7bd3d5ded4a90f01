"""Which of two replies a language model finds better: the question by a template, and its verdict.

The form is that of MT-Bench's pairwise judge (Zheng et al. 2023, arXiv:2306.05685, figure 5): [[A]], [[B]],
or [[C]] for a tie. Models prefer a place (section 3.3 there), so that whoever asks does it in both orders.
"""

import re
from importlib import resources
from pathlib import Path
from typing import Literal

from preftune.errors import ConfigError, InputMissing

Verdict = Literal["first", "second", "tie"]
MAX_TEMPLATE = 1 << 16
_FIELDS = ("prompt", "first", "second")
_FIELD = re.compile(r"\{(prompt|first|second)\}")
_MARK = re.compile(r"\[\[ ?(A|B|C|tie) ?\]\]", re.IGNORECASE)
_ALONE = re.compile(
    r"[\W_]*(?:(?:verdict|answer|winner|choice|reply|is)[\W_]+)*(A|B|C|tie)[\W_]*", re.IGNORECASE
)
_VERDICTS: dict[str, Verdict] = {"a": "first", "b": "second", "c": "tie", "tie": "tie"}
_LAST = 200  # characters of a last line that may be a verdict without brackets


def read_template(path: str | None) -> str:
    """The text of a template, the shipped one for None. InputMissing or ConfigError, naming the file."""
    if path is None:
        shipped = resources.files("preftune") / "judges" / "templates" / "pairwise.txt"
        return shipped.read_text(encoding="utf-8")
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_TEMPLATE + 1)
        text = content.decode("utf-8")
    except OSError as error:
        raise InputMissing(f"llm.template: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"llm.template: {path} is not UTF-8 text (byte {error.start})") from None
    if len(content) > MAX_TEMPLATE:
        raise ConfigError(f"llm.template: {path} has more than {MAX_TEMPLATE:,} bytes")
    if missing := [name for name in _FIELDS if f"{{{name}}}" not in text]:
        raise ConfigError(
            f"llm.template: {path} lacks {', '.join(f'{{{name}}}' for name in missing)}",
            "it is the whole question, with the places for the conversation and the two replies",
        )
    return text


def question(template: str, prompt: str, first: str, second: str) -> str:
    """The template filled in, once: braces in the texts stay what they are."""
    texts = {"prompt": prompt, "first": first, "second": second}
    return _FIELD.sub(lambda field: texts[field[1]], template).strip()


def verdict(answer: str) -> Verdict | None:
    """The last mark [[A]], [[B]] or [[C]]; without one, a last line that is nothing but a letter, or "tie".
    None where the answer says neither. What stands in `<think>…</think>` says nothing.
    """
    answer = answer.rpartition("</think>")[2].partition("<think>")[0]
    if marks := _MARK.findall(answer):
        return _VERDICTS[marks[-1].lower()]
    last = answer.strip().rpartition("\n")[2]
    alone = _ALONE.fullmatch(last) if len(last) <= _LAST else None
    return _VERDICTS[alone[1].lower()] if alone else None


def is_bare(answer: str) -> bool:
    """Whether an answer is a mark or its letter and nothing else."""
    text = answer.strip()
    return _MARK.fullmatch(text) is not None or text.lower() in _VERDICTS
