"""The memory of a process that trains on CPUs."""

from __future__ import annotations

import ctypes
import sys

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_MMAP_THRESHOLD = 2**25
LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> None:
    """Have glibc's allocator keep up to 2 GB of what is freed, for the next step, rather than hand it to the kernel.

    Every step frees all its activations; what the kernel gets back it must clear and map anew, page by page. Elsewhere
    than on Linux, or with another libc, this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, LARGEST_INT)
        mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
