"""Ranges of metrics in which a stage is healthy, as the pages of the algorithms give them."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Healthy:
    """A range of a metric and the words of docs/algorithms/ that it comes from. An end of None is open.

    alone: words in the place of the page's, where those need their sentence · only: settings of the stage
    under which it holds · on_hh: holds on HH-RLHF only; means nothing on other data.
    """

    words: str
    alone: str | None = None
    low: float | None = None
    high: float | None = None
    only: Mapping[str, object] = field(default_factory=dict)
    on_hh: bool = False

    @property
    def meaning(self) -> str:
        return self.words if self.alone is None else self.alone
