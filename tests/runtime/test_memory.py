import ctypes
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zsq.runtime import memory
from zsq.runtime.memory import kept_memory

GLIBC = pytest.mark.skipif(not sys.platform.startswith("linux") or memory._glibc() is None, reason="no glibc here")
PAGE = os.sysconf("SC_PAGE_SIZE")
BYTES, BLOCKS = 64 * 2**20, 4


def work() -> None:
    """Allocate blocks that glibc would take from outside of the heap, write them, and free them."""
    blocks = [torch.ones(BYTES // 4) for _ in range(BLOCKS)]
    del blocks


CHILD = """
from test_memory import new_pages
from zsq.runtime.memory import kept_memory
with kept_memory():
    inside = [new_pages() for _ in range(8)]  # the first four at most fill gaps of the heap
print(inside[-1], new_pages())
"""


def new_pages() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.slow
@GLIBC
def test_what_is_freed_is_used_again_within_the_block() -> None:
    """In a process of its own, whose heap has no gaps of other tests."""
    run = subprocess.run(
        [sys.executable, "-c", CHILD], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    inside, after = map(int, run.stdout.split())
    assert inside < BLOCKS * BYTES / PAGE / 10
    assert after > BLOCKS * BYTES / PAGE / 2  # given back after it


@GLIBC
@pytest.mark.parametrize(
    "name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES"]
)
def test_what_the_environment_says_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    assert memory._glibc() is None
    with kept_memory():
        work()


@GLIBC
def test_the_usual_threshold_is_back_after_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    class Library:
        mallopt = staticmethod(lambda parameter, value: asked.append((parameter, value)))
        malloc_trim = staticmethod(lambda left: asked.append((0, left)))

    monkeypatch.setattr(memory, "_glibc", Library)
    kept = [(memory.MMAP_MAX, 0), (memory.TRIM_THRESHOLD, memory.KEPT)]

    def fail() -> None:
        with kept_memory():
            with kept_memory():
                pass
            assert asked == [*kept, *kept, (0, 0)]  # the inner block gives back what is free, and no more changes
            raise ValueError("fault")

    with pytest.raises(ValueError, match="fault"):
        fail()
    usual = [(memory.MMAP_MAX, memory.GLIBC_MAPS), (memory.TRIM_THRESHOLD, memory.GLIBC_TRIMS), (0, 0)]
    assert asked[5:] == usual


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert memory._glibc() is None
    with kept_memory():
        work()
