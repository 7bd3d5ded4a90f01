"""Memory that is given back is there for the next tensor."""

import subprocess
import sys

import pytest

# In a process of its own: the setting cannot be taken back. Prints the page faults of filling 90 MB again.
SCRIPT = """
import resource, sys
from preftune.models.memory import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    print(-1)
    sys.exit()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [bytearray(30 << 20) for _ in range(3)]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    command = [sys.executable, "-c", SCRIPT, how]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_what_was_freed_is_not_paged_in_again() -> None:
    kept = faults("keep")
    if kept == -1:
        pytest.skip("this C library has no mallopt")
    assert kept < 1000 < 10_000 < faults("return")
