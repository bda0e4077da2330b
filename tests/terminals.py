"""A terminal whose screen a test reads."""

import contextlib
import fcntl
import os
import pty
import struct
import sys
import termios
import threading
import time

import pytest

pyte = pytest.importorskip("pyte", reason="the extra dev brings it")


class Terminal:
    """A terminal of so many columns, whose other end is stderr."""

    def __init__(self, monkeypatch, columns: int) -> None:
        self.screen = pyte.Screen(columns, 60)
        self._stream = pyte.ByteStream(self.screen)
        self._reader, writer = pty.openpty()
        fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 60, columns, 0, 0))
        self.file = os.fdopen(writer, "w")
        self._drained = threading.Thread(target=self._drain, daemon=True)  # who writes waits for a reader
        self._drained.start()
        monkeypatch.setattr(sys, "stderr", self.file)
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.delenv("NO_COLOR", raising=False)

    def _drain(self) -> None:
        with contextlib.suppress(OSError):  # the other end is closed
            while data := os.read(self._reader, 65536):
                self._stream.feed(data)

    def lines(self) -> list[str]:
        """Return what stands on the screen, line by line."""
        self.file.write("\x1b]2;seen\x07")  # a title, which no line shows
        self.file.flush()
        while self.screen.title != "seen":
            time.sleep(0.001)
        self.screen.title = ""
        return [line.rstrip() for line in self.screen.display if line.strip()]

    def close(self) -> None:
        """Close both ends."""
        self.file.close()
        self._drained.join()
        os.close(self._reader)
