"""Start the processes of a run on this machine and see to it that all of them end as one."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from types import FrameType
from typing import IO

from zsq.cli.names import SUPERVISED
from zsq.cli.output import print_error

LOST = 70
"""Exit code of a process that ends because another one has, and says nothing, since the cause is elsewhere."""

GRACE = 3.0
"""Seconds that processes get to end by themselves once one has failed."""

PATIENCE = 60.0
"""Seconds that they get to finish some steps and their checkpoint when they are told to stop."""

STOPPED = "Stopped; a run continues with --resume."

LOOPBACK = "127.0.0.1"


def run_workers(command: Sequence[str], count: int) -> int:
    """Run a command in `count` processes, which find each other as `torchrun`'s do; return the exit code of the run.

    The first process has this one's output. A failure of another one becomes one line, and ends them all. They also end
    when this process does.
    """
    with socket.socket() as free:
        free.bind((LOOPBACK, 0))
        port = free.getsockname()[1]
    with ExitStack() as stack:
        errors = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(count)]
        workers = [stack.enter_context(_start(command, rank, count, port, errors[rank])) for rank in range(count)]
        return _supervise(workers, errors)


def _supervise(workers: "list[subprocess.Popen[bytes]]", errors: Sequence[IO[bytes]]) -> int:
    told = []

    def forward(number: int, frame: FrameType | None) -> None:
        del frame
        told.append(number)
        for worker in workers:
            worker.send_signal(number)
        raise KeyboardInterrupt

    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, forward) if in_main else None
    try:
        while None in (codes := [worker.poll() for worker in workers]) and not any(codes):
            time.sleep(0.05)
    except KeyboardInterrupt:  # the terminal tells all of them
        with contextlib.suppress(KeyboardInterrupt):  # a second time: at once
            _end(workers, PATIENCE)
        _end(workers, 0.0)
        if told or workers[0].returncode == LOST:  # it saw the others end first
            print(STOPPED, file=sys.stderr)
        return 128 + told[0] if told else 130
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    failed = next((rank for rank, worker in enumerate(workers) if worker.returncode), None)
    _end(workers)
    if failed is None:
        return 0
    own = workers[0].returncode
    if own and own > 0 and own != LOST:  # it has said why
        return own
    culprits = [rank for rank, worker in enumerate(workers) if worker.returncode not in (0, LOST)]
    first = failed if failed in culprits or not culprits else culprits[0]
    print_error(_reason(first, workers[first].returncode, errors[first]))
    return 1


def watch_starter() -> None:
    """End this process as soon as the one that started it has ended, if `run_workers` did."""
    if SUPERVISED not in os.environ:
        return

    def wait() -> None:
        os.read(0, 1)  # nothing is ever written: this returns when the other end closes
        os._exit(LOST)

    threading.Thread(target=wait, name="starter", daemon=True).start()


def _start(command: Sequence[str], rank: int, count: int, port: int, errors: IO[bytes]) -> "subprocess.Popen[bytes]":
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    environment = os.environ | {name: str(value) for name, value in places.items()}
    environment |= {"MASTER_ADDR": LOOPBACK, SUPERVISED: "1"}
    stdout, stderr = (subprocess.DEVNULL, errors) if rank else (None, None)
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stdout, stderr=stderr, env=environment)


def _end(workers: "list[subprocess.Popen[bytes]]", grace: float = GRACE) -> None:
    """Wait a moment for the processes to end; then end those that still wait for one that is gone."""
    deadline = time.monotonic() + grace
    for worker in workers:
        try:
            worker.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def _reason(rank: int, code: int, errors: IO[bytes]) -> str:
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines()
    if code > 0 and lines:
        return f"process {rank}: {lines[-1].removeprefix('Error: ')}"
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    if code == -signal.SIGABRT and lines:  # a library has said why
        how += f" ({lines[-1][:200]})"
    return f"process {rank} {how}, and the run with it; --resume continues."
