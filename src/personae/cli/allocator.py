"""The C library's allocator, told to keep what is freed for what is needed next."""

import contextlib
import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Keep freed blocks of up to 32 MiB in this process; elsewhere than with glibc, do nothing.

    By itself glibc returns them at once, and the next block of rows faults the same pages in
    again: up to a fifth of the processor time of a merge. What holes this leaves is in the plans
    (`held_at_once`); chunks of rows have blocks of their own (`_memory.py`).
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_MMAP_THRESHOLD, 32 << 20)
        mallopt(_TRIM_THRESHOLD, 512 << 20)
        mallopt(_TOP_PAD, 16 << 20)
