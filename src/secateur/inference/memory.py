"""How the C library treats memory that is freed."""

from __future__ import annotations

import ctypes
import sys

# mallopt(3)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8

LARGEST_KEPT = 32 << 20
"""Bytes: the most that glibc takes for M_MMAP_THRESHOLD."""


def keep_freed_memory() -> None:
    """Have this process keep what it frees, for the tensors of the next batch, which are as large.

    Else glibc gives them back after each use, and each time the kernel clears every page anew; in threads other than
    the first one always (a fifth of the time, measured). For processes that do nothing but encode; other C libraries
    are left as they are.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_ARENA_MAX, 1)
