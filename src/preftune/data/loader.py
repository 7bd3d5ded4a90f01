"""The order of training rows, as a pure function: nothing to save, so nothing to get wrong on resume."""

from functools import lru_cache

import numpy as np

from preftune.seeding import derive_seed


@lru_cache(maxsize=8)
def order(n: int, seed: int, stage: str, epoch: int) -> tuple[int, ...]:
    """The permutation of range(n) for one epoch of one stage.

    Rows are sorted by 64 random bits each, taken raw from Philox: numpy keeps that stream fixed across
    versions, which it does not promise for `Generator.permutation`.
    """
    bits = np.random.Philox(key=derive_seed(seed, stage, epoch, "order")).random_raw(n)
    return tuple(np.argsort(bits, kind="stable").tolist())


def rows_at(step: int, batch_size: int, n: int, seed: int, stage: str) -> list[int]:
    """The rows of step `step` (from 0): `batch_size` of them, each in range(n).

    Steps walk through epoch after epoch without a gap. Every row comes exactly once an epoch, each epoch has
    an order of its own, and a batch at the end of an epoch is filled up from the next, so that no row is left
    out. Raises ValueError if there are no rows.
    """
    if n < 1 or batch_size < 1 or step < 0:
        raise ValueError(f"no batch of {batch_size} of {n} rows at step {step}")
    start = step * batch_size
    return [order(n, seed, stage, i // n)[i % n] for i in range(start, start + batch_size)]
