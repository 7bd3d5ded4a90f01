"""The process keeps the memory that tensors give back, for the next ones.

glibc returns what is free at the end of its heap to the system at once; the next step's gradients are then
paged in again, 4 KB at a time, which takes some 5 % of a step. Tensors above 32 MB are still returned: if
they came from the heap too, small ones that outlive them would leave holes in it.
"""

import ctypes
import gc
import sys

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3), from malloc.h
_MOST = 32 << 20  # bytes; glibc takes no higher one


def keep_freed_memory() -> bool:
    """Set this in the C library, until this process ends; False where it is not glibc and nothing is done."""
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _MOST) and mallopt(_TRIM_THRESHOLD, -1))


def give_back_memory() -> None:
    """Free what only reference cycles hold, such as the frames of an error, and empty the device allocator's
    cache: between stages, and before something is tried again in smaller parts.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()
