"""The canonical form of an ONNX model: equal networks are equal bytes."""

from collections import Counter

import onnx
from onnx.checker import ValidationError
from onnx.shape_inference import InferenceError

from zsq.errors import ExportError
from zsq.export.image_spec import KEY, output_names, to_json
from zsq.types import ImageSpec

OLDEST_OPSET = 13
"""The first operator set with a scale for each channel."""

RENAMED = {"GridSample": 20}
"""Operator sets in which the values of an operator's attributes got other names, which no check compares."""


def canonical_onnx(model: onnx.ModelProto, spec: ImageSpec, kept: frozenset[str]) -> onnx.ModelProto:
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
    strip_metadata(model)
    drop_defaults(model)
    own_zero_points(model)
    names = {name: name for name in ("", "images", *output_names(spec))}
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
    stamp_oldest(model)
    return model


def stamp_oldest(model: onnx.ModelProto) -> None:
    """Declare the oldest operator set and IR version by whose rules a model is valid, so that old runtimes load it.

    Raises:
        ExportError: it is valid by none, up to the operator set that it declares.
    """
    newest, reason = max(entry.version for entry in model.opset_import if not entry.domain), ""
    oldest = max([RENAMED.get(node.op_type, OLDEST_OPSET) for node in model.graph.node], default=OLDEST_OPSET)
    for opset in range(min(oldest, newest), newest + 1):
        del model.opset_import[:]
        model.opset_import.append(onnx.helper.make_opsetid("", opset))
        model.ir_version = onnx.helper.find_min_ir_version_for(model.opset_import)
        try:
            onnx.checker.check_model(model, full_check=True)
        except (ValidationError, InferenceError) as error:
            reason = str(error).strip().splitlines()[0]
        else:
            return
    raise ExportError(f"the network has no valid ONNX form: {reason}")


def drop_defaults(model: onnx.ModelProto) -> None:
    """Leave out attributes that say what is so anyway, in place: some are newer than the operator is."""
    opset = max(entry.version for entry in model.opset_import if not entry.domain)
    for node in model.graph.node:
        known = onnx.defs.get_schema(node.op_type, opset, node.domain).attributes
        said = [a for a in node.attribute if a.name not in known or not _is_default(a, known[a.name].default_value)]
        node.ClearField("attribute")
        node.attribute.extend(said)


def _is_default(attribute: onnx.AttributeProto, default: onnx.AttributeProto) -> bool:
    if default.type == onnx.AttributeProto.UNDEFINED:
        return False
    return bool(onnx.helper.get_attribute_value(attribute) == onnx.helper.get_attribute_value(default))


def own_zero_points(model: onnx.ModelProto) -> None:
    """Give each stored weight and bias a zero point of its own, in place: some runtimes rewrite both together."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in stored or len(node.input) < 3:
            continue
        if node.input[2] not in stored:
            continue  # what the exporter has rounded itself: its zero point is a node's value
        own = f"{node.input[0]}.zero_point"
        value = onnx.numpy_helper.to_array(stored[node.input[2]])
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, own))
        node.input[2] = own


def _constant_name(node: onnx.NodeProto, slot: int, names: dict[str, str], counts: Counter[str]) -> str:
    """Name a constant for its first use: a weight's own scale and zero point after it, others by role and number."""
    role = "constant"
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        role = ("input", "scale", "zero_point")[slot]
        owned = f"{node.input[0]}.{role}"
        if role != "input" and names.get(node.input[0]) == node.input[0] != "images" and owned not in names.values():
            return owned
    counts[role] += 1
    return f"{role}_{counts[role]}"


def _name_interface(model: onnx.ModelProto, spec: ImageSpec) -> None:
    """Declare input and output with the batch left open, and note the image spec in the metadata."""
    graph = model.graph
    given: dict[str, tuple[int, ...]] = {output.name: output.shape for output in spec.outputs}
    taken = {"images": spec.shape}
    for field, shapes in ((graph.input, taken), (graph.output, given or {"logits": (spec.classes,)})):
        if [value.name for value in field] != list(shapes):
            raise ExportError(f"the network must have {list(shapes)}; it has {[v.name for v in field]}.")
        del field[:]
        for name, shape in shapes.items():
            field.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", *shape]))
    graph.name = "zsq"
    model.producer_name = "zsq"
    onnx.helper.set_model_props(model, {KEY: to_json(spec)})


def strip_metadata(model: onnx.ModelProto) -> None:
    """Remove documentation, metadata, inferred shapes and the producer's name, in place."""
    for field in ("producer_name", "producer_version", "domain", "model_version", "doc_string", "metadata_props"):
        model.ClearField(field)
    for field in ("value_info", "doc_string", "metadata_props"):
        model.graph.ClearField(field)
    for item in (*model.graph.node, *model.graph.initializer, *model.graph.input, *model.graph.output):
        item.ClearField("doc_string")
        item.ClearField("metadata_props")
