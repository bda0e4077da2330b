"""A ``.tflite`` file as it is put together: tensors, operators and metadata in the schema of LiteRT's package."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from zsq.errors import InputError, MissingExtraError

INSTALL = "pip install 'zsq[litert]'"

IDENTIFIER = b"TFL3"
"""Bytes 4 to 8 of every such file."""

ALIGNMENT = 16
"""Bytes to whose multiples stored tensors are aligned."""

VERSIONS = {
    "ADD": 2,
    "AVERAGE_POOL_2D": 2,
    "CONCATENATION": 2,
    "CONV_2D": 3,
    "DEPTHWISE_CONV_2D": 3,
    "DEQUANTIZE": 2,
    "FULLY_CONNECTED": 4,
    "MAXIMUM": 2,
    "MAX_POOL_2D": 2,
    "MEAN": 2,
    "MINIMUM": 2,
    "MIRROR_PAD": 2,
    "MUL": 2,
    "PAD": 2,
    "PADV2": 2,
    "QUANTIZE": 2,
    "RESIZE_NEAREST_NEIGHBOR": 2,
    "STRIDED_SLICE": 2,
    "SUB": 2,
    "TRANSPOSE": 2,
}
"""Version from which an operator takes int8 tensors; 1 where it is not listed."""


def schema() -> Any:
    """Return the module of the schema.

    Raises:
        MissingExtraError: LiteRT's package is not installed.
    """
    try:
        from ai_edge_litert import schema_py_generated
    except ImportError as error:
        raise MissingExtraError(
            f"target litert needs the schema and the interpreter of LiteRT, which are not installed: {INSTALL}"
        ) from error
    return schema_py_generated


@dataclass(frozen=True, slots=True)
class Grid:
    """The grid of a quantized tensor: real = scale x (integer - zero point)."""

    scale: float | np.ndarray
    """One step, or one a channel."""
    zero_point: int = 0
    low: int = -128
    """Least integer that the tensor takes."""
    high: int = 127
    """Largest."""
    axis: int = 0
    """Axis of the channels where there are several scales."""

    def integer(self, value: float) -> int:
        """Return the integer nearest to a value, within the grid's ends."""
        return int(np.clip(np.rint(value / float(self.scale)) + self.zero_point, self.low, self.high))


@dataclass(slots=True)
class FileBuilder:
    """Tensors and operators of one file, in the order of execution."""

    tensors: list[Any] = field(default_factory=list)
    operators: list[Any] = field(default_factory=list)
    buffers: list[bytes] = field(default_factory=lambda: [b""])
    codes: dict[str, int] = field(default_factory=dict)

    def tensor(
        self,
        name: str,
        shape: Sequence[int],
        dtype: str = "INT8",
        *,
        data: np.ndarray | None = None,
        grid: Grid | None = None,
    ) -> int:
        """Add a tensor and return its index; with data it is stored, else an operator gives it.

        Args:
            name: a name for people.
            shape: sizes, the batch as 1.
            dtype: name of the type in the schema.
            data: the values, in the type's own layout.
            grid: what its integers stand for; None for floats and plain integers.
        """
        s = schema()
        tensor = s.TensorT()
        tensor.name, tensor.shape, tensor.hasRank = name.encode(), np.array(shape, np.int32), True
        tensor.type = getattr(s.TensorType, dtype)
        tensor.buffer = 0
        if data is not None:
            tensor.buffer = len(self.buffers)
            self.buffers.append(np.ascontiguousarray(data).tobytes())
        if grid is not None:
            tensor.quantization = quantization = s.QuantizationParametersT()
            quantization.scale = np.atleast_1d(np.asarray(grid.scale, np.float32))
            quantization.zeroPoint = np.full(len(quantization.scale), grid.zero_point, np.int64)
            quantization.quantizedDimension = grid.axis
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def constant(self, name: str, values: Sequence[int] | np.ndarray) -> int:
        """Add a stored int32 tensor, such as the axes or sizes that an operator reads, and return its index."""
        data = np.asarray(values, np.int32)
        return self.tensor(name, data.shape, "INT32", data=data)

    def operator(
        self, code: str, inputs: Sequence[int], output: int, options: str | None = None, **fields: object
    ) -> int:
        """Add an operator that computes `output` from `inputs`, and return `output`.

        Args:
            code: its name in the schema.
            inputs: indices of tensors.
            output: index of a tensor.
            options: name of its table of options in the schema, without `Options`; None for operators without.
            **fields: the options.
        """
        s = schema()
        operator = s.OperatorT()
        operator.opcodeIndex = self.codes.setdefault(code, len(self.codes))
        operator.inputs, operator.outputs = np.array(inputs, np.int32), np.array([output], np.int32)
        if options is not None:
            operator.builtinOptionsType = getattr(s.BuiltinOptions, f"{options}Options")
            operator.builtinOptions = getattr(s, f"{options}OptionsT")()
            for name, value in fields.items():
                setattr(operator.builtinOptions, name, value)
        self.operators.append(operator)
        return output

    def finish(self, inputs: list[int], outputs: list[int], notes: Mapping[str, str]) -> bytes:
        """Return the file.

        Args:
            inputs, outputs: indices of the tensors that it takes and gives.
            notes: metadata, by name.
        """
        s = schema()
        graph = s.SubGraphT()
        graph.tensors, graph.operators, graph.name = self.tensors, self.operators, b"main"
        graph.inputs, graph.outputs = np.array(inputs, np.int32), np.array(outputs, np.int32)
        model = s.ModelT()
        model.version, model.subgraphs, model.operatorCodes, model.metadata = 3, [graph], [], []
        for name in self.codes:
            code = s.OperatorCodeT()
            code.builtinCode = getattr(s.BuiltinOperator, name)
            code.deprecatedBuiltinCode = min(code.builtinCode, 127)  # what readers of before 2020 look at
            code.version = VERSIONS.get(name, 1)
            model.operatorCodes.append(code)
        stored = list(self.buffers)
        for name, text in sorted(notes.items()):
            entry = s.MetadataT()
            entry.name, entry.buffer = name.encode(), len(stored)
            model.metadata.append(entry)
            stored.append(text.encode())
        model.buffers = []
        for data in stored:
            buffer = s.BufferT()
            buffer.data = np.frombuffer(data, np.uint8) if data else None
            model.buffers.append(buffer)
        builder = aligned_builder()
        builder.Finish(model.Pack(builder), IDENTIFIER)
        return bytes(builder.Output())


def aligned_builder() -> Any:
    """Return a builder that puts stored bytes at multiples of 16, as the schema asks and its Python code leaves out."""
    import flatbuffers

    class Builder(flatbuffers.Builder):  # type: ignore[misc]
        def StartVector(self, elemSize: int, numElems: int, alignment: int) -> Any:  # noqa: N802
            return super().StartVector(elemSize, numElems, ALIGNMENT if elemSize == 1 else alignment)

    return Builder(1024)


def read_notes(path: Path) -> dict[str, str]:
    """Return the metadata of a file, by name.

    Raises:
        InputError: there is no such file, or it is none.
        MissingExtraError: LiteRT's package is not installed.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file.")
    data = Path(path).read_bytes()
    if data[4:8] != IDENTIFIER:
        raise InputError(f"{path}: it is no LiteRT file.")
    model = schema().Model.GetRootAs(data)
    entries = [model.Metadata(index) for index in range(model.MetadataLength())]
    return {
        entry.Name().decode(): bytes(model.Buffers(entry.Buffer()).DataAsNumpy()).decode(errors="replace")
        for entry in entries
    }
