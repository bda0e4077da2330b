"""Write a converted network as a torch.export file."""

import io
import zipfile
from pathlib import Path

import torch
from torch import fx

from zsq.errors import InputError
from zsq.export.converted import detached_copy, export_program
from zsq.export.image_spec import KEY, from_json, to_json
from zsq.runtime.files import replacing
from zsq.types import ImageSpec


def write_pt2(converted: fx.GraphModule, spec: ImageSpec, path: Path) -> None:
    """Write a ``torch.export`` file with a dynamic batch; the image spec lies beside it as ``image_spec.json``.

    ``torch.export.load(path).module()`` runs it once ``torch.ao.quantization.fx._decomposed`` is imported. The same
    network gives the same bytes, and no local path is in them.

    Args:
        converted: the converted network (see `zsq.export.converted`), left as it is.
        spec: what the network takes and gives.
        path: the file to write; it appears whole or not at all.
    """
    exported = export_program(detached_copy(converted), spec)
    buffer = io.BytesIO()
    torch.export.save(exported, buffer, extra_files={f"{KEY}.json": to_json(spec)})
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(buffer.getvalue())


def read_pt2(path: Path) -> tuple[fx.GraphModule, ImageSpec]:
    """Read what `write_pt2` wrote: the converted network, and what it takes and gives.

    Raises:
        InputError: there is no such file, or it is none of zsq's.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; zsq quantize writes it beside the target's.")
    notes = {f"{KEY}.json": ""}
    try:
        network = torch.export.load(path, extra_files=notes).module()
    except (RuntimeError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: it is no program that zsq has written.") from error
    if not notes[f"{KEY}.json"] or not isinstance(network, fx.GraphModule):
        raise InputError(f"{path}: it does not say how its images are normalised; zsq has not written it.")
    return network, from_json(notes[f"{KEY}.json"])
