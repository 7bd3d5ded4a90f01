"""A number with its interval, and how it is written."""

from dataclasses import dataclass

from preftune.report.text import decimals_for


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number with its 95 % interval and the number of items behind it; these may be unknown."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None

    def text(self, *, sign: bool = False, scale: float = 1.0) -> str:
        """`0.41 [0.22, 0.60]`, to the digits that the interval supports."""
        plus = "+" if sign else ""
        if self.low is None or self.high is None:
            return f"{self.value * scale:{plus}.{decimals_for(abs(self.value * scale))}f}"
        digits = decimals_for((self.high - self.low) * scale / 2)
        low, high = (f"{bound * scale + 0.0:.{digits}f}" for bound in (self.low, self.high))
        return f"{self.value * scale:{plus}.{digits}f} [{low}, {high}]"

    def percent(self) -> str:
        """The same for a share: `71.0 % [68.1, 73.7]`."""
        if self.low is None or self.high is None:
            return f"{100 * self.value:.1f} %"
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"

    def excludes(self, value: float) -> bool:
        """True if the interval is known and `value` lies outside of it."""
        return self.low is not None and self.high is not None and not self.low <= value <= self.high
