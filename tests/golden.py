"""The golden vectors of the package, through the comparisons that `preftune selftest` makes."""

import torch

from preftune.selftest.maths import DTYPES, compare_entry, dtypes
from preftune.selftest.vectors import Entry, vectors

__all__ = ["DTYPES", "agree", "dtypes", "names", "vectors"]


def names(prefix: str) -> list[str]:
    """Names of the entries that start with `prefix`."""
    return [name for name in vectors() if name.startswith(prefix)]


def agree(name: str, dtype: torch.dtype = torch.float64) -> Entry:
    """Every value and gradient of the entry is near: 1e-12 in float64, the entry's tolerances in float32."""
    compared = compare_entry(name, dtype, torch.device("cpu"))
    assert not compared.row.failures, "\n".join(compared.row.failures)
    assert compared.row.values > 0
    return compared
