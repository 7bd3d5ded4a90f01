"""Reproductions of public bug reports, beside the checkout: the exit code says whether preftune is right."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / os.environ.get("PREFTUNE_SHARED", "../shared")
CASES = sorted(path.parent for path in SHARED.glob("cases/*/*/RIGHT.txt"))
SAID = {  # the shell reads `a && b || c && d` from the left, so this one's exit code is 1 where both are 0
    "mask_limit_per_process": "1 process: 0, 2 processes: 0",
}


@pytest.mark.slow
@pytest.mark.skipif(not CASES, reason=f"no reproductions at {SHARED}/cases (set PREFTUNE_SHARED)")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_was_reported_elsewhere_is_right_here(case: Path, tmp_path: Path) -> None:
    command = ["bash", "repro.sh"] if (case / "repro.sh").is_file() else [sys.executable, "repro.py"]
    home = Path(sys.executable).parent
    env = os.environ | {"PREFTUNE": str(home / "preftune"), "WORK": str(tmp_path), "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=case, env=env, capture_output=True, text=True, timeout=900)
    output = done.stdout + done.stderr
    if case.name in SAID:
        assert SAID[case.name] in output
    else:
        assert done.returncode == 0, f"{(case / 'RIGHT.txt').read_text()}\n{output[-3000:]}"
