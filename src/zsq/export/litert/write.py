"""Write a converted network as a full-integer ``.tflite`` file.

The file's tensors lie as LiteRT has them, channels last; integers are those of the simulation. Narrower grids than 8
bits lie at the upper end of int8, so that saturation of the type, or a ReLU in the operator, limits them for nothing;
where neither does, an operator follows that does. Operators that LiteRT has in float alone stand between a
dequantization and a quantization.
"""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import fx
from torch.fx import Node
from torch.fx.passes.shape_prop import ShapeProp

from zsq.errors import ExportError
from zsq.export.converted import DEQUANTIZE, QUANTIZE, converted_results, detached_copy
from zsq.export.image_spec import KEY, output_names, to_json
from zsq.export.litert.flatbuffer import FileBuilder, Grid
from zsq.export.options import PLAIN, FileOptions
from zsq.export.pixels import NOTE
from zsq.graph.activations import clamp_limits
from zsq.graph.edit import CONVOLUTIONS, argument, aten, tensor_of
from zsq.runtime.files import replacing
from zsq.types import ImageSpec

NONE, RELU, RELU6 = 0, 1, 3
"""Activations that an operator may hold, by their numbers in the schema."""

SAME, VALID = 0, 1
"""Ways of padding, by their numbers in the schema."""

PER_CHANNEL = torch.ops.quantized_decomposed.dequantize_per_channel.default


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor of the file."""

    index: int
    shape: tuple[int, ...]
    """As PyTorch has it: [N, C, ...]."""
    last: bool
    """Whether the file has its channels last."""
    grid: Grid | None
    """What its integers stand for; None for floats."""

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """As the file has it."""
        return _moved(self.shape) if self.last else self.shape

    @property
    def at_least_zero(self) -> bool:
        """Whether its grid has no negative value."""
        return self.grid is not None and self.grid.low == self.grid.zero_point

    def axis(self, dim: int) -> int:
        """Return where the file has an axis of PyTorch's."""
        dim %= len(self.shape)
        if not self.last or dim == 0:
            return dim
        return len(self.shape) - 1 if dim == 1 else dim - 1


