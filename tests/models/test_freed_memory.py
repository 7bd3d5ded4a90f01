"""Memory that is given back is there for the next tensor."""

import subprocess
import sys

import pytest

# In a process of its own, for the setting stays. Page faults of filling 90 MB again, before and after it.
SCRIPT = """
import resource
from preftune.models.memory import keep_freed_memory
def faults():
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [bytearray(30 << 20) for _ in range(3)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(), faults() if keep_freed_memory() else -1)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_what_was_freed_is_not_paged_in_again() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    returned, kept = map(int, done.stdout.split())
    if kept == -1:
        pytest.skip("this C library has no mallopt")
    assert kept < 1000 < 10_000 < returned
