"""Files that are written whole or not at all, and tensors on disk."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from zsq.errors import InputError, StorageError
from zsq.runtime.checksums import KEY, changed, tensors_sha256


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes its place only if the block succeeds.

    Raises:
        StorageError: it cannot be written, since the disk is full, for instance.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what fails in the block, which writes to `path`, into an expected fault.

    Raises:
        StorageError: it cannot be written; the text says what helps.
    """
    try:
        yield
    except StorageError:
        raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise StorageError(
            f"{path} cannot be written: {reason}. What was there before is still there. Make room or give another "
            "folder; where a run was stopped, --resume continues it."
        ) from error


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors, whole or not at all, with a checksum of all of it."""
    stored, storages = {}, set[int]()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != value.nbytes:  # safetensors takes no shared memory
            value = value.clone()
        storages.add(value.untyped_storage().data_ptr())
        stored[name] = value
    notes = metadata or {}
    with replacing(path) as temporary:
        save_file(stored, temporary, notes | {KEY: tensors_sha256(stored, notes)})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what `save_tensors` wrote: tensors and metadata.

    Raises:
        InputError: the file is damaged or missing.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            notes: dict[str, str] = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is not a readable safetensors file: {error}.") from error
    said = notes.pop(KEY, None)
    if said is not None and said != tensors_sha256(tensors, notes):
        raise InputError(changed(path, "restore it, or delete it and --resume the run that wrote it"))
    return tensors, notes
