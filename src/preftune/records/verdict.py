"""When a difference may be called one: the only place with that rule."""

import math
from statistics import NormalDist

BETTER, WORSE, UNCLEAR = "better", "worse", "no detectable difference"
SIGNIFICANCE = 0.05
Z95, Z80 = 1.959963984540054, 0.8416212335729143  # normal quantiles for two-sided 5 % and for 80 % power
RULE = (
    "better or worse: the 95 % interval leaves out 0, and p, larger the more policies are compared "
    "(Holm's correction, against gains by luck), is below 0.05"
)
MIN_PROMPTS = 10  # below this a bootstrap over prompts gives intervals that are far too short: no claim


def outcome(low: float | None, high: float | None, n: int | None, p_holm: float | None = None) -> str:
    """Better or worse only of 10 items or more, if the 95 % interval excludes 0 and the p-value, corrected by
    Holm over all policies compared, is below 0.05. What is not known of n and p does not count against it.
    """
    enough = n is None or n >= MIN_PROMPTS
    survives = p_holm is None or p_holm < SIGNIFICANCE
    if low is None or high is None or not enough or not survives:
        return UNCLEAR
    return BETTER if low > 0 else WORSE if high < 0 else UNCLEAR  # NaN is neither


def smallest_gain(prompts: int, spread: float, comparisons: int = 1) -> float:
    """The mean paired difference that is called better 4 times in 5: (z(1 - 0.05 / 2k) + z(0.8)) sd / √n for
    n prompts whose differences have this sd, in a family of k comparisons (Holm's first and hardest step).

    The normal approximation of a paired test's power: Cohen 1988, Statistical Power Analysis, ch. 2. Of 30
    prompts or fewer the true figure is larger by some percent.
    """
    level = NormalDist().inv_cdf(1 - SIGNIFICANCE / (2 * comparisons))
    return (level + Z80) * spread / math.sqrt(prompts)
