"""Arguments that would give a wrong number in silence.

Only what is known without reading a tensor's values is checked, since reading them makes a GPU wait.
"""

from typing import Any

from torch import Tensor


def check_shapes(**tensors: Any) -> None:
    """ValueError unless all have one shape: (B, 1) against (B,) would broadcast to (B, B).

    Numbers, None and tensors without dimensions go with every shape.
    """
    shapes = {name: tuple(x.shape) for name, x in tensors.items() if isinstance(x, Tensor) and x.dim()}
    if len(set(shapes.values())) > 1:
        raise ValueError("shapes differ: " + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))


def check_range(low: float, high: float, **numbers: Any) -> None:
    """ValueError for a number outside [low, high], NaN too; None and tensors are passed over."""
    for name, number in numbers.items():
        if isinstance(number, int | float) and not low <= number <= high:
            raise ValueError(f"{name} is {number}; it must lie in [{low}, {high}]")


def check_positive(**numbers: float) -> None:
    """ValueError for a number that is not above 0, NaN too."""
    for name, number in numbers.items():
        if not number > 0:
            raise ValueError(f"{name} is {number}; it must be above 0")
