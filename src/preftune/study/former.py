"""Keys that a study.json had before."""

import re
from collections.abc import Mapping
from typing import Any

BY_NAME = ("policies", "others", "others_seen", "others_labelled")  # hold what stages and judges are called
_PROXY = re.compile(r"(?<![^_])proxy(?![^_])")  # "proxy", "proxy_gain_low", "rl_proxy"


def todays_words(value: Any, *, named: bool = False) -> Any:
    """A study.json of before, where the reward model's score was called proxy, with today's keys; one with
    these stays as it is. The keys of `value` itself stay where they are `named` by stages or judges.
    """
    if isinstance(value, list):
        return [todays_words(element) for element in value]
    if not isinstance(value, Mapping):
        return value
    return {
        key if named else _PROXY.sub("score", key): todays_words(inner, named=key in BY_NAME)
        for key, inner in value.items()
    }
