"""Write a converted network as an ONNX file in QDQ form.

In the file activations are unsigned: the integer minus ``quant_min``, so b bits are 0 .. 2^b - 1 in a uint8, and
``Clip`` makes fewer than 8 bits saturate. The numbers are the same; ONNX Runtime fuses unsigned activations with
signed weights into integer kernels on every processor, and loses some of the fusions when activations are signed.
Targets that take signed activations alone get those.
"""

import contextlib
import logging
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnxscript import ir
from onnxscript import opset20 as op
from torch import fx

from zsq.errors import ExportError
from zsq.export.canonical_onnx import canonical_onnx, stamp_oldest
from zsq.export.converted import DEQUANTIZE, QUANTIZE, detached_copy, drop_implied_clamps, export_program
from zsq.export.first_conv import pad_channels
from zsq.export.image_spec import output_names
from zsq.export.options import PLAIN, FileOptions
from zsq.export.pixels import take_pixels
from zsq.graph import edit
from zsq.graph.edit import argument, aten
from zsq.graph.plain import forgetting_examples
from zsq.runtime.files import replacing
from zsq.targets import TARGETS, Target
from zsq.types import ImageSpec

DEQUANTIZE_CHANNELS = torch.ops.quantized_decomposed.dequantize_per_channel.default

OPSET = 20
"""ONNX operator set of the export; the files declare the oldest that their nodes allow."""

LEAST_POOLED = 32
"""Values of a mean from which ONNX Runtime's integer pooling is quicker than its float mean between conversions: 8 us
instead of 21 for 196 tokens of 192 channels, but 22 instead of 13 for 1,792 means of 28."""


