"""A reward function that adds nothing, and fails in one process of two: what a bad row there comes to."""

import os

_CALLS: list[str] = []


def zero(prompt: str, response: str) -> float:
    """0; in process 1 an error at the tenth call, in step 3 of the shrunk stages."""
    _CALLS.append(response)
    if os.environ.get("RANK") == "1" and len(_CALLS) == 10:
        raise ValueError("this row is poisoned")
    return 0.0
