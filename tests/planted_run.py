"""Plant each bug of `PLANTED` alone in a copy of the source and run the tests that must fail then.

    python tests/planted_run.py [NUMBER ...]

Prints a line a bug. Exit code 1 if a test that should fail does not, or does not run at all: an edit that no
longer fits the source, or that nothing can be imported after, catches nothing.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from planted_bugs import PLANTED, Bug

ROOT = Path(__file__).resolve().parents[1]
FAILED = re.compile(r"^FAILED (\S+?)(?:\[.*)?(?: - .*)?$", re.MULTILINE)


def broken(text: str, bug: Bug) -> str:
    """The file's text with the bug in it. ValueError unless the place is there exactly once."""
    if text.count(bug.source) != 1:
        raise ValueError(f"{bug.file} holds {text.count(bug.source)} times, not once: {bug.source!r}")
    return text.replace(bug.source, bug.broken)


def run(tests: tuple[str, ...], source: Path) -> subprocess.CompletedProcess[str]:
    """pytest on the tests, with the package taken from `source`."""
    environment = {**os.environ, "PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=no", "-rf", *tests]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def missed(bug: Bug, source: Path) -> list[str]:
    """The tests that should have failed with the bug in place and did not."""
    file = source / "preftune" / bug.file
    text = file.read_text(encoding="utf-8")
    file.write_text(broken(text, bug), encoding="utf-8")
    try:
        red = set(FAILED.findall(run(bug.red, source).stdout))
    finally:
        file.write_text(text, encoding="utf-8")
    return [test for test in bug.red if test not in red]


def main(numbers: list[int]) -> int:
    """Plant all bugs, or those with the given numbers."""
    chosen = [bug for bug in PLANTED if not numbers or bug.number in numbers]
    caught = 0
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "src"
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        every = tuple(dict.fromkeys(test for bug in chosen for test in bug.red))
        before = run(every, source)
        if before.returncode:
            print(f"the tests do not pass without any bug:\n{before.stdout}")
            return 1
        for bug in chosen:
            left = missed(bug, source)
            caught += not left
            verdict = f"NOT CAUGHT by {', '.join(left)}" if left else f"caught, tests red: {len(bug.red)}"
            print(f"{bug.number:3}  {bug.what}: {verdict}", flush=True)
    print(f"{caught} of {len(chosen)} caught")
    return int(caught < len(chosen))


if __name__ == "__main__":
    sys.exit(main([int(argument) for argument in sys.argv[1:]]))
