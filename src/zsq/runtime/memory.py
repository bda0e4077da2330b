"""The C library's allocator, told to keep what one step frees for the next; and memory that is not there."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from zsq.errors import InputError

TRIM_THRESHOLD, MMAP_MAX = -1, -4
"""Parameters of glibc's `mallopt`: free bytes at the end of the heap from which on the system gets them back, and the
most blocks outside of the heap, which the system gets back as soon as they are free."""

KEPT = 2**31 - 1
"""Most free bytes at the end of the heap that are kept."""

GLIBC_TRIMS, GLIBC_MAPS = 24 * 2**20, 2**16
"""What glibc comes to by itself where large blocks have been freed, and what it starts with."""

LESS_MEMORY = "a smaller --set method.batch_size=N or images of fewer pixels may fit"

LACKING = ("can't allocate memory", "not enough memory", "cannot allocate memory", "bad allocation")
"""What PyTorch says on the processor where there is too little memory; it has no class for that."""

_nested: list[object] = []
"""One entry a block of `kept_memory` that is open."""


@contextmanager
def kept_memory() -> Iterator[None]:
    """Keep freed memory for what is allocated next, and give it back at the end of the block.

    Else glibc returns what a step has freed, and the system clears it anew, page by page, for the next: half of the
    time of a step at 224x224 (benchmarks/reports/2026-11-mobile.md). Nothing is done where the C library is another,
    or where the environment sets how it maps memory.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    _nested.append(libc)
    libc.mallopt(MMAP_MAX, 0)
    libc.mallopt(TRIM_THRESHOLD, KEPT)
    try:
        yield
    finally:
        _nested.pop()
        if not _nested:
            libc.mallopt(MMAP_MAX, GLIBC_MAPS)
            libc.mallopt(TRIM_THRESHOLD, GLIBC_TRIMS)
        libc.malloc_trim(0)


def _glibc() -> Any:
    """Return the C library where it has these parameters and nobody else has set them, else None."""
    if {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES"} & os.environ.keys():
        return None
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:  # not Linux with glibc
        return None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


def lacks_memory(error: BaseException) -> bool:
    """Whether a fault says that memory is missing, on the processor or on a device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(said in text for said in LACKING)


@contextmanager
def clear_memory_errors() -> Iterator[None]:
    """Turn a device or a processor that runs out of memory into an expected fault; also a decorator.

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
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"the machine has too little memory for this; {LESS_MEMORY}. ({reason[:200]})") from error


def available_bytes() -> int | None:
    """Return the memory that this machine can still give, swap left aside; None where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = next((line.split() for line in lines if line.startswith("MemAvailable:")), None)
    return None if found is None else int(found[1]) * 1024


def require_memory(needed: int, what: str, remedy: str) -> None:
    """Return if so many bytes can be had, before they are asked for: the system would end the process instead.

    Raises:
        InputError: they cannot.
    """
    available = available_bytes()
    if available is not None and needed > available:
        raise InputError(
            f"{what} need {needed / 2**30:,.0f} GiB of memory and {available / 2**30:,.1f} GiB are free; {remedy}."
        )
