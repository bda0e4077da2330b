"""Write a converted network as ONNX (QDQ) or torch.export file.

A *converted* network is a ``torch.fx.GraphModule`` of ATen operations whose activations pass through
``quantized_decomposed.quantize_per_tensor`` and ``dequantize_per_tensor`` and whose weights (int8) and biases (int32)
are buffers behind ``dequantize_per_channel`` or ``dequantize_per_tensor``.

In the ONNX file activations are unsigned: the integer minus ``quant_min``, so b bits are 0 .. 2^b - 1 in a uint8, and
``Clip`` makes fewer than 8 bits saturate. The numbers are the same; ONNX Runtime fuses unsigned activations with
signed weights into integer kernels on every processor, and loses some of the fusions when activations are signed.
"""

import contextlib
import copy
import hashlib
import io
import json
import logging
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from onnxscript import ir
from onnxscript import opset20 as op
from safetensors import safe_open
from torch import fx

from zsq.errors import ExportError, InputError
from zsq.export.first_conv import pad_channels
from zsq.export.verify import SPEC_KEY, OnnxClassifier, Verification, require, verify_onnx
from zsq.graph.activations import clamp_limits
from zsq.runtime.files import replacing
from zsq.types import ImageSpec

__all__ = [
    "OnnxClassifier",
    "Verification",
    "canonical_sha256",
    "output_step",
    "require",
    "verify_onnx",
    "write_onnx",
    "write_pt2",
]

OPSET = 20
"""ONNX operator set of the files written."""
_QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default
_DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_tensor.default
_aten = torch.ops.aten


def output_step(converted: fx.GraphModule) -> float:
    """Return the quantization step of the logits: the scale of the dequantization that the graph ends in.

    Raises:
        ExportError: the graph's output is not a per-tensor dequantization.
    """
    result = next(node for node in converted.graph.nodes if node.op == "output").args[0]
    node = result[0] if isinstance(result, tuple | list) else result
    if node.target != _DEQUANTIZE:
        raise ExportError(f"the converted graph ends in '{node.target}'; its logits must be quantized to 8 bits.")
    return float(node.args[1])


def write_onnx(converted: fx.GraphModule, spec: ImageSpec, path: Path) -> None:
    """Write an ONNX file in QDQ form, with input ``images`` [batch, C, H, W] and output ``logits`` [batch, classes].

    Weights stay int8 and biases int32. The same network gives the same bytes, and no local path is in them.

    Args:
        converted: the converted network (see the module's text), left as it is.
        spec: what the network takes and gives; also stored in the file's metadata under ``image_spec``.
        path: the file to write; it appears whole or not at all.
    Raises:
        ExportError: an operation has no ONNX form, or the graph departs from the convention.
    """
    network = _detached_copy(converted)
    _drop_implied_clamps(network.graph)
    _make_activations_unsigned(network.graph)
    network.recompile()
    exported = _export_program(network, spec)
    try:
        with _quiet_exporter():
            program = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
                input_names=["images"],
                output_names=["logits"],
                custom_translation_table={_QUANTIZE: _quantize_to_onnx, _aten.mean.dim: _mean_to_onnx},
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0].partition(" See the stack trace")[0]
        raise ExportError(f"the network has no ONNX form: {reason} The .pt2 file needs none.") from error
    assert program is not None
    model = program.model_proto
    pad_channels(model)
    model = _canonical_onnx(model, spec, frozenset(network.state_dict()))
    onnx.checker.check_model(model, full_check=True)
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(model.SerializeToString(deterministic=True))


def write_pt2(converted: fx.GraphModule, spec: ImageSpec, path: Path) -> None:
    """Write a ``torch.export`` file with a dynamic batch; the image spec lies beside it as ``image_spec.json``.

    ``torch.export.load(path).module()`` runs it once ``torch.ao.quantization.fx._decomposed`` is imported. The same
    network gives the same bytes, and no local path is in them.

    Args:
        converted: the converted network (see the module's text), left as it is.
        spec: what the network takes and gives.
        path: the file to write; it appears whole or not at all.
    """
    exported = _export_program(_detached_copy(converted), spec)
    buffer = io.BytesIO()
    torch.export.save(exported, buffer, extra_files={"image_spec.json": _spec_json(spec)})
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(buffer.getvalue())


