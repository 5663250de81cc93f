"""How the C library keeps the memory that tensors on the CPU have left."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

# of malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
# what else sets them
_VARIABLES = (
    "GLIBC_TUNABLES",
    "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
)


@contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """Let this process keep memory that it frees, for its next tensor of that size. [ours].

    By default glibc hands a block above 32 MB back to the kernel at once, which clears every page
    of the next one. A batch of 2,048 prefixes in RecBole's SASRec has dozens of such blocks, and a
    step spends two fifths of its time on them (``benchmarks/results/freed_memory.md``); the price
    is a fifth more memory at the peak. At the end all that is free goes back.

    Where the C library is another one, or a variable of glibc's is set for this, if only to nothing
    (``GLIBC_TUNABLES=``), nothing is done.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _VARIABLES):
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, -1)  # never
    try:
        yield
    finally:
        # glibc raises its thresholds to these by itself, unless they were set once
        libc.mallopt(_MMAP_MAX, 2**16)
        libc.mallopt(_MMAP_THRESHOLD, 2**25)
        libc.mallopt(_TRIM_THRESHOLD, 2**26)
        libc.malloc_trim(0)
