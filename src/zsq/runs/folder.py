"""A run's folder: taken by one process, never mixed with another run's."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from zsq.errors import InputError
from zsq.runs.run_log import clear_log
from zsq.runtime import distributed
from zsq.targets import TARGETS

ARTIFACTS = (
    "settings.toml",
    "generator.safetensors",
    TARGETS["onnxruntime"].file,
    "model.pt2",
    "metrics.jsonl",
    "samples.png",
    "samples.json",
    "result.json",
)
"""Files of a run's folder, beside `checkpoints/`; other targets have a file of another name."""

WRITTEN = (
    *ARTIFACTS,
    *sorted({target.file for target in TARGETS.values()} | {target.exported_file for target in TARGETS.values()}),
    "images.npz",
    "bits.toml",
    "frontier.csv",
    "frontier.png",
    "report.html",
)
"""Those, and what a synthesis or an allocation writes."""

CHECKPOINTS = ("fit.safetensors", "distill.safetensors")

LOCK = ".lock"
"""File by which a process keeps a folder to itself."""


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep a folder to this process: two runs that wrote to one would mix their files.

    Raises:
        InputError: another process has it.
    """
    if not distributed.is_main() or any(path.is_file() for path in (folder, *folder.parents)):
        yield  # the first process has it for all; what is no folder is refused by who opens it
        return
    lock, made = FileLock(folder / LOCK), not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"another process is writing to {folder}; wait for it, or give another --out.") from None
    except (OSError, NotImplementedError):  # a file system without locks, or a folder that may not be written
        yield
        return
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        lock.release()
        if made and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def open_folder(folder: Path, *, resume: bool, overwrite: bool) -> bool:
    """Take a folder for a run, or refuse to mix two; return whether a run is continued. Nothing is deleted yet.

    Raises:
        InputError: the folder holds another run and neither flag is given, or it cannot be made.
    """
    if resume and overwrite:
        raise InputError("--resume continues a run and --overwrite discards it; give one of them.")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; --out takes a folder.")
    holds_run = any((folder / name).exists() for name in (*WRITTEN, "checkpoints"))
    if holds_run and not resume and not overwrite:
        raise InputError(f"{folder} holds another run; --resume continues it, --overwrite discards it.")
    if holds_run and resume and not (folder / "settings.toml").exists():
        raise InputError(f"{folder} holds a run without settings.toml, which --resume needs; --overwrite discards it.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made: {error.strerror}; --out takes a folder.") from error
    return resume and holds_run


def file_in(path: Path) -> Path:
    """Return the quantized file that a path names: its own, or that of a run's folder.

    Raises:
        InputError: it is a folder without one.
    """
    if not path.is_dir():
        return path
    found = next((path / target.file for target in TARGETS.values() if (path / target.file).is_file()), None)
    if found is None:
        raise InputError(f"{path} holds no quantized file; zsq quantize writes one to the folder of --out.")
    return found


def clear_folder(folder: Path, *, everything: bool) -> None:
    """Delete what killed runs left half-written, and with `everything` what a run wrote; other files stay."""
    places = [folder / name for name in WRITTEN] + [folder / "checkpoints" / name for name in CHECKPOINTS]
    for path in places:
        for rest in path.parent.glob(f".{path.name}.*"):
            rest.unlink(missing_ok=True)
        if everything:
            path.unlink(missing_ok=True)
    if everything:
        clear_log(folder)
