"""How a response reads: its length, how easy it is, how it sounds, which words it uses."""

import importlib
import re
from functools import cache
from typing import Any

from preftune.errors import InputMissing

SHORT, LONG = 20, 60  # words of a response that is neither
# Few and plain, to be copied and made longer: which words are rude depends on who reads.
RUDE = frozenset(
    {
        *("arse", "arsehole", "ass", "asshole", "bastard", "bitch", "bollocks", "bullshit"),
        *("crap", "cunt", "damn", "dick", "fuck", "piss", "shit"),
    }
)
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_END = re.compile(r"[.!?]+(?=\s|$)")
_VOWELS = re.compile(r"[aeiouy]+")


def length_band(prompt: str, response: str) -> float:
    """1 for 20 to 60 words; below falling to 0 at none, above to 0 at 120."""
    words = len(response.split())
    if words < SHORT:
        return words / SHORT
    return max(0.0, min(1.0, 2 - words / LONG))


def readability(prompt: str, response: str) -> float | None:
    """Flesch reading ease / 100: 206.835 - 1.015 words/sentences - 84.6 syllables/words (Flesch 1948).

    Above 0.9 is very easy, below 0.3 very hard. Syllables are groups of vowels, without a silent e in the
    end, so this is for English. None for a response without a word.
    """
    words = _WORD.findall(response.lower())
    if not words:
        return None
    sentences = max(len(_END.findall(response)), 1)
    syllables = sum(map(_syllables, words))
    return (206.835 - 1.015 * len(words) / sentences - 84.6 * syllables / len(words)) / 100


def _syllables(word: str) -> int:
    count = len(_VOWELS.findall(word))
    silent = word.endswith("e") and not word.endswith(("le", "ee")) and count > 1
    return max(count - silent, 1)


def sentiment(prompt: str, response: str) -> float:
    """VADER's compound score, -1 (very negative) to 1 (Hutto & Gilbert 2014); needs vaderSentiment."""
    return float(_vader().polarity_scores(response)["compound"])


@cache
def _vader() -> Any:
    try:
        return importlib.import_module("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer()
    except ModuleNotFoundError:
        raise InputMissing(
            "preftune.judges.style:sentiment needs the package vaderSentiment",
            "pip install 'preftune[judges]'",
        ) from None


def profanity(prompt: str, response: str) -> float:
    """Minus the share of words that are rude: 0 is clean, -1 nothing else."""
    words = _WORD.findall(response.lower())
    return -sum(word in RUDE for word in words) / max(len(words), 1)