def write_onnx(
    converted: fx.GraphModule,
    spec: ImageSpec,
    path: Path,
    target: Target = TARGETS["onnxruntime"],
    options: FileOptions = PLAIN,
    *,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write an ONNX file in QDQ form, with input ``images`` [batch, C, H, W] and output ``logits`` [batch, classes].

    A network that gives something else has an output of that name and shape for each.

    Weights stay int8, and biases int32, or float where the target holds them so. The same network gives the same bytes,
    and no local path is in them.

    Args:
        converted: the converted network (see `zsq.export.converted`), left as it is.
        spec: what the network takes and gives; also stored in the file's metadata under ``image_spec``.
        path: the file to write; it appears whole or not at all.
        target: the runtime that it is for, whose grids the network was quantized with.
        options: what a user may choose of a file: uint8 ``pixels``, [batch, C, H, W] or [batch, H, W, C], instead of
            images, and a fixed batch.
        notes: what else stands in the metadata, by name; no hash of the content depends on it.
    Raises:
        ExportError: an operation has no ONNX form, or the graph departs from the convention.
    """
    network = detached_copy(converted)
    drop_implied_clamps(network.graph)
    if not target.symmetric_activations:
        _make_activations_unsigned(network.graph)
    own_runtime = target.name == "onnxruntime"
    if own_runtime:
        _repeat_channels(network)
    network.recompile()
    exported = export_program(network, spec)
    try:
        with _quiet_exporter():
            program = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
                input_names=["images"],
                output_names=output_names(spec),
                custom_translation_table={
                    QUANTIZE: _quantize_to_onnx,
                    aten.mean.dim: _mean_to_onnx,
                    aten.gelu.default: _gelu_to_onnx,
                    **TRANSLATIONS.get(target.name, {}),
                },
            )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(f"the network has no ONNX form: {_reason(error)} The .pt2 file needs none.") from error
    assert program is not None
    assert program.exported_program is not None
    forgetting_examples(program.exported_program)
    model = program.model_proto
    if not target.symmetric_activations:
        pad_channels(model)
    model = canonical_onnx(model, spec, frozenset(network.state_dict()))
    if options.pixels is not None:
        take_pixels(model, spec, options.pixels)
        stamp_oldest(model)
    if options.batch is not None:
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = options.batch
    for name, text in sorted((notes or {}).items()):
        model.metadata_props.add(key=name, value=text)
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(model.SerializeToString(deterministic=True))


def _reason(error: BaseException) -> str:
    """Return what the exporter could not translate: the operator with its arguments, or what it says itself."""
    text = str(error.__cause__ or error).strip().splitlines()[0].partition(" See the stack trace")[0]
    found = re.search(r"node %(\w+) : .*\[target=torch\.ops\.([\w.]+)\]\(args = \((.*)\), kwargs", text)
    return f"the exporter cannot write '{found[1]}', {found[2]}({found[3]})." if found else text


def _make_activations_unsigned(graph: fx.Graph) -> None:
    """Subtract ``quant_min`` from every quantized activation: the same steps, counted from 0, as uint8."""
    for node in graph.nodes:
        if node.target != QUANTIZE:
            continue
        least = node.args[3]
        clips = [user for user in node.users if user.target is aten.clamp.default]
        for clip in clips:
            tensor, low, high = clip.args
            clip.args = (tensor, low - least, high - least)
        readers = [user for source in (node, *clips) for user in source.users if user not in clips]
        for call in (node, *readers):
            if call.target not in (QUANTIZE, DEQUANTIZE):
                raise ExportError(f"'{call.name}' reads the integers of '{node.name}'; only a dequantization may.")
            tensor, scale, zero_point, quant_min, quant_max, _ = call.args
            call.args = (tensor, scale, zero_point - quant_min, 0, quant_max - quant_min, torch.uint8)


def _repeat_channels(network: fx.GraphModule) -> None:
    """Let each filter of a depthwise convolution that has several a channel read a channel of its own.

    The runtime's depthwise kernel takes one filter a channel; several took it 15 times as long (fastvit_t8, 7x7).
    """
    for node in list(network.graph.nodes):
        if node.target is not aten.conv2d.default:
            continue
        x, filters, groups = node.args[0], _stored(network, node.args[1]), argument(node, 6, 1)
        if groups == 1 or filters is None or filters.shape[1] != 1 or filters.shape[0] == groups:
            continue
        channels = torch.arange(groups).repeat_interleave(filters.shape[0] // groups)
        edit.set_tensor(network, f"{node.name}_channels", channels)
        with network.graph.inserting_before(node):
            read = network.graph.get_attr(f"{node.name}_channels")
            repeated = _repeated(network.graph, x, read)
        node.args = (repeated, *node.args[1:6], len(filters))


def _stored(network: fx.GraphModule, read: Any) -> torch.Tensor | None:
    """Return the integers of a layer's weight."""
    source = read.args[0] if read.target in (DEQUANTIZE, DEQUANTIZE_CHANNELS) else None
    return edit.tensor_of(network, source)


def _repeated(graph: fx.Graph, x: fx.Node, channels: fx.Node) -> fx.Node:
    """Choose channels of integers, before they are dequantized and padded."""
    source, *rest = x.args
    if x.target == DEQUANTIZE:
        chosen = graph.call_function(aten.index_select.default, (source, 1, channels))
        return graph.call_function(DEQUANTIZE, (chosen, *rest))
    if x.target in (aten.pad.default, aten.constant_pad_nd.default):
        assert isinstance(source, fx.Node)
        return graph.call_function(x.target, (_repeated(graph, source, channels), *rest), x.kwargs)
    return graph.call_function(aten.index_select.default, (x, 1, channels))


def _quantize_to_onnx(input: Any, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: int) -> Any:
    """Translate ``quantize_per_tensor``: QuantizeLinear saturates at the type's limits, Clip at narrower ones."""
    kind = ir.DataType(dtype).numpy()

    def constant(value: float, kind: Any) -> Any:
        return op.Constant(value=onnx.numpy_helper.from_array(np.array(value, kind)))

    integers = op.QuantizeLinear(input, constant(scale, np.float32), constant(zero_point, kind))
    if (quant_min, quant_max) == (np.iinfo(kind).min, np.iinfo(kind).max):
        return integers
    return op.Clip(integers, constant(quant_min, kind), constant(quant_max, kind))


def _mean_to_onnx(input: Any, dim: Any, keepdim: bool = False, dtype: int = -1) -> Any:
    """Translate `mean`: over all of a map it is GlobalAveragePool, which runtimes have in integers."""
    axes = [axis % len(input.shape) for axis in dim]
    if len(input.shape) == 4 and sorted(axes) == [2, 3]:
        pooled, space = op.GlobalAveragePool(input), _integers(2, 3)
        return pooled if keepdim else op.Squeeze(pooled, space)
    return op.ReduceMean(input, _integers(*axes), keepdims=keepdim)


def _mean_as_pooling(input: Any, dim: Any, keepdim: bool = False, dtype: int = -1) -> Any:
    """Translate `mean` of integers over any axes as the global pooling of a map whose channels are the means."""
    rank, sizes = len(input.shape), list(input.shape)
    axes = sorted(axis % rank for axis in dim)
    kept = [axis for axis in range(1, rank) if axis not in axes]
    known = 0 not in axes and all(isinstance(size, int) for size in sizes[1:])
    values = math.prod(sizes[axis] for axis in axes) if known else 0
    is_map = rank == 4 and axes == [2, 3]
    if is_map or values < LEAST_POOLED or input.producer().op_type != "DequantizeLinear":
        return _mean_to_onnx(input, dim, keepdim, dtype)
    order = [0, *kept, *axes]
    moved = input if order == sorted(order) else op.Transpose(input, perm=order)
    maps = op.Reshape(moved, _integers(-1, math.prod(sizes[axis] for axis in kept), values, 1))
    given = range(1, rank) if keepdim else kept
    return op.Reshape(op.GlobalAveragePool(maps), _integers(-1, *(1 if n in axes else sizes[n] for n in given)))


def _linear_to_onnx(input: Any, weight: Any, bias: Any = None) -> Any:
    """Translate `linear`: of tokens, too, it is a Gemm, whose integer kernel adds the bias; that of MatMul does not."""
    inner = list(input.shape)[1:-1]
    if bias is None or not all(isinstance(size, int) for size in inner):
        product = op.MatMul(input, op.Transpose(weight, perm=[1, 0]))
        return product if bias is None else op.Add(product, bias)
    if not inner:
        return op.Gemm(input, weight, bias, transB=1)
    outputs, inputs = weight.shape
    rows = op.Reshape(input, _integers(-1, inputs))
    return op.Reshape(op.Gemm(rows, weight, bias, transB=1), _integers(-1, *inner, outputs))


def _mean_of_four_axes(input: Any, dim: Any, keepdim: bool = False, dtype: int = -1) -> Any:
    """Translate `mean` of integers [N, A, B], as of [N, A, B, 1]: OpenVINO 2026.4 fails where N is above A."""
    if len(input.shape) != 3:
        return _mean_to_onnx(input, dim, keepdim, dtype)
    axes = [axis % 3 for axis in dim]
    means = op.ReduceMean(op.Unsqueeze(input, _integers(3)), _integers(*axes), keepdims=True)
    return op.Squeeze(means, _integers(*(() if keepdim else axes), 3))


TRANSLATIONS: dict[str, dict[Any, Any]] = {
    "onnxruntime": {aten.linear.default: _linear_to_onnx, aten.mean.dim: _mean_as_pooling},
    "openvino": {aten.mean.dim: _mean_of_four_axes},
}
"""By target: what its integer kernels take."""


def _integers(*values: int) -> Any:
    return op.Constant(value_ints=values)


def _gelu_to_onnx(input: Any, approximate: str = "none") -> Any:
    """Translate `gelu` by operators that old runtimes have; theirs of that name is of operator set 20."""
    if approximate == "tanh":
        cube: Any = op.Mul(op.Mul(input, input), op.Mul(input, op.Constant(value_float=0.044715)))
        inner: Any = op.Mul(op.Add(input, cube), op.Constant(value_float=math.sqrt(2 / math.pi)))
        gate: Any = op.Tanh(inner)
    else:
        gate = op.Erf(op.Div(input, op.Constant(value_float=math.sqrt(2))))
    return op.Mul(op.Mul(input, op.Add(gate, op.Constant(value_float=1.0))), op.Constant(value_float=0.5))


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence what the exporter says of itself: that torchvision is absent, and a deprecation inside torch."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            yield
    finally:
        logger.setLevel(level)
