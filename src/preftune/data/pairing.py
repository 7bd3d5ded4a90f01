"""Pairs of scored replies: which two, which of them is chosen, and how well anybody could tell.

Labels may be drawn: the first of two is chosen with probability sigmoid((s1 - s2) / temperature) (Bradley &
Terry 1952). The best accuracy that a judge can then reach is the mean of max(p, 1 - p).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from random import Random
from typing import Literal

from preftune.data.dialogue import ROLES, Dialogue
from preftune.seeding import derive_seed

Json = dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How replies to one prompt become pairs."""

    pairing: Literal["best_worst", "all", "random"]
    ties: Literal["drop", "random"]
    tie_margin: float
    temperature: float | None  # of the labels; None: the higher score is chosen


@dataclass(frozen=True, slots=True)
class Pair:
    """Places of two replies, and the probability with which the chosen one was to be chosen."""

    chosen: int
    rejected: int
    chance: float


def pairs_of(texts: Sequence[str], scores: Sequence[float], rule: Rule, seed: int) -> list[Pair | None]:
    """The pairs of one prompt's replies; None for each that is left out: a tie, or twice the same text. Each
    draw depends on (seed, the two places) alone.
    """
    pairs: list[Pair | None] = []
    for i, j in _index_pairs(scores, rule.pairing, seed):
        tie = abs(scores[i] - scores[j]) <= rule.tie_margin
        if texts[i].strip() == texts[j].strip() or (tie and rule.ties == "drop"):
            pairs.append(None)
            continue
        first = 0.5 if tie else _chance(scores[i] - scores[j], rule.temperature)
        drawn = first in (0.0, 1.0) or Random(derive_seed(seed, "label", i, j)).random() < first
        i, j, first = (i, j, first) if drawn and first > 0 else (j, i, 1 - first)
        pairs.append(Pair(i, j, first))
    return pairs


def _index_pairs(scores: Sequence[float], pairing: str, seed: int) -> Iterator[tuple[int, int]]:
    every = list(combinations(range(len(scores)), 2))
    if pairing == "all":
        yield from every
    elif pairing == "random":
        yield Random(derive_seed(seed, "pair")).choice(every)
    else:
        indices = range(len(scores))
        best, worst = max(indices, key=scores.__getitem__), min(reversed(indices), key=scores.__getitem__)
        yield best, worst


def _chance(difference: float, temperature: float | None) -> float:
    """P(the first is chosen)."""
    if temperature is None:
        return float(difference > 0)
    scaled = difference / temperature
    return 1 / (1 + math.exp(-scaled)) if scaled > -700 else 0.0


def best_reachable(pairs: Sequence[Pair]) -> float | None:
    """The accuracy that the judge itself is expected to have on labels drawn so; None for no pairs."""
    return sum(max(p.chance, 1 - p.chance) for p in pairs) / len(pairs) if pairs else None


def prompt_of(prompt: Dialogue, plain: bool) -> str | list[dict[str, str]]:
    """A prompt as TRL takes it: messages, or text where there are no roles."""
    if plain:
        return "\n\n".join(turn.text.strip() for turn in prompt)
    return [{"role": ROLES[turn.role], "content": turn.text.strip()} for turn in prompt]


def reply_of(text: str, plain: bool) -> str | list[dict[str, str]]:
    """A reply as TRL takes it."""
    return text if plain else [{"role": "assistant", "content": text.strip()}]
