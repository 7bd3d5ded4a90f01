"""The process keeps the memory that tensors give back, for the next ones.

glibc returns every freed tensor above 32 MB, and what is free at the end of the heap, to the system at once;
the gradients of the next step are then paged in anew, 4 KB at a time, which takes 5 to 15 % of a step (more
on a virtual machine). The peak is the same.
"""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt(3), from malloc.h


def keep_freed_memory() -> bool:
    """Tell the C library, for the rest of this process; False where it is not glibc and nothing is done."""
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl
        return False
    return bool(mallopt(_TRIM_THRESHOLD, -1) and mallopt(_MMAP_MAX, 0))
