"""What a comparison found: how many values, the one nearest to or farthest beyond what is allowed."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(slots=True, kw_only=True)
class Comparison:
    """One row of the table. It fails if a value is off, if anything raises, or if nothing was compared."""

    what: str
    reference: str  # the implementations that the numbers come from
    dtype: str
    values: int = 0
    error: float = 0.0  # of the value that uses most of what it is allowed
    allowed: float = 0.0  # for that value
    failures: list[str] = field(default_factory=list)
    _share: float = -1.0

    @property
    def ok(self) -> bool:
        return self.values > 0 and not self.failures

    def near(self, name: str, actual: Tensor, expected: Any, *, rtol: float = 0.0, atol: float) -> None:
        """|actual - expected| <= atol + rtol · |expected|, in the same shape; NaN and inf are never near."""
        value = actual.detach().to("cpu", torch.float64)
        target = torch.as_tensor(expected, dtype=torch.float64)
        if value.shape != target.shape:
            self.failures.append(f"{name}: shape {tuple(value.shape)} instead of {tuple(target.shape)}")
            return
        if not target.numel():
            return
        error = (value - target).abs().nan_to_num(nan=math.inf, posinf=math.inf).flatten()
        allowed = (atol + rtol * target.abs()).flatten()
        share = error / allowed
        self.values += error.numel()
        worst = int(share.argmax())
        if share[worst] > self._share:
            self._share = share[worst].item()
            self.error, self.allowed = error[worst].item(), allowed[worst].item()
        if not share[worst] <= 1:
            self.failures.append(f"{name}: off by {error[worst]:.2g}, allowed are {allowed[worst]:.2g}")

    def same(self, name: str, actual: Any, expected: Any) -> None:
        """Equal whole numbers, flags, or lists of these."""
        value = actual.tolist() if isinstance(actual, Tensor) else actual
        self.values += torch.as_tensor(expected).numel()
        if value != expected:
            self.failures.append(f"{name}: {value} instead of {expected}")

    def under(self, compare: Callable[[], None]) -> "Comparison":
        """This comparison after `compare` has filled it in; what raises is a failure like any other."""
        try:
            compare()
        except Exception as error:
            self.failures.append(f"{type(error).__name__}: {error}".partition("\n")[0])
        return self

    def as_dict(self) -> dict[str, Any]:
        names = ("what", "reference", "dtype", "values", "error", "allowed", "ok", "failures")
        return {name: getattr(self, name) for name in names}
