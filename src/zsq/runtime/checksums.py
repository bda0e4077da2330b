"""Checksums that files carry, so that damage is seen before anything is computed with it."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zsq.errors import InputError

KEY = "content_sha256"
"""Name under which a file holds the hash of its other content; files of zsq 0.2 have none and are taken as they are."""

COMMENT = f"# {KEY}: "
"""What stands before the hash in the last line of a text."""

CHUNK = 2**20


def file_sha256(path: Path) -> str:
    """Return the hex sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while part := stream.read(CHUNK):
            digest.update(part)
    return digest.hexdigest()


def tensors_sha256(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return the hash over names, types, shapes and bytes of tensors, and over metadata."""
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{json.dumps(name)} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def sealed_text(text: str) -> str:
    """Return a text, whose last line ends, with its hash in a comment behind it."""
    return f"{text}{COMMENT}{hashlib.sha256(text.encode()).hexdigest()}\n"


def check_text(path: Path, text: str) -> None:
    """Check a text that `sealed_text` may have made.

    Raises:
        InputError: it is not the text that was written.
    """
    body, found, said = text.rpartition(COMMENT)
    if found and hashlib.sha256(body.encode()).hexdigest() != said.strip():
        raise InputError(changed(path, "restore it, or start anew with --overwrite"))


def sealed_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values that go into JSON with their hash under `KEY`, in place of one that they had."""
    plain = {name: value for name, value in json.loads(json.dumps(dict(values))).items() if name != KEY}
    return {**plain, KEY: _values_sha256(plain)}


def unsealed_values(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return values without their hash; None where it is not theirs."""
    plain = {name: value for name, value in values.items() if name != KEY}
    return plain if values.get(KEY) in (None, _values_sha256(plain)) else None


def _values_sha256(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def changed(path: Path, remedy: str) -> str:
    """Say that a file is not what was written."""
    return f"{path} is damaged or was edited: its content does not match its checksum; {remedy}."
