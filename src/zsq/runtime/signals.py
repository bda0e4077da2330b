"""Signals that wait until a step is finished and saved, and interrupts that Python would lose."""

import _thread
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any


@contextmanager
def held_signals() -> Iterator[list[int]]:
    """Hold SIGINT and SIGTERM back until the block ends, so that a step can be finished and saved.

    Yields the signals received; the block is to look at them and end. A second one takes effect at once. Outside of the
    main thread, where Python delivers no signals, none are held.
    """
    received: list[int] = []
    before: dict[int, Any] = {}

    def restore() -> None:
        for number in list(before):
            signal.signal(number, before.pop(number))

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        if received:
            restore()
            signal.raise_signal(number)
        received.append(number)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if handler not in (None, signal.SIG_IGN):
                before[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        restore()
    if received:
        signal.raise_signal(received[0])


def _interrupt_behind(code: CodeType) -> None:
    """Interrupt the main thread once it has left a function in which an exception would be lost."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        if frame.f_code is code:
            time.sleep(0.01)
            frame = sys._current_frames().get(threading.main_thread().ident or 0)
        else:
            frame = frame.f_back
    _thread.interrupt_main()


@contextmanager
def kept_interrupts() -> Iterator[None]:
    """Raise an interrupt again that comes while Python frees an object, where it is only printed and forgotten."""
    before = sys.unraisablehook

    def again(fault: "sys.UnraisableHookArgs") -> None:
        if issubclass(fault.exc_type, KeyboardInterrupt):
            threading.Thread(target=_interrupt_behind, args=(again.__code__,), daemon=True).start()
        else:
            before(fault)

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = before
