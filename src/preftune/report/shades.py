"""How dark a token is painted for a number: one rule for the page and the terminal."""

import math
from collections.abc import Iterable

LEVELS = 4


def scale_of(values: Iterable[float]) -> float:
    """The size that gets the darkest shade: 95 % of all are smaller. What is no number does not count."""
    sizes = sorted(abs(value) for value in values if not math.isnan(value))
    return sizes[int(0.95 * len(sizes))] if sizes else 0.0


def level(value: float, scale: float) -> int:
    """From -4 to 4; 0 for what is no number."""
    if scale <= 0 or math.isnan(value):
        return 0
    return round(LEVELS * max(-1.0, min(1.0, value / scale)))
