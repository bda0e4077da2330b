"""The float network as an ONNX file, to compare a quantized one with."""

from pathlib import Path

from torch.fx import GraphModule

from zsq.export.onnx import write_onnx
from zsq.graph.fold import fold
from zsq.graph.outputs import unpack_outputs
from zsq.types import ImageSpec


def write_float_onnx(network: GraphModule, spec: ImageSpec, path: Path) -> None:
    """Write a float network with its batch norms folded, input ``images`` [batch, C, ...] and its outputs by name.

    Args:
        network: the teacher's graph, on the CPU; left as it is.
        spec: what it takes and gives.
        path: the file to write; it appears whole or not at all.
    Raises:
        ExportError: an operation has no ONNX form.
    """
    folded = fold(network)[0]
    unpack_outputs(folded)
    write_onnx(folded, spec, path)