def canonical_sha256(path: Path) -> str:
    """Return the hex sha256 of what a ``.onnx``, ``.pt2`` or ``.safetensors`` file computes with or holds.

    Left out is what says how and when it was written: ONNX metadata, documentation and producer; names, times and
    serial number of the pt2 archive; the free metadata of safetensors.

    Raises:
        InputError: the file's ending is none of these.
    """
    match path.suffix:
        case ".onnx":
            parts = _onnx_content(path)
        case ".pt2":
            parts = _pt2_content(path)
        case ".safetensors":
            parts = _safetensors_content(path)
        case _:
            raise InputError(f"{path.name}: cannot hash '{path.suffix}' files; known: .onnx, .pt2, .safetensors.")
    digest = hashlib.sha256()
    for name, content in parts:
        digest.update(f"{len(name.encode())}:{name}{len(content)}:".encode())
        digest.update(content)
    return digest.hexdigest()


def _detached_copy(converted: fx.GraphModule) -> fx.GraphModule:
    """Return a copy on the processor whose nodes carry no metadata, hence no stack trace or path."""
    network = copy.deepcopy(converted).cpu()
    network.meta.clear()
    for node in network.graph.nodes:
        node.meta = {}
    return network


def _export_program(network: fx.GraphModule, spec: ImageSpec) -> torch.export.ExportedProgram:
    """Export with a dynamic batch; the program holds no example images and no metadata but shapes."""
    images = torch.zeros(2, spec.channels, spec.height, spec.width)
    exported = torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for node in exported.graph.nodes:
        node.meta = {key: value for key, value in node.meta.items() if key == "val"}
    exported.example_inputs = None
    return exported


def _drop_implied_clamps(graph: fx.Graph) -> None:
    """Remove each ReLU or clamp whose limits the quantizations behind it impose anyway, so that kernels fuse."""
    for node in list(graph.nodes):
        limits = clamp_limits(node)
        if limits is None or not all(user.target == _QUANTIZE for user in node.users):
            continue
        low, high = limits
        for user in node.users:
            _, scale, zero_point, quant_min, quant_max, _ = user.args
            if np.rint(low / scale) + zero_point > quant_min or np.rint(high / scale) + zero_point < quant_max:
                break
        else:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _make_activations_unsigned(graph: fx.Graph) -> None:
    """Subtract ``quant_min`` from every quantized activation: the same steps, counted from 0, as uint8."""
    for node in graph.nodes:
        if node.target != _QUANTIZE:
            continue
        least = node.args[3]
        clips = [user for user in node.users if user.target is _aten.clamp.default]
        for clip in clips:
            tensor, low, high = clip.args
            clip.args = (tensor, low - least, high - least)
        readers = [user for source in (node, *clips) for user in source.users if user not in clips]
        for call in (node, *readers):
            if call.target not in (_QUANTIZE, _DEQUANTIZE):
                raise ExportError(f"'{call.name}' reads the integers of '{node.name}'; only a dequantization may.")
            tensor, scale, zero_point, quant_min, quant_max, _ = call.args
            call.args = (tensor, scale, zero_point - quant_min, 0, quant_max - quant_min, torch.uint8)


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
    if len(input.shape) == 4 and sorted(axes) == [2, 3] and keepdim:
        return op.GlobalAveragePool(input)
    numbers: Any = op.Constant(value_ints=axes)
    return op.ReduceMean(input, numbers, keepdims=keepdim)


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


