"""How varied many responses are together, at an amount of text that does not depend on how many there are."""

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

from numpy.typing import ArrayLike

from preftune.evaluation.stats import ngrams


def corpus_distinct_n(rows: Iterable[ArrayLike], n: int) -> float:
    """`stats.distinct_n` of many responses together; no n-gram crosses from one into the next."""
    grams = [gram for row in rows for gram in ngrams(row, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def rarefied_distinct_n(groups: Sequence[Sequence[ArrayLike]], n: int, size: int) -> float:
    """`corpus_distinct_n` to be expected of `size` of the groups, drawn without replacement.

    A group is the responses to one prompt. Distinct-n falls as text grows, and faster for a policy that says
    the same to many prompts, so a limit on it holds for one amount of text only. Distinct n-grams expected
    (rarefaction: Hurlbert 1971, Ecology 52:577) over n-grams expected; `corpus_distinct_n` of all where there
    are no more than `size` groups. ValueError: a size below 1.
    """
    if size < 1:
        raise ValueError(f"distinct-n of {size} groups; at least one is needed")
    if len(groups) <= size:
        return corpus_distinct_n((row for rows in groups for row in rows), n)
    grams = [[gram for row in rows for gram in ngrams(row, n)] for rows in groups]
    total = sum(map(len, grams))
    holders: Counter[Hashable] = Counter(gram for of_group in grams for gram in set(of_group))
    draws = math.comb(len(groups), size)
    expected = sum(
        kinds * (1 - math.comb(len(groups) - held, size) / draws)
        for held, kinds in Counter(holders.values()).items()
    )
    return expected / (total * size / len(groups)) if total else 0.0
