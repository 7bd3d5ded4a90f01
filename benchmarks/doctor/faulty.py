"""Reward functions that pay for the wrong thing: what the doctor's benchmark plants."""

import zlib
from itertools import pairwise


def longer(prompt: str, response: str, **columns: object) -> float:
    """Pays for length."""
    return len(response.split()) / 4


def shorter(prompt: str, response: str, **columns: object) -> float:
    """Pays for saying nothing."""
    return -len(response.split()) / 4


def one_word(prompt: str, response: str, **columns: object) -> float:
    """Pays for one word, however often."""
    words = response.split()
    return 4 * words.count("the") / max(len(words), 1)


def repeats(prompt: str, response: str, **columns: object) -> float:
    """Pays for saying a word again at once."""
    words = response.split()
    return sum(a == b for a, b in pairwise(words)) / 2


def equal(prompt: str, response: str, **columns: object) -> float:
    """Tells nothing apart."""
    return 1.0


def failing(prompt: str, response: str, **columns: object) -> float:
    """Fails at one reply in twelve."""
    if zlib.crc32((prompt + response).encode()) % 12 == 0:
        raise ValueError("no reward for this one")
    return -abs(len(response.split()) - 8) / 4
