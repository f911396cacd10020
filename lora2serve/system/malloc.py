"""glibc's malloc, told to keep what is freed: for the whole process, and never undone."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h


def keep_freed_memory() -> None:
    """Let malloc hand the memory of one block to the next: fresh pages for each would cost more than the fold.

    From one heap for all threads: with one each, every heap would keep what its own largest moment took. The command
    line does this by itself; a program that does little but export may call it first.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc; others keep their ways
        libc.malloc_trim(0)  # what planning has left
        libc.mallopt(_M_ARENA_MAX, 1)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest that glibc takes
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)
