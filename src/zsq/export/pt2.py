"""Write a converted network as a torch.export file."""

import io
from pathlib import Path

import torch
from torch import fx

from zsq.export.converted import detached_copy, export_program
from zsq.export.image_spec import KEY, to_json
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
