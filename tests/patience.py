"""Waiting for what must come. How soon it comes is the machine's affair and no test's."""

import time
from collections.abc import Callable

PATIENCE = 300.0  # seconds; met by what never comes only


def wait_for(what: Callable[[], object], still: Callable[[], bool] = lambda: True) -> None:
    """Until `what` is true. AssertionError where it does not, or cannot since `still` is false."""
    end = time.monotonic() + PATIENCE
    while not what():
        assert still() or what(), "what was waited for ended before"
        assert time.monotonic() < end, f"not within {PATIENCE:.0f} s"
        time.sleep(0.01)
