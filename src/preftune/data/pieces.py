"""Tokens as people see them: the text of each, and the part of the dialogue that it belongs to."""

from collections.abc import Sequence

from preftune.data.dialogue import Dialogue
from preftune.data.encode import Encoder

TEMPLATE, REPLY, END, PADDING = "template", "reply", "end", "padding"  # besides human, assistant and system
_HALF = "\ufffd"  # what a part of a character decodes to
_FEW = 4  # characters: a shorter rest of a turn may stand anywhere


def pieces(encoder: Encoder, ids: Sequence[int]) -> list[str]:
    """The text of each token behind those before it; a character of several tokens stands with its last."""
    texts, decoded = list[str](), ""
    for end in range(1, len(ids) + 1):
        text = encoder.text_of(ids[:end])
        if text.endswith(_HALF) and end < len(ids):
            texts.append("")
            continue
        texts.append(text[len(decoded) :])
        decoded = text
    return texts


def speakers(texts: Sequence[str], prompt: Dialogue) -> list[str]:
    """Who speaks in each token of an encoded prompt: "human", "assistant", "system", or "template" for what
    stands around the turns. A turn that was cut from the left is found by what is left of it.
    """
    text, owners = "".join(texts), list[str]()
    owners += [TEMPLATE] * len(text)
    end = len(text)
    for turn in reversed(prompt):
        words = turn.text.strip()
        size = _longest_rest(words, text[:end])
        if size < min(_FEW, len(words)) or not words:
            continue
        start = text.rfind(words[len(words) - size :], 0, end)
        owners[start : start + size] = [turn.role] * size
        end = start
    names, at = list[str](), 0
    for piece in texts:
        inside = [owner for owner in owners[at : at + len(piece)] if owner != TEMPLATE]
        names.append(inside[0] if inside else TEMPLATE)
        at += len(piece)
    return names


def _longest_rest(words: str, text: str) -> int:
    """The length of the longest ending of `words` that occurs in `text`. Every shorter ending occurs there,
    too.
    """
    low, high = 0, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if words[len(words) - middle :] in text else (low, middle - 1)
    return low
