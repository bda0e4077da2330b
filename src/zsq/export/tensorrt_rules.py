"""The rules that TensorRT sets for explicitly quantized ONNX files, checked without TensorRT.

Source: NVIDIA TensorRT documentation, "Working with Quantized Types": symmetric quantization, int8, zero points of 0.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from zsq.export.profile import Profile, Ran, grouped

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
WEIGHTED = ("Conv", "Gemm", "MatMul")
FUSED = ("Add", "Relu", "Clip")
"""What a layer takes into its kernel where it follows."""
MOVES = ("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class _File:
    """A file's nodes by what they make, and its stored tensors."""

    nodes: tuple[onnx.NodeProto, ...]
    stored: dict[str, onnx.TensorProto]
    makers: dict[str, onnx.NodeProto]

    @classmethod
    def of(cls, model: onnx.ModelProto) -> "_File":
        nodes = tuple(model.graph.node)
        stored = {tensor.name: tensor for tensor in model.graph.initializer}
        return cls(nodes, stored, {name: node for node in nodes for name in node.output})

    def made_by(self, name: str) -> str:
        """Return the operator that makes a value; nothing for inputs and stored tensors."""
        return self.makers[name].op_type if name in self.makers else ""

    def rounded_by(self, name: str) -> str:
        """Return the operator that makes a value, before it was moved."""
        while self.made_by(name) in MOVES:
            name = self.makers[name].input[0]
        return self.made_by(name)


def broken_rules(path: Path) -> tuple[str, ...]:
    """Return the rules that a file breaks, each with the first node that does; none for a file that TensorRT takes.

    Judged is the convention of the files that zsq writes: QuantizeLinear and DequantizeLinear with stored scales.
    """
    file = _File.of(onnx.load(path))
    found = []
    for text, rule in RULES.items():
        names = list(rule(file))
        if names:
            found.append(f"{text}: {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}")
    return tuple(found)


def profile_by_rules(path: Path) -> Profile:
    """Return in what TensorRT computes each operator by its rules, without running it.

    A layer computes in int8 where what it reads is dequantized, with what it fuses behind it; any other operator where
    what it gives is quantized as well. What only moves values follows them.
    """
    file = _File.of(onnx.load(path))
    quantized = {name for node in file.nodes if node.op_type == QUANTIZE for name in node.input[:1]}
    inside: set[str] = set()
    kernels = []
    for node in file.nodes:
        if node.op_type in (QUANTIZE, DEQUANTIZE, *MOVES):
            continue
        fused = node.op_type in FUSED and any(name in inside for name in node.input)
        read = [name for name in node.input if name and name not in file.stored]
        dequantized = bool(read) and all(name in inside or file.rounded_by(name) == DEQUANTIZE for name in read)
        integers = dequantized and (fused or node.op_type in WEIGHTED or node.output[0] in quantized)
        if integers and (fused or node.op_type in WEIGHTED):
            inside.update(node.output)
        kernels.append(Ran(node.op_type, ("int8" if integers else "float32",), "fused" if fused else ""))
    return Profile(
        runtime="TensorRT",
        kernels=grouped(kernels),
        source="TensorRT's rules, applied to the file; this is no profile, since TensorRT was not run",
    )


def _stored_integers(file: _File) -> Iterator[tuple[onnx.NodeProto, onnx.TensorProto]]:
    for node in file.nodes:
        if node.op_type == DEQUANTIZE and node.input[0] in file.stored:
            yield node, file.stored[node.input[0]]


def _zero_points(file: _File) -> Iterator[str]:
    for node in file.nodes:
        rounds = node.op_type in (QUANTIZE, DEQUANTIZE) and len(node.input) > 2
        if rounds and numpy_helper.to_array(file.stored[node.input[2]]).any():
            yield node.name


def _unsigned(file: _File) -> Iterator[str]:
    for node in file.nodes:
        if node.op_type == QUANTIZE:
            signed = len(node.input) > 2 and file.stored[node.input[2]].data_type == TensorProto.INT8
            if not signed:
                yield node.name


def _wide_integers(file: _File) -> Iterator[str]:
    for node, tensor in _stored_integers(file):
        if tensor.data_type != TensorProto.INT8:
            yield node.name


def _on_integers(file: _File) -> Iterator[str]:
    for node in file.nodes:
        if node.op_type != DEQUANTIZE and any(file.made_by(name) == QUANTIZE for name in node.input):
            yield node.name


def _lopsided_weights(file: _File) -> Iterator[str]:
    for node, tensor in _stored_integers(file):
        if tensor.data_type == TensorProto.INT8 and (numpy_helper.to_array(tensor) == np.iinfo(np.int8).min).any():
            yield node.name


def _unquantized_operands(file: _File) -> Iterator[str]:
    for node in file.nodes:
        if node.op_type in WEIGHTED and any(file.rounded_by(name) != DEQUANTIZE for name in node.input[:2]):
            yield node.name


def _half_quantized_sums(file: _File) -> Iterator[str]:
    for node in file.nodes:
        read = [name for name in node.input if name not in file.stored]
        if node.op_type == "Add" and len(read) == 2 and any(file.rounded_by(name) != DEQUANTIZE for name in read):
            yield node.name


def _many_scales(file: _File) -> Iterator[str]:
    for node in file.nodes:
        if node.op_type == QUANTIZE and numpy_helper.to_array(file.stored[node.input[1]]).size != 1:
            yield node.name


RULES: dict[str, Callable[[_File], Iterator[str]]] = {
    "zero points must be 0": _zero_points,
    "activations must be int8": _unsigned,
    "stored integers must be int8, and biases float": _wide_integers,
    "nothing may compute on integers but a DequantizeLinear": _on_integers,
    "weights must lie in [-127, 127]": _lopsided_weights,
    "a layer's input and weight must both be dequantized": _unquantized_operands,
    "both branches of a residual addition must be dequantized": _half_quantized_sums,
    "activations must have one scale": _many_scales,
}
"""Each rule, and what finds the nodes that break it."""
