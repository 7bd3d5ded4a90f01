"""`preftune selftest`: the golden vectors of the package, compared on this machine.

Every entry goes through `preftune.functional` and `preftune.evaluation.stats` in float64 and float32, every
end-to-end update through `preftune.one_update`. The tests of the repository call the same comparisons.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from preftune.rundir import write_result
from preftune.selftest.maths import compare_all
from preftune.selftest.record import Comparison
from preftune.selftest.updates import UPDATES, compare_update
from preftune.training.learner import Learner
from preftune.training.state import device_name

FAILED = 70  # exit code of an internal error: the code is not what it claims to be


def run(path: str | Path | None = None) -> tuple[str, int]:
    """Compare everything; the table as text and the exit code, 0 or 70. Writes JSON to `path` if given."""
    start = time.monotonic()
    device = Learner().device  # where training would run
    with torch.random.fork_rng(devices=[]):  # models are made on the CPU
        rows = compare_all(torch.device("cpu") if device.type == "mps" else device)  # mps has no float64
        rows += [compare_update(update, device) for update in UPDATES]
    machine = {"device": device_name(device), "torch": torch.__version__}
    summary: dict[str, Any] = {**machine, "seconds": round(time.monotonic() - start, 1), **totals(rows)}
    if path is not None:
        write_result(Path(path), {**summary, "comparisons": [row.as_dict() for row in rows]})
    return text(rows, summary), 0 if summary["ok"] else FAILED


def totals(rows: Sequence[Comparison]) -> dict[str, Any]:
    failed = sum(not row.ok for row in rows)
    values = sum(row.values for row in rows)
    return {"ok": failed == 0, "comparisons_made": len(rows), "values": values, "failed": failed}


def text(rows: Sequence[Comparison], summary: dict[str, Any]) -> str:
    """One line a comparison: verdict, what, dtype, values, worst error, what it is allowed, reference."""
    width = max(len(row.what) for row in rows)
    head = ("", "compared", "dtype", "values", "worst error", "allowed", "with")
    lines = [_line(width, *head)]
    for row in rows:
        numbers = (str(row.values), f"{row.error:.1e}", f"{row.allowed:.1e}")
        lines.append(_line(width, "ok" if row.ok else "FAIL", row.what, row.dtype, *numbers, row.reference))
        lines += [f"      {failure}" for failure in row.failures]
    verdict = f"{summary['failed']} of {len(rows)} FAIL" if summary["failed"] else f"all {len(rows)} ok"
    device = f"{summary['device']}, torch {summary['torch']}, {summary['seconds']} s"
    return "\n".join([*lines, f"{verdict}: {summary['values']} values compared on {device}"])


def _line(width: int, *cells: str) -> str:
    verdict, what, dtype, values, error, allowed, reference = cells
    columns = (
        f"{verdict:<4}  {what:<{width}}  {dtype:<7}  {values:>6}  {error:>11}  {allowed:>7}  {reference}"
    )
    return columns.rstrip()
