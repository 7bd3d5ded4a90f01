"""Sweeps over every case are `make sweeps`; `make test` takes a sample of them."""

import os
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
ALL = os.environ.get("PREFTUNE_SWEEPS") == "all"


def every(step: int, cases: Sequence[T]) -> Sequence[T]:
    """Every `step`-th case; in a sweep all of them."""
    return cases if ALL else cases[::step]