def _canonical_onnx(model: onnx.ModelProto, spec: ImageSpec, kept: frozenset[str]) -> onnx.ModelProto:
    """Strip the exporter's traces and name values by order, so that equal networks are equal bytes.

    Args:
        model: as exported; changed in place and returned.
        spec: gives the shapes of input and output.
        kept: names of initializers that stay: those of the network's own tensors.
    Raises:
        ExportError: the model holds control flow or functions.
    """
    graph = model.graph
    if model.functions or any(attribute.HasField("g") for node in graph.node for attribute in node.attribute):
        raise ExportError("the network branches or loops on its data; an ONNX file of it is not supported.")
    _strip_metadata(model)
    names = {"": "", "images": "images", "logits": "logits"}
    stored = {tensor.name: tensor for tensor in graph.initializer}
    counts: Counter[str] = Counter()
    for node in graph.node:
        for slot, name in enumerate(node.input):
            if name not in names:
                names[name] = name if name in kept else _constant_name(node, slot, names, counts)
        counts[node.op_type] += 1
        node.name = f"{node.op_type}_{counts[node.op_type]}"
        for slot, name in enumerate(node.output):
            names.setdefault(name, f"{node.name.lower()}_output" + (f"_{slot}" if slot else ""))
        node.input[:] = [names[name] for name in node.input]
        node.output[:] = [names[name] for name in node.output]
    used = [name for name in names if name in stored]
    tensors = [onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(stored[name]), names[name]) for name in used]
    graph.ClearField("initializer")
    graph.initializer.extend(tensors)
    _name_interface(model, spec)
    return model


def _constant_name(node: onnx.NodeProto, slot: int, names: dict[str, str], counts: Counter[str]) -> str:
    """Name a constant for its first use: a weight's own scale after the weight, others by role and number."""
    role = "constant"
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        role = ("input", "scale", "zero_point")[slot]
        owned = f"{node.input[0]}.{role}"
        if role == "scale" and names.get(node.input[0]) == node.input[0] != "images" and owned not in names.values():
            return owned
    counts[role] += 1
    return f"{role}_{counts[role]}"


def _name_interface(model: onnx.ModelProto, spec: ImageSpec) -> None:
    """Declare input and output with the batch left open, and note the image spec in the metadata."""
    graph = model.graph
    shapes: dict[str, list[str | int | None]] = {
        "images": ["batch", spec.channels, spec.height, spec.width],
        "logits": ["batch", spec.classes],
    }
    for field, name in ((graph.input, "images"), (graph.output, "logits")):
        if [value.name for value in field] != [name]:
            raise ExportError(f"the network must have one input and one output; it has {[v.name for v in field]}.")
        del field[:]
        field.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shapes[name]))
    graph.name = "zsq"
    model.producer_name = "zsq"
    onnx.helper.set_model_props(model, {SPEC_KEY: _spec_json(spec)})


def _strip_metadata(model: onnx.ModelProto) -> None:
    """Remove documentation, metadata, inferred shapes and the producer's name, in place."""
    for field in ("producer_name", "producer_version", "domain", "model_version", "doc_string", "metadata_props"):
        model.ClearField(field)
    for field in ("value_info", "doc_string", "metadata_props"):
        model.graph.ClearField(field)
    for item in (*model.graph.node, *model.graph.initializer, *model.graph.input, *model.graph.output):
        item.ClearField("doc_string")
        item.ClearField("metadata_props")


def _spec_json(spec: ImageSpec) -> str:
    return json.dumps(asdict(spec), sort_keys=True)


def _onnx_content(path: Path) -> Iterator[tuple[str, bytes]]:
    model = onnx.load(path)
    _strip_metadata(model)
    yield "model", model.SerializeToString(deterministic=True)


def _pt2_content(path: Path) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        members = {name.partition("/")[2]: name for name in archive.namelist()}
        for name in sorted(members):
            if name != ".data/serialization_id":
                yield name, archive.read(members[name])


def _safetensors_content(path: Path) -> Iterator[tuple[str, bytes]]:
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            content = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            yield f"{name} {tensor.dtype} {list(tensor.shape)}", content
