"""The golden vectors: outside numbers, agreed on by the reference implementations named in each entry.

They live in $PREFTUNE_SHARED/golden (default: ../shared beside the repository). Where that is missing,
tests that need them skip and say so.
"""

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT / os.environ.get("PREFTUNE_SHARED", "../shared")
VECTORS = SHARED / "golden" / "vectors.json"

DTYPES = (torch.float64, torch.float32)


@cache
def vectors() -> dict[str, dict[str, Any]]:
    """All entries by name."""
    if not VECTORS.is_file():
        pytest.skip(f"golden vectors not found at {VECTORS}; set PREFTUNE_SHARED", allow_module_level=True)
    return {e["name"]: e for e in json.loads(VECTORS.read_text(encoding="utf-8"))["entries"]}


@dataclass(frozen=True)
class Entry:
    """One entry at one dtype: `entry["x"]` is input x as a tensor; masks, ids and labels are int64."""

    raw: dict[str, Any]
    dtype: torch.dtype

    def __getitem__(self, name: str) -> Tensor:
        x = torch.tensor(self.raw["inputs"][name], dtype=torch.float64)
        integral = json.dumps(self.raw["inputs"][name]).count(".") == 0
        return x.long() if integral else x.to(self.dtype)

    @property
    def params(self) -> dict[str, Any]:
        return self.raw["params"]

    @property
    def expected(self) -> dict[str, Any]:
        return self.raw["expected"]

    def check(self, actual: Tensor, expected: Any, tolerance: float = 1e-12) -> None:
        """Equal to `tolerance` in float64, to the file's tolerances in float32; dtype and shape as well."""
        assert actual.dtype == self.dtype
        expected = torch.tensor(expected, dtype=torch.float64)
        exact = self.dtype == torch.float64
        torch.testing.assert_close(
            actual.detach().double(),
            expected,
            rtol=tolerance if exact else self.raw["rtol"],
            atol=tolerance if exact else self.raw["atol"],
        )


def entry(name: str, dtype: torch.dtype = torch.float64) -> Entry:
    """The entry of that name, with its floating inputs in `dtype`."""
    return Entry(vectors()[name], dtype)


def names(prefix: str) -> list[str]:
    """Names of the entries that start with `prefix`; none where the file is missing: the test skips."""
    if not VECTORS.is_file():
        return []
    return [name for name in vectors() if name.startswith(prefix)]