def write_litert(
    converted: fx.GraphModule,
    spec: ImageSpec,
    path: Path,
    options: FileOptions = PLAIN,
    *,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write a full-integer LiteRT file: int8 images [N, H, W, C] in, int8 logits [N, classes] out.

    The same network gives the same bytes. Where no batch is asked for it is 1, and ``resize_tensor_input`` gives any
    other.

    Args:
        converted: the converted network (see `zsq.export.converted`), left as it is.
        spec: what the network takes and gives; also stored in the file's metadata under ``image_spec``.
        path: the file to write; it appears whole or not at all.
        options: what a user may choose of a file: uint8 pixels with mean and deviation folded in, a batch, and weights
            of 4 bits or fewer two to a byte.
        notes: what else stands in the metadata, by name.
    Raises:
        ExportError: an operation has no form in LiteRT, or a weight is -128, which has no opposite.
        MissingExtraError: LiteRT's package is not installed.
    """
    data = _Writer(detached_copy(converted), spec, options).file(notes or {})
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(data)


class _Writer:
    """Translates one network."""

    def __init__(self, network: fx.GraphModule, spec: ImageSpec, options: FileOptions) -> None:
        self.network, self.spec, self.options = network, spec, options
        self.batch = options.batch or 1
        ShapeProp(network).propagate(torch.zeros(self.batch, *spec.shape))
        self.builder = FileBuilder()
        self.values: dict[Node, Value] = {}
        self.moves: dict[tuple[int, bool], Value] = {}
        self.input = -1

    def file(self, notes: Mapping[str, str]) -> bytes:
        """Return the file."""
        found = []
        for result, name in zip(converted_results(self.network.graph), output_names(self.spec), strict=True):
            value = self.moved(self.integers(result), last=False)
            self.builder.tensors[value.index].name = name.encode()
            found.append(value.index)
        known = dict(notes) | {KEY: to_json(self.spec)} | ({NOTE: self.options.pixels} if self.options.pixels else {})
        return self.builder.finish([self.input], found, known)

    # Values

    def integers(self, node: Node) -> Value:
        """Return the tensor of a dequantization, or of what only moves its values."""
        if node not in self.values:
            if node.target == DEQUANTIZE:
                self.values[node] = self.quantized(node.args[0])
            elif node.target in MOVES and isinstance(node.args[0], Node):
                self.values[node] = MOVES[node.target](self, node, self.integers(node.args[0]))
            else:
                raise _no_form(node)
        return self.values[node]

    def is_integer(self, node: object) -> bool:
        """Whether a node's value is that of a dequantized tensor, perhaps moved."""
        if not isinstance(node, Node):
            return False
        if node.target == DEQUANTIZE:
            return isinstance(node.args[0], Node) and node.args[0].target == QUANTIZE
        return node.target in MOVES and self.is_integer(node.args[0])

    def quantized(self, node: object) -> Value:
        """Return the tensor of a quantization: an integer operator with what limits it, or floats that are rounded."""
        assert isinstance(node, Node)
        if node in self.values:
            return self.values[node]
        if node.target != QUANTIZE:
            raise _no_form(node)
        source, scale, zero_point, low, high, _ = cast(tuple[Any, ...], node.args)
        up = 127 - high
        grid = Grid(scale, zero_point + up, low + up, 127)
        core, rounding = self.rounding(source, grid)
        if core.op == "placeholder":
            value = self.image(grid)
        elif core.target in OPERATORS and all(map(self.is_integer, _tensors_read(core))):
            value = OPERATORS[core.target](self, core, rounding)
        elif self.is_integer(core):
            value = rounding.rounded(self.integers(core), f"{core.name}_{node.name}")
        else:
            value = self.rounded_floats(self.floats(core), rounding, core.name)
        self.values[node] = value
        return value

    def rounding(self, node: object, grid: Grid) -> tuple[Node, "_Rounding"]:
        """Return the operation behind the activations that only limit it, and how its result is limited and rounded."""
        low, high, by_channel = grid.low, grid.high, list[Node]()
        while isinstance(node, Node) and (clamp_limits(node) is not None or node.target is aten.clamp.Tensor):
            limits = clamp_limits(node)
            if limits is None:
                by_channel.insert(0, node)
            else:
                least, most = (grid.integer(limit) for limit in limits)
                low, high = min(max(low, least), most), max(min(high, most), least)
            node = node.args[0]
        assert isinstance(node, Node)
        return node, _Rounding(self, grid, low, high, tuple(by_channel))

    def image(self, grid: Grid) -> Value:
        """Return the network's input, rounded."""
        channels, shape = self.spec.channels, (self.batch, *self.spec.shape)
        if self.options.pixels is None:
            value = self.new("images", shape, grid, last=True)
            self.input = value.index
            return value
        last = self.options.pixels == "nhwc"
        stored = _moved(shape) if last else shape
        self.input = self.builder.tensor(NOTE, stored, "UINT8", grid=Grid(1.0))
        bytes_grid = Grid(1.0, -128)
        signed = self.new("pixels_signed", shape, bytes_grid, last=last)
        self.builder.operator("QUANTIZE", [self.input], signed.index, "Quantize")
        mean, std = (np.broadcast_to(np.asarray(v, np.float64), channels) for v in (self.spec.mean, self.spec.std))
        step = 1 / (255 * std * 127)
        return self.depthwise(
            "normalized",
            self.moved(signed, last=True),
            np.full((1, 1, 1, channels), 127, np.int8),
            step,
            np.rint(-mean / std / step).astype(np.int32),
            _Rounding(self, grid, grid.low, grid.high),
        )

    def new(self, name: str, shape: Sequence[int], grid: Grid | None, *, last: bool) -> Value:
        """Add a tensor that an operator gives."""
        value = Value(-1, tuple(shape), last, grid)
        kind = "FLOAT32" if grid is None else "INT8"
        return Value(self.builder.tensor(name, value.stored_shape, kind, grid=grid), tuple(shape), last, grid)

    def moved(self, value: Value, *, last: bool) -> Value:
        """Return a value with its channels last, or where PyTorch has them."""
        rank = len(value.shape)
        if value.last == last or rank < 3:
            return value if value.last == last else Value(value.index, value.shape, last, value.grid)
        key = (value.index, last)
        if key not in self.moves:
            name = f"tensor_{value.index}_{'last' if last else 'first'}"
            result = self.new(name, value.shape, value.grid, last=last)
            if value.shape[1] == 1 or math.prod(value.shape[2:]) == 1:
                self.reshaped(value, result)
            else:
                order = [0, *range(2, rank), 1] if last else [0, rank - 1, *range(1, rank - 1)]
                axes = self.builder.constant(f"{name}_axes", order)
                self.builder.operator("TRANSPOSE", [value.index, axes], result.index, "Transpose")
            self.moves[key] = result
        return self.moves[key]

    def reshaped(self, value: Value, result: Value) -> Value:
        """Let `result` have the values of another, in the same order of memory."""
        sizes = [-1, *result.stored_shape[1:]]
        shape = self.builder.constant(f"tensor_{result.index}_shape", sizes)
        self.builder.operator("RESHAPE", [value.index, shape], result.index, "Reshape", newShape=np.array(sizes))
        return result

    def rounded_floats(self, value: Value, rounding: "_Rounding", name: str) -> Value:
        """Return floats on a grid, limited."""
        return rounding.operator(
            "QUANTIZE", [value], value.shape, f"{name}_rounded", "Quantize", last=value.last, fuses=False
        )

    def bounded(self, value: Value, low: int, high: int, name: str) -> Value:
        """Return integers between two, by operators where the type's own ends do not serve."""
        for code, limit, end in (("MAXIMUM", low, -128), ("MINIMUM", high, 127)):
            if limit != end:
                value = self.against(code, value, np.array([limit], np.int8), f"{name}_{code.lower()}")
        return value

    def bounded_by_channel(self, value: Value, node: Node, name: str) -> Value:
        """Apply `clamp` with a tensor of limits, [C] or such that it broadcasts over [C, ...]."""
        grid = value.grid
        assert grid is not None
        for code, position in (("MAXIMUM", 1), ("MINIMUM", 2)):
            limit = tensor_of(self.network, argument(node, position))
            if limit is None:
                continue
            steps = (limit.double() / float(grid.scale)).round() + grid.zero_point
            integers = steps.clamp(grid.low, grid.high).to(torch.int8)
            array = integers.broadcast_to((1, *limit.shape[-len(value.shape) + 1 :])).numpy()
            if value.last and array.ndim > 2:
                array = np.moveaxis(array, 1, -1)
            value = self.against(code, value, array, f"{name}_{code.lower()}")
        return value

    def against(self, code: str, value: Value, limit: np.ndarray, name: str) -> Value:
        """Return the larger or smaller of a value and stored integers."""
        stored = self.builder.tensor(f"{name}_limit", limit.shape, data=limit, grid=value.grid)
        result = self.new(name, value.shape, value.grid, last=value.last)
        self.builder.operator(code, [value.index, stored], result.index, "MaximumMinimum")
        return result

    # Layers

    def layer_parts(self, layer: Node) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return weight as integers, its steps [1] or [out], and bias as integers at input step x weight step."""
        weight, steps = self.stored(layer.args[1])
        bias = argument(layer, 2)
        integers = self.stored(bias)[0] if isinstance(bias, Node) else np.zeros(len(weight), np.int32)
        if weight.min() < -127:
            raise ExportError(
                f"the weight of '{layer.name}' reaches -128, and LiteRT's end at -127: quantize with target litert."
            )
        return weight, steps, integers.astype(np.int32)

    def stored(self, node: object) -> tuple[np.ndarray, np.ndarray]:
        """Return the integers behind a dequantization of stored ones, and their steps."""
        assert isinstance(node, Node)
        integers = tensor_of(self.network, node.args[0]) if node.target in (PER_CHANNEL, DEQUANTIZE) else None
        if integers is None:
            raise _no_form(node)
        scale = tensor_of(self.network, node.args[1]) if node.target == PER_CHANNEL else torch.tensor([node.args[1]])
        assert scale is not None
        return integers.numpy(), scale.double().numpy()

    def floats(self, node: Node) -> Value:
        """Return a float tensor: dequantized integers, or the result of a float operator."""
        if node in self.values and self.values[node].grid is None:
            return self.values[node]
        if self.is_integer(node):
            source = self.integers(node)
            value = self.new(f"{node.name}_float", source.shape, None, last=source.last)
            self.builder.operator("DEQUANTIZE", [source.index], value.index, "Dequantize")
            return value
        if node.target not in FLOATS:
            raise _no_form(node)
        self.values[node] = value = FLOATS[node.target](self, node)
        return value

    def depthwise(
        self, name: str, x: Value, weight: np.ndarray, steps: np.ndarray, bias: np.ndarray, rounding: "_Rounding"
    ) -> Value:
        """Add a depthwise convolution of one pixel, channels last, with its weight [1, 1, 1, C]."""
        options: dict[str, Any] = {
            "padding": VALID,
            "strideW": 1,
            "strideH": 1,
            "dilationWFactor": 1,
            "dilationHFactor": 1,
        }
        return rounding.operator(
            "DEPTHWISE_CONV_2D",
            [x, *self.stored_layer(name, weight, steps, bias, x, axis=3)],
            x.shape,
            name,
            "DepthwiseConv2D",
            depthMultiplier=1,
            **options,
        )

    def stored_layer(
        self, name: str, weight: np.ndarray, steps: np.ndarray, bias: np.ndarray, x: Value, *, axis: int
    ) -> list[int]:
        """Store a layer's weight and bias and return the indices of their tensors."""
        assert x.grid is not None
        narrow = self.options.packed and abs(weight).max() <= 7
        data, kind = (_packed(weight), "INT4") if narrow else (weight.astype(np.int8), "INT8")
        weights = self.builder.tensor(f"{name}_weight", weight.shape, kind, data=data, grid=Grid(steps, axis=axis))
        product = Grid(np.float32(x.grid.scale) * steps.astype(np.float32))
        return [weights, self.builder.tensor(f"{name}_bias", bias.shape, "INT32", data=bias, grid=product)]


@dataclass(frozen=True, slots=True)
class _Rounding:
    """How an operator's result is limited and rounded."""

    writer: _Writer
    grid: Grid
    low: int
    """Least integer that the result may be."""
    high: int
    """Largest."""
    by_channel: tuple[Node, ...] = ()
    """Activations with a limit a channel, still to be applied."""

    def operator(
        self,
        code: str,
        inputs: Sequence[Value | int],
        shape: Sequence[int],
        name: str,
        options: str | None = None,
        *,
        last: bool = True,
        fuses: bool = True,
        at_least_zero: bool = False,
        **fields: Any,
    ) -> Value:
        """Add an operator whose result lies on the grid, and what else limits it.

        Args:
            code, options, fields: as for `FileBuilder.operator`.
            inputs: what it reads.
            shape: of its result, as PyTorch has it.
            name: of its result.
            last: whether its channels lie last.
            fuses: whether the operator can hold an activation.
            at_least_zero: whether its result is never negative, so that a grid that begins at zero holds it.
        """
        result = self.writer.new(name, shape, self.grid, last=last)
        activation = self.activation() if fuses else None
        if fuses:
            fields["fusedActivationFunction"] = activation or NONE
        indices = [each.index if isinstance(each, Value) else each for each in inputs]
        self.writer.builder.operator(code, indices, result.index, options, **fields)
        held = at_least_zero and (self.low, self.high) == (self.grid.zero_point, 127)
        return self.limited(result, name, within=held or activation is not None)

    def activation(self) -> int | None:
        """Return the activation that keeps a result within the ends; None where there is none."""
        if (self.low, self.high) == (-128, 127):
            return NONE
        zero, six = self.grid.zero_point, int(np.rint(6 / float(self.grid.scale)))
        tops = {RELU: 127, RELU6: min(127, zero + six)}
        return next((each for each, top in tops.items() if (self.low, self.high) == (zero, top)), None)

    def limited(self, value: Value, name: str, *, within: bool) -> Value:
        """Apply the limits to integers of the grid, which may be within the ends already."""
        if not within:
            value = self.writer.bounded(value, self.low, self.high, name)
        for node in self.by_channel:
            value = self.writer.bounded_by_channel(value, node, f"{name}_{node.name}")
        return value

    def rounded(self, value: Value, name: str) -> Value:
        """Return integers of any grid on this one, limited."""
        assert value.grid is not None
        if value.grid == self.grid:
            return self.limited(value, name, within=(value.grid.low, value.grid.high) == (self.low, self.high))
        return self.operator(
            "QUANTIZE", [value], value.shape, f"{name}_rounded", "Quantize", last=value.last, fuses=False
        )


def _packed(integers: np.ndarray) -> np.ndarray:
    """Return integers of 4 bits two to a byte, the first in the lower half."""
    flat = integers.astype(np.int8).ravel()
    flat = np.append(flat, np.zeros(len(flat) % 2, np.int8)).view(np.uint8) & 15
    return flat[::2] | flat[1::2] << 4


def _moved(shape: Sequence[int]) -> tuple[int, ...]:
    """Return a shape with its channels last."""
    return (shape[0], *shape[2:], shape[1]) if len(shape) > 2 else tuple(shape)


def _shape_of(node: Node) -> tuple[int, ...]:
    return tuple(node.meta["tensor_meta"].shape)


def _tensors_read(node: Node) -> list[Node]:
    """Return the activations that an operation reads."""
    if node.target in CONVOLUTIONS or node.target is aten.linear.default:
        return [node.args[0]]  # type: ignore[list-item]
    return list(node.all_input_nodes)


def _no_form(node: Node) -> ExportError:
    return ExportError(
        f"the network has no LiteRT form: '{node.name}' computes {str(node.target).removeprefix('aten.')}, which the "
        "file could not hold. Targets onnxruntime and openvino take it."
    )


# Integer operators


def _pair(value: Any) -> tuple[int, int]:
    """Return sizes along height and width of an argument that may give one for both."""
    values = [value] if isinstance(value, int) else list(value)
    return values[0], values[-1]


def _convolution(writer: _Writer, node: Node, rounding: _Rounding) -> Value:
    x = writer.moved(writer.integers(node.args[0]), last=True)  # type: ignore[arg-type]
    weight, steps, bias = writer.layer_parts(node)
    flat = weight.ndim == 3
    if weight.ndim == 5:
        raise _no_form(node)
    shape = _shape_of(node)
    if flat:  # a signal is a map of one row
        weight = weight[:, :, None]
        x = writer.reshaped(x, writer.new(f"{node.name}_row", (*x.shape[:2], 1, x.shape[2]), x.grid, last=True))
    stride, dilation = (_pair(argument(node, place, [1, 1])) for place in (3, 5))
    padding, groups = argument(node, 4, [0, 0]), argument(node, 6, 1)
    if flat:
        stride, dilation = (1, stride[1]), (1, dilation[1])
    kernel = weight.shape[2:]
    if isinstance(padding, str):
        reach = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        ends = [(r // 2, r - r // 2) for r in reach]
    else:
        ends = [(p, p) for p in ((0, padding[-1]) if flat else _pair(padding))]
    x, way = _padded(writer, x, kernel, stride, dilation, ends, node.name)
    options: dict[str, Any] = {
        "padding": way,
        "strideH": stride[0],
        "strideW": stride[1],
        "dilationHFactor": dilation[0],
        "dilationWFactor": dilation[1],
    }
    given = (*shape[:2], 1, shape[2]) if flat else shape
    if groups == x.shape[1] and weight.shape[1] == 1:
        parts = writer.stored_layer(node.name, weight.transpose(1, 2, 3, 0), steps, bias, x, axis=3)
        options["depthMultiplier"] = len(weight) // groups
        result = rounding.operator("DEPTHWISE_CONV_2D", [x, *parts], given, node.name, "DepthwiseConv2D", **options)
    else:
        parts = writer.stored_layer(node.name, weight.transpose(0, 2, 3, 1), steps, bias, x, axis=0)
        result = rounding.operator("CONV_2D", [x, *parts], given, node.name, "Conv2D", **options)
    if flat:
        return writer.reshaped(result, writer.new(f"{node.name}_signal", shape, result.grid, last=True))
    return result


def _padded(
    writer: _Writer,
    x: Value,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    ends: Sequence[tuple[int, int]],
    name: str,
    code: str = "PAD",
) -> tuple[Value, int]:
    """Return a map and the way in which an operator pads it; where none serves, an operator in front pads."""
    if not any(before or after for before, after in ends):
        return x, VALID
    same = []
    for size, k, s, d, (before, after) in zip(x.shape[2:], kernel, stride, dilation, ends, strict=True):
        reach = d * (k - 1) + 1
        steps = -(-size // s)
        wanted = max((steps - 1) * s + reach - size, 0)
        same.append((size + before + after - reach) // s + 1 == steps and wanted // 2 == before)
    if all(same):
        return x, SAME
    return _pad(writer, x, [(0, 0), *ends, (0, 0)], name, code), VALID


def _pad(
    writer: _Writer, x: Value, ends: Sequence[Sequence[int]], name: str, code: str = "PAD", fill: int = 0
) -> Value:
    """Pad with zeros, or, by PADV2, with an integer; `ends` per axis as the file has them."""
    sizes = [size + sum(end) for size, end in zip(x.stored_shape, ends, strict=True)]
    shape = (sizes[0], sizes[-1], *sizes[1:-1]) if x.last and len(sizes) > 2 else tuple(sizes)
    result = writer.new(f"{name}_padded", shape, x.grid, last=x.last)
    inputs = [x.index, writer.builder.constant(f"{name}_ends", np.array(ends))]
    if code == "PADV2":
        inputs.append(writer.builder.tensor(f"{name}_fill", [1], data=np.array([fill], np.int8), grid=x.grid))
    writer.builder.operator(code, inputs, result.index, "PadV2" if code == "PADV2" else "Pad")
    return result


def _linear(writer: _Writer, node: Node, rounding: _Rounding) -> Value:
    x = writer.moved(writer.integers(node.args[0]), last=False)  # type: ignore[arg-type]
    weight, steps, bias = writer.layer_parts(node)
    parts = writer.stored_layer(node.name, weight, steps, bias, x, axis=0)
    shape = _shape_of(node)
    return rounding.operator(
        "FULLY_CONNECTED", [x, *parts], shape, node.name, "FullyConnected", last=False, keepNumDims=len(shape) > 2
    )


def _elementwise(code: str, options: str) -> Callable[[_Writer, Node, _Rounding], Value]:
    def translate(writer: _Writer, node: Node, rounding: _Rounding) -> Value:
        if len(node.args) != 2 or node.kwargs:
            raise _no_form(node)
        values = [_operand(writer, arg, node, place) for place, arg in enumerate(node.args)]
        ranks = {len(value.shape) for value in values if value.shape}
        last = len(ranks) == 1 and any(value.last for value in values)
        values = [writer.moved(value, last=last) if value.shape else value for value in values]
        return rounding.operator(code, values, _shape_of(node), node.name, options, last=last)

    return translate


def _operand(writer: _Writer, arg: object, node: Node, place: int) -> Value:
    """Return an operand: a tensor, or a number as one integer of its own grid."""
    if isinstance(arg, Node):
        return writer.integers(arg)
    number = float(arg)  # type: ignore[arg-type]
    grid = Grid(abs(number) or 1.0)
    data = np.array([int(np.sign(number))], np.int8)
    index = writer.builder.tensor(f"{node.name}_number_{place}", [1], data=data, grid=grid)
    return Value(index, (), False, grid)


def _mean(writer: _Writer, node: Node, rounding: _Rounding) -> Value:
    x = writer.integers(node.args[0])  # type: ignore[arg-type]
    if node.target is aten.adaptive_avg_pool2d.default:
        if [*node.args[1]] != [1, 1]:  # type: ignore[misc]
            return _adaptive_pool(writer, node, rounding)
        dims, keeps = [2, 3], True
    else:
        dims, keeps = list(node.args[1]), bool(argument(node, 2, False))  # type: ignore[arg-type]
    x = writer.moved(x, last=x.last and (keeps or len(x.shape) - len(dims) == 2))
    axes = writer.builder.constant(f"{node.name}_axes", sorted(x.axis(dim) for dim in dims))
    return rounding.operator(
        "MEAN",
        [x, axes],
        _shape_of(node),
        node.name,
        "Reducer",
        last=x.last,
        fuses=False,
        at_least_zero=x.at_least_zero,
        keepDims=keeps,
    )


def _adaptive_pool(writer: _Writer, node: Node, rounding: _Rounding) -> Value:
    sizes, wanted = _shape_of(node.args[0])[2:], list(node.args[1])  # type: ignore[arg-type]
    if any(size % want for size, want in zip(sizes, wanted, strict=True)):
        raise _no_form(node)
    kernel = tuple(size // want for size, want in zip(sizes, wanted, strict=True))
    return _average(writer, node, rounding, kernel, kernel, (0, 0))


def _average_pool(writer: _Writer, node: Node, rounding: _Rounding) -> Value:
    kernel = _pair(node.args[1])
    stride, padding = _pair(argument(node, 2) or list(kernel)), _pair(argument(node, 3, [0, 0]))
    whole = not any(padding) or argument(node, 5, True)
    if argument(node, 4, False) or not whole or argument(node, 6) is not None:
        raise _no_form(node)
    return _average(writer, node, rounding, kernel, stride, padding)


def _average(
    writer: _Writer,
    node: Node,
    rounding: _Rounding,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> Value:
    """Add the mean of a window as a depthwise convolution by ones, which rounds once; pooling must keep its grid."""
    x = writer.moved(writer.integers(node.args[0]), last=True)  # type: ignore[arg-type]
    x, way = _padded(writer, x, kernel, stride, (1, 1), [(p, p) for p in padding], node.name)
    channels, count = x.shape[1], kernel[0] * kernel[1]
    weight, bias = np.ones((1, *kernel, channels), np.int8), np.zeros(channels, np.int32)
    parts = writer.stored_layer(node.name, weight, np.full(channels, 1 / count), bias, x, axis=3)
    return rounding.operator(
        "DEPTHWISE_CONV_2D",
        [x, *parts],
        _shape_of(node),
        node.name,
        "DepthwiseConv2D",
        padding=way,
        strideH=stride[0],
        strideW=stride[1],
        depthMultiplier=1,
        dilationWFactor=1,
        dilationHFactor=1,
    )


def _concatenation(writer: _Writer, node: Node, rounding: _Rounding) -> Value:
    values = [writer.integers(each) for each in node.args[0]]  # type: ignore[union-attr, arg-type]
    last = any(value.last for value in values)
    plain = _Rounding(writer, rounding.grid, rounding.grid.low, rounding.grid.high)
    values = [plain.rounded(writer.moved(value, last=last), f"{node.name}_{i}") for i, value in enumerate(values)]
    axis = values[0].axis(int(argument(node, 1, 0)))
    return rounding.operator(
        "CONCATENATION", values, _shape_of(node), node.name, "Concatenation", last=last, fuses=False, axis=axis
    )


def _hardswish(writer: _Writer, node: Node, rounding: _Rounding) -> Value:
    x = writer.integers(node.args[0])  # type: ignore[arg-type]
    return rounding.operator("HARD_SWISH", [x], x.shape, node.name, "HardSwish", last=x.last, fuses=False)


def _hardsigmoid(writer: _Writer, node: Node, rounding: _Rounding) -> Value:
    """Add relu6(x + 3) on a grid six times as coarse as the result's, whose integers a product by 1/6 leaves alone."""
    x, grid = writer.integers(node.args[0]), rounding.grid  # type: ignore[arg-type]
    three = _operand(writer, 3.0, node, 1)
    coarse = Grid(6 * float(grid.scale), grid.zero_point, grid.low, grid.high)
    opened = _Rounding(writer, coarse, coarse.integer(0), coarse.integer(6)).operator(
        "ADD", [x, three], x.shape, f"{node.name}_opened", "Add", last=x.last
    )
    sixth = _operand(writer, 1 / 6, node, 2)
    return rounding.operator("MUL", [opened, sixth], x.shape, node.name, "Mul", last=x.last)


OPERATORS: dict[Any, Callable[[_Writer, Node, _Rounding], Value]] = {
    **dict.fromkeys((aten.conv1d.default, aten.conv2d.default, aten.conv1d.padding, aten.conv2d.padding), _convolution),
    aten.linear.default: _linear,
    aten.add.Tensor: _elementwise("ADD", "Add"),
    aten.sub.Tensor: _elementwise("SUB", "Sub"),
    aten.mul.Tensor: _elementwise("MUL", "Mul"),
    aten.mean.dim: _mean,
    aten.adaptive_avg_pool2d.default: _mean,
    aten.avg_pool2d.default: _average_pool,
    aten.cat.default: _concatenation,
    aten.hardswish.default: _hardswish,
    aten.hardsigmoid.default: _hardsigmoid,
}
"""What computes on integers: translation of an operation, given how its result is rounded."""


# Operators that only move or choose values


def _reshape(writer: _Writer, node: Node, x: Value) -> Value:
    shape = _shape_of(node)
    if x.last and math.prod(x.shape[2:]) != 1:
        x = writer.moved(x, last=False)
    return writer.reshaped(x, writer.new(node.name, shape, x.grid, last=False))


def _same(writer: _Writer, node: Node, x: Value) -> Value:
    return x


def _permute(writer: _Writer, node: Node, x: Value) -> Value:
    rank = len(x.shape)
    if node.target is aten.transpose.int:
        order = list(range(rank))
        one, other = (int(dim) % rank for dim in node.args[1:3])  # type: ignore[arg-type]
        order[one], order[other] = other, one
    else:
        order = [int(dim) % rank for dim in node.args[1]]  # type: ignore[union-attr, arg-type]
    x = writer.moved(x, last=False)
    axes = writer.builder.constant(f"{node.name}_axes", order)
    result = writer.new(node.name, _shape_of(node), x.grid, last=False)
    writer.builder.operator("TRANSPOSE", [x.index, axes], result.index, "Transpose")
    return result


def _slice(writer: _Writer, node: Node, x: Value) -> Value:
    dim, begin, step = int(argument(node, 1, 0)), argument(node, 2), int(argument(node, 4, 1))
    size = x.shape[dim]
    start, stop, _ = slice(begin, argument(node, 3)).indices(size)
    if (start, stop, step) == (0, size, 1):
        return x
    return _strided(writer, x, dim, start, stop, step, node.name)


def _strided(writer: _Writer, x: Value, dim: int, start: int, stop: int, step: int, name: str) -> Value:
    rank, axis = len(x.shape), x.axis(dim)
    begins, ends, steps = [0] * rank, list(x.stored_shape), [1] * rank
    begins[axis], ends[axis], steps[axis] = start, stop, step
    shape = list(x.shape)
    shape[dim] = len(range(start, stop, step))
    result = writer.new(name, shape, x.grid, last=x.last)
    parts = [
        writer.builder.constant(f"{name}_{role}", v) for role, v in (("begin", begins), ("end", ends), ("step", steps))
    ]
    everything = sum(1 << place for place in range(rank) if place != axis)
    writer.builder.operator(
        "STRIDED_SLICE", [x.index, *parts], result.index, "StridedSlice", beginMask=everything, endMask=everything
    )
    return result


def _select(writer: _Writer, node: Node, x: Value) -> Value:
    dim = int(node.args[1]) % len(x.shape)  # type: ignore[arg-type]
    place = int(node.args[2]) % x.shape[dim]  # type: ignore[arg-type]
    chosen = _strided(writer, writer.moved(x, last=False), dim, place, place + 1, 1, f"{node.name}_chosen")
    return writer.reshaped(chosen, writer.new(node.name, _shape_of(node), x.grid, last=False))


def _constant_pad(writer: _Writer, node: Node, x: Value) -> Value:
    sizes = list(node.args[1])  # type: ignore[arg-type]
    mode, fill = argument(node, 2, "constant"), argument(node, 3)
    if node.target is aten.constant_pad_nd.default:
        mode, fill = "constant", argument(node, 2)
    rank = len(x.shape)
    ends = [(0, 0)] * rank
    for place in range(len(sizes) // 2):
        ends[x.axis(rank - 1 - place)] = (int(sizes[2 * place]), int(sizes[2 * place + 1]))
    if mode != "constant" or any(min(end) < 0 for end in ends):
        raise _no_form(node)
    if not fill:
        return _pad(writer, x, ends, node.name)
    assert x.grid is not None
    return _pad(writer, x, ends, node.name, "PADV2", x.grid.integer(float(fill)))


def _max_pool(writer: _Writer, node: Node, x: Value) -> Value:
    shape, kernel = _shape_of(node), _pair(node.args[1])
    stride, padding = _pair(argument(node, 2) or list(kernel)), _pair(argument(node, 3, [0, 0]))
    if _pair(argument(node, 4, [1, 1])) != (1, 1):
        raise _no_form(node)
    x = writer.moved(x, last=True)
    ends = [
        (p, max(p, (count - 1) * s + k - size - p))
        for p, k, s, size, count in zip(padding, kernel, stride, x.shape[2:], shape[2:], strict=True)
    ]
    if any(before or after for before, after in ends):
        x = _pad(writer, x, [(0, 0), *ends, (0, 0)], node.name, "PADV2", -128)
    result = writer.new(node.name, shape, x.grid, last=True)
    writer.builder.operator(
        "MAX_POOL_2D",
        [x.index],
        result.index,
        "Pool2D",
        padding=VALID,
        strideH=stride[0],
        strideW=stride[1],
        filterHeight=kernel[0],
        filterWidth=kernel[1],
    )
    return result


def _nearest(writer: _Writer, node: Node, x: Value) -> Value:
    """Translate upsampling by the nearest value: a place reads where it lies, rounded down, in both libraries."""
    shape = _shape_of(node)
    x = writer.moved(x, last=True)
    size = writer.builder.constant(f"{node.name}_size", list(shape[2:]))
    result = writer.new(node.name, shape, x.grid, last=True)
    writer.builder.operator("RESIZE_NEAREST_NEIGHBOR", [x.index, size], result.index, "ResizeNearestNeighbor")
    return result


def _part(writer: _Writer, node: Node, x: Value) -> Value:
    """Translate `getitem` of a split: `x` is what is split."""
    split, place = node.args
    assert isinstance(split, Node)
    dim = int(argument(split, 2, 0)) % len(x.shape)
    sizes = [meta.shape[dim] for meta in split.meta["tensor_meta"]]
    start = sum(sizes[: int(place)])  # type: ignore[arg-type]
    return _strided(writer, x, dim, start, start + sizes[int(place)], 1, node.name)  # type: ignore[arg-type]


MOVES: dict[Any, Callable[[_Writer, Node, Value], Value]] = {
    **dict.fromkeys(
        (
            aten.flatten.using_ints,
            aten.view.default,
            aten.reshape.default,
            aten.squeeze.dim,
            aten.squeeze.dims,
            aten.unsqueeze.default,
            aten.unflatten.int,
        ),
        _reshape,
    ),
    **dict.fromkeys((aten.contiguous.default, aten.clone.default), _same),
    **dict.fromkeys((aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default), _same),
    **dict.fromkeys((aten.permute.default, aten.transpose.int), _permute),
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    **dict.fromkeys((aten.pad.default, aten.constant_pad_nd.default), _constant_pad),
    aten.max_pool2d.default: _max_pool,
    aten.upsample_nearest2d.vec: _nearest,
    operator.getitem: _part,
}
"""What only moves or chooses integers: translation of an operation, given its source."""


# Float operators


def _unary(code: str, options: str | None = None, **fields: object) -> Callable[[_Writer, Node], Value]:
    def translate(writer: _Writer, node: Node) -> Value:
        x = writer.floats(node.args[0])  # type: ignore[arg-type]
        result = writer.new(node.name, x.shape, None, last=x.last)
        writer.builder.operator(code, [x.index], result.index, options, **fields)
        return result

    return translate


def _silu(writer: _Writer, node: Node) -> Value:
    x = writer.floats(node.args[0])  # type: ignore[arg-type]
    gate, result = (writer.new(f"{node.name}{end}", x.shape, None, last=x.last) for end in ("_gate", ""))
    writer.builder.operator("LOGISTIC", [x.index], gate.index)
    writer.builder.operator("MUL", [x.index, gate.index], result.index, "Mul")
    return result


def _softmax(writer: _Writer, node: Node) -> Value:
    x = writer.moved(writer.floats(node.args[0]), last=False)  # type: ignore[arg-type]
    if int(node.args[1]) % len(x.shape) != len(x.shape) - 1:  # type: ignore[arg-type]
        raise _no_form(node)
    result = writer.new(node.name, x.shape, None, last=False)
    writer.builder.operator("SOFTMAX", [x.index], result.index, "Softmax", beta=1.0)
    return result


def _length(writer: _Writer, node: Node) -> Value:
    """Translate the Euclidean length of vectors along one dimension."""
    x = writer.moved(writer.floats(node.args[0]), last=False)  # type: ignore[arg-type]
    order, dims = argument(node, 1, 2), argument(node, 2)
    if order != 2 or not dims or len(dims) != 1:
        raise _no_form(node)
    dim = int(dims[0]) % len(x.shape)
    kept = [1 if place == dim else size for place, size in enumerate(x.shape)]
    squares, sums = (
        writer.new(f"{node.name}_{role}", shape, None, last=False)
        for role, shape in (("squares", x.shape), ("sum", kept))
    )
    writer.builder.operator("MUL", [x.index, x.index], squares.index, "Mul")
    axis = writer.builder.constant(f"{node.name}_axis", [dim])
    writer.builder.operator("SUM", [squares.index, axis], sums.index, "Reducer", keepDims=True)
    root = writer.new(f"{node.name}_root", kept, None, last=False)
    writer.builder.operator("SQRT", [sums.index], root.index)
    return (
        root
        if argument(node, 3, False)
        else writer.reshaped(root, writer.new(node.name, _shape_of(node), None, last=False))
    )


def _at_least(writer: _Writer, node: Node) -> Value:
    x = writer.floats(node.args[0])  # type: ignore[arg-type]
    low, high = clamp_limits(node) or (-math.inf, math.inf)
    for code, limit in (("MAXIMUM", low), ("MINIMUM", high)):
        if math.isfinite(limit):
            stored = writer.builder.tensor(
                f"{node.name}_{code.lower()}_limit", (1,), "FLOAT32", data=np.array([limit], np.float32)
            )
            result = writer.new(f"{node.name}_{code.lower()}", x.shape, None, last=x.last)
            writer.builder.operator(code, [x.index, stored], result.index, "MaximumMinimum")
            x = result
    return x


def _expanded(writer: _Writer, node: Node) -> Value:
    """Leave an expansion to the operator that reads it, which broadcasts."""
    return writer.floats(node.args[0])  # type: ignore[arg-type]


def _quotient(writer: _Writer, node: Node) -> Value:
    values = [writer.moved(writer.floats(arg), last=False) for arg in node.args if isinstance(arg, Node)]
    if len(values) != 2:
        raise _no_form(node)
    result = writer.new(node.name, _shape_of(node), None, last=False)
    writer.builder.operator("DIV", [value.index for value in values], result.index, "Div")
    return result


FLOATS: dict[Any, Callable[[_Writer, Node], Value]] = {
    aten.sigmoid.default: _unary("LOGISTIC"),
    aten.tanh.default: _unary("TANH"),
    aten.exp.default: _unary("EXP", "Exp"),
    aten.silu.default: _silu,
    aten.softmax.int: _softmax,
    aten.elu.default: _unary("ELU"),
    aten.linalg_vector_norm.default: _length,
    aten.clamp_min.default: _at_least,
    aten.expand_as.default: _expanded,
    aten.div.Tensor: _quotient,
}
"""What LiteRT has on floats: translation of an operation."""

IN_FLOAT = frozenset(FLOATS) - {aten.clamp_min.default, aten.expand_as.default}
"""Those that are computed in float wherever they stand; the others are so between these alone."""
