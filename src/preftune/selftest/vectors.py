"""The golden vectors of the package: inputs and what the reference implementations made of them.

`data/README.md` says where they come from.
"""

import json
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from preftune.selftest.record import Comparison

DATA = files("preftune.selftest") / "data"
EXACT = 1e-12  # relative and absolute, in float64

# How the entries abbreviate the repositories that they were checked against.
_REPOSITORIES = {
    "dpo_orig": "eric-mitchell/dpo",
    "nplus": "vwxyzjn/summarize",
    "openrlhf": "OpenRLHF",
    "openrlhf_expr": "OpenRLHF",
    "torch": "torch",
    "trl": "TRL",
    "trl_ppo": "TRL",
    "trl_ppo_block": "TRL",
    "verl": "verl",
}


@cache
def vectors() -> dict[str, dict[str, Any]]:
    """All entries by name."""
    return {e["name"]: e for e in json.loads((DATA / "vectors.json").read_text(encoding="utf-8"))["entries"]}


def reference(raw: dict[str, Any]) -> str:
    """The implementations that agree on an entry; its own source where there is none."""
    agreeing: list[str] = list(raw["agreement"])
    repositories = [_REPOSITORIES.get(name.split(".")[0], name) for name in agreeing]
    return ", ".join(dict.fromkeys(repositories)) or raw["source"][0]


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry at one dtype: `entry["x"]` is input x as a tensor; masks, ids and labels are int64.

    `check` compares with what the entry expects under a dotted key, to 1e-12 in float64 and to the entry's
    own tolerances in float32.
    """

    raw: dict[str, Any]
    dtype: torch.dtype
    device: torch.device
    row: Comparison
    used: set[str] = field(default_factory=set)  # keys of `expected` that were looked at

    def __getitem__(self, name: str) -> Tensor:
        x = torch.tensor(self.raw["inputs"][name], dtype=torch.float64)
        integral = json.dumps(self.raw["inputs"][name]).count(".") == 0
        return (x.long() if integral else x.to(self.dtype)).to(self.device)

    def mask(self, name: str = "mask") -> Tensor:
        """The mask in the entry's dtype, so that weights built from it have that dtype."""
        return self[name].to(self.dtype)

    @property
    def params(self) -> dict[str, Any]:
        return self.raw["params"]

    def expected(self, key: str) -> Any:
        value: Any = self.raw["expected"]
        for step in key.split("."):
            value = value[step]
        self.used.add(key.split(".")[0])
        return value

    def has(self, key: str) -> bool:
        return key in self.raw["expected"]

    def check(self, key: str, actual: Tensor, *, on: Tensor | None = None, expected: Any = None) -> None:
        """`actual` has the entry's dtype and the expected values; `on` a mask: there, and 0 off it.

        `expected` stands in for the entry's own where that has another form.
        """
        if actual.dtype != self.dtype:
            self.row.failures.append(f"{key}: {actual.dtype} instead of {self.dtype}")
        target = torch.as_tensor(self.expected(key) if expected is None else expected, dtype=torch.float64)
        if on is not None:
            target = torch.where(on.cpu().bool(), target, 0.0)
        exact = self.dtype == torch.float64
        rtol, atol = (EXACT, EXACT) if exact else (self.raw["rtol"], self.raw["atol"])
        self.row.near(key, actual, target, rtol=rtol, atol=atol)

    def number(self, key: str, actual: float) -> None:
        """A plain float, to 1e-12 relative."""
        target = self.expected(key)
        self.row.near(key, torch.tensor(actual, dtype=torch.float64), target, rtol=EXACT, atol=1e-300)

    def same(self, key: str, actual: Any) -> None:
        self.row.same(key, actual, self.expected(key))


def entry(name: str, dtype: torch.dtype, device: torch.device) -> Entry:
    """The entry of that name with its floating inputs in `dtype`, and a row to fill in."""
    raw = vectors()[name]
    row = Comparison(what=name, reference=reference(raw), dtype=str(dtype).removeprefix("torch."))
    return Entry(raw, dtype, device, row)
