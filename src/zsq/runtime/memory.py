"""The C library's allocator, told to keep what one step frees for the next; and memory that is not there."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from zsq.errors import InputError

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's `mallopt`: free bytes at the end of the heap, and bytes of a block, from which on the system
gets them back as soon as they are free."""

LARGEST_IN_HEAP = 12 * 2**20
"""Bytes of a block. glibc itself comes to 32 MiB, with which larger gaps are left in the heap; see
benchmarks/reports/2026-11-cost.md."""

KEPT = 2**31 - 1
"""Most free bytes at the end of the heap that are kept."""

GLIBC_KEEPS = 2 * LARGEST_IN_HEAP
"""What glibc comes to by itself where blocks of that size have been freed."""


@contextmanager
def kept_memory() -> Iterator[None]:
    """Keep freed memory for what is allocated next, and give it back at the end of the block.

    Else glibc returns what a step has freed, and the system clears it anew, page by page, for the next: at 224x224,
    80,000 pages and a tenth of each step's time (benchmarks/reports/2026-11-cost.md). Nothing is done where the C
    library is another, or where the environment sets these thresholds.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(MMAP_THRESHOLD, LARGEST_IN_HEAP)
    libc.mallopt(TRIM_THRESHOLD, KEPT)
    try:
        yield
    finally:
        libc.mallopt(TRIM_THRESHOLD, GLIBC_KEEPS)
        libc.malloc_trim(0)


def _glibc() -> Any:
    """Return the C library where it has these parameters and nobody else has set them, else None."""
    if {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"} & os.environ.keys():
        return None
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:  # not Linux with glibc
        return None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


@contextmanager
def clear_memory_errors() -> Iterator[None]:
    """Turn a device that runs out of memory into an expected fault; also a decorator.

    Raises:
        InputError: it does.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(
            "the device has too little memory for this network; --device cpu, a smaller --set method.batch_size=N or "
            f"images of fewer pixels may fit. ({str(error).splitlines()[0]})"
        ) from error
