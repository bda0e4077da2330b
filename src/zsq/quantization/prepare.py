"""Place quantizers in a folded graph: which tensors are rounded, and to how many bits."""

import math
import operator
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from zsq.errors import InputError, unknown_name
from zsq.graph import edit
from zsq.graph.activations import clamp_limits
from zsq.graph.affine import name_affines
from zsq.graph.batchnorm import batch_norms
from zsq.graph.edit import argument, aten, tensor_of
from zsq.graph.outputs import outputs_of, pack, results
from zsq.quantization.fake_quantize import keep_bias, quantize_bias
from zsq.quantization.float_parts import FLOAT_OPERATORS, float_parts, float_volumes
from zsq.quantization.integer_ops import GATED, HARD_REACH, grid_hardsigmoid, grid_hardswish, grid_norm
from zsq.quantization.pair_sums import pair_limit
from zsq.quantization.quantizers import ActivationQuantizer, WeightQuantizer
from zsq.targets import TARGETS, Target
from zsq.types import OutputKind

ENDS_BITS = 8
"""Bits of the network's input and of its outputs, always."""

PADS = {aten.pad.default: 3, aten.constant_pad_nd.default: 2}
"""Paddings, and which argument holds the value that pads."""

MOVES = {
    aten.max_pool1d.default,
    aten.max_pool2d.default,
    aten.max_pool3d.default,
    aten.flatten.using_ints,
    aten.view.default,
    aten.reshape.default,
    aten.permute.default,
    aten.transpose.int,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.contiguous.default,
    aten.clone.default,
    aten.chunk.default,
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.unbind.int,
    aten.unflatten.int,
    aten.movedim.int,
    aten.t.default,
    aten.expand.default,
    aten.expand_as.default,
    aten.topk.default,
    aten.amax.default,
    aten.amin.default,
    aten.upsample_nearest1d.vec,
    aten.upsample_nearest2d.vec,
    aten.upsample_nearest3d.vec,
    aten.flip.default,
    aten.roll.default,
    aten.index.Tensor,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
}
"""Operators that only move or choose values."""


POLES: dict[Any, int] = {
    aten.div.Tensor: 1,
    aten.div.Tensor_mode: 1,
    aten.reciprocal.default: 0,
    aten.rsqrt.default: 0,
    aten.sqrt.default: 0,
    aten.log.default: 0,
    aten.log2.default: 0,
    aten.log10.default: 0,
    aten.log1p.default: 0,
    aten.pow.Tensor_Scalar: 0,
}
"""Operators whose value or slope has a pole, at 0 mostly, and which argument has it there."""

ONE_VALUE = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.clamp_min.default)
"""Operators that, with a number, change each value by itself."""


def moves_values(node: Node) -> bool:
    """Whether a node only moves or chooses values, so that its output lies on the grid of its input.

    A padding does so if it pads with 0, with values from inside, or with an infinity, which max pooling ignores.
    """
    if node.target is operator.getitem:
        return isinstance(node.args[0], Node) and moves_values(node.args[0])
    if node.target in PADS:
        value = argument(node, PADS[node.target]) or 0.0
        return value == 0 or math.isinf(value)
    return node.target in MOVES


@dataclass(frozen=True, slots=True)
class Bits:
    """Widths of weights and activations in bits, 2 to 8."""

    weight: int
    activation: int

    @classmethod
    def parse(cls, text: str | int) -> "Bits":
        """Read `8`, `6`, `4` or `W4A8`.

        Raises:
            InputError: anything else, or a width outside 2 to 8.
        """
        match = re.fullmatch(r"(?i)\s*(?:w(\d+)a(\d+)|(?:int)?(\d+))\s*", str(text))
        if not match:
            raise InputError(f"bits is '{text}'; give one width such as 8, 6 or 4, or both such as W4A8.")
        both = match[3]
        bits = cls(int(both or match[1]), int(both or match[2]))
        for width in (bits.weight, bits.activation):
            if not 2 <= width <= 8:
                raise InputError(f"bits is '{text}'; widths from 2 to 8 work, stored in int8.")
        return bits

    def __str__(self) -> str:
        same = self.weight == self.activation
        return str(self.weight) if same else f"W{self.weight}A{self.activation}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """What is quantized, and how."""

    bits: Bits
    per_channel: bool = True
    all_activations: bool = True
    """Quantize every activation between layers; False: only inputs of convolutions and linear layers, and the ends."""
    first_last_bits: int | None = None
    learnable: bool = True
    weight_bits: Mapping[str, int] = field(default_factory=dict)
    """Width of a weight by its name; it wins over `first_last_bits`, which wins over `bits`."""
    target: Target = TARGETS["onnxruntime"]
    """What the file is for."""


class Student(nn.Module):
    """The network with quantizers in it.

    Attributes:
        network: the graph; activations and weights pass through `ActivationQuantizer` and `WeightQuantizer` modules.
        ends: kind of each output, by the name of the quantizer that rounds it.
        num_calibration_images: images from which its grids were chosen.
        undone: whether a distillation made it worse, and it is again what calibration gave.
    """

    def __init__(self, network: GraphModule, ends: dict[str, OutputKind]) -> None:
        super().__init__()
        self.network, self.ends, self.num_calibration_images = network, ends, 0
        self.undone = False

    def forward(self, images: Tensor) -> Tensor:
        """Map images [N, C, H, W] to logits [N, classes], or to all outputs in one row an image, [N, K]."""
        logits: Tensor = self.network(images)
        return logits


def is_fused(node: Node) -> bool:
    """Whether the layer or addition in front of an activation computes it before it rounds.

    Limits that are tensors, as DFQ's bounds a channel are, serve as well as numbers.
    """
    return clamp_limits(node) is not None or node.target is aten.clamp.Tensor


def near_poles(network: GraphModule) -> set[Node]:
    """Return the values that divide others, are rooted or the like: rounded to 0, they would give no number.

    With them come the values that they are made of by a number or a move, one by one.
    """
    found: set[Node] = set()
    todo = [argument(node, POLES[node.target]) for node in network.graph.nodes if _has_pole(node)]
    while todo:
        node = todo.pop()
        if not isinstance(node, Node) or node in found or node.op != "call_function":
            continue
        found.add(node)
        alone = node.target in ONE_VALUE and len(node.all_input_nodes) == 1
        if alone or moves_values(node) or is_fused(node) or _has_pole(node):
            todo.append(node.args[0])
    return found


def _has_pole(node: Node) -> bool:
    if node.target is aten.pow.Tensor_Scalar:
        exponent = argument(node, 1)
        return isinstance(exponent, (int, float)) and exponent < 1
    return node.target in POLES


def is_float(node: Node) -> bool:
    """Whether the node's value is one float tensor with a batch dimension."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2


def prepare(folded: GraphModule, scheme: Scheme) -> Student:
    """Return a copy of a folded network with quantizers in place, all of them off.

    Raises:
        InputError: the network has no convolution or linear layer, or none of a name to which the scheme gives a width.
    """
    network = edit.copy_network(folded)
    moves = {node for node in network.graph.nodes if moves_values(node)}
    volumes = float_volumes(network, moves, scheme.target.least_volume_channels) if scheme.all_activations else {}
    every_layer = [layer for layer in edit.layers(network) if layer not in volumes]
    if not every_layer:
        raise InputError("the network has no convolution or linear layer whose weight could be quantized.")
    check_weight_names(network, scheme.weight_bits)
    in_float = set(volumes.values())
    if scheme.target.float_attention:
        in_float |= float_parts(network, moves, set(every_layer))
    if scheme.target.integer_norms and scheme.all_activations:
        attention = {node for node in network.graph.nodes if node.target in FLOAT_OPERATORS}
        name_affines(network, in_float | attention | near_poles(network))
    placer = _Placer(network, scheme, every_layer, in_float)
    placer.place_activations()
    if scheme.target.integer_gates:
        placer.put_hardswish_on_grids()
    if scheme.target.integer_sigmoids:
        placer.put_gates_on_grids()
    if scheme.target.integer_norms:
        placer.put_norms_on_grids()
    for layer in every_layer:
        placer.place_weight(layer)
    placer.put_hardsigmoid_on_grids()
    return Student(edit.finish(network), placer.rounded_ends)


def quantized_layers(folded: GraphModule, target: Target) -> list[Node]:
    """List the layers of a folded network whose weights a target's file holds in integers, in order."""
    moves = {node for node in folded.graph.nodes if moves_values(node)}
    volumes = float_volumes(folded, moves, target.least_volume_channels)
    return [layer for layer in edit.layers(folded) if layer not in volumes]


def weight_name(layer: Node) -> str:
    """Return the name of the weight that a layer of a float graph reads: the one in the network's state."""
    read = layer.args[1]
    assert isinstance(read, Node)
    return str(read.target)


def check_weight_names(folded: GraphModule, names: Iterable[str]) -> None:
    """Check that each name is that of a weight which is quantized.

    Raises:
        InputError: it is not; the text gives the nearest one.
    """
    known = {weight_name(layer) for layer in edit.layers(folded)}
    for name in names:
        if name not in known:
            raise unknown_name("weight", name, known)


class _Placer:
    """Inserts the quantizers of one network."""

    def __init__(
        self, network: GraphModule, scheme: Scheme, every_layer: list[Node], in_float: Collection[Node]
    ) -> None:
        self.network, self.scheme, self.layers, self.in_float = network, scheme, every_layer, in_float
        kinds = [output.kind for output in outputs_of(network)] or ["classes"]
        given = zip(results(network.graph), kinds, strict=True)
        self.ends: dict[Node, OutputKind] = {self.origin(node): kind for node, kind in given}
        self.inputs = [node for node in network.graph.nodes if node.op == "placeholder"]
        self.near_poles = near_poles(network)
        self.gates = [node for node in network.graph.nodes if self.is_gate(node)]
        self.placed: dict[Node, str] = {}
        self.rounded_ends: dict[str, OutputKind] = {}

    def bits_of(self, node: Node) -> int:
        """Width of an activation."""
        if node in self.inputs or node in self.ends:
            return ENDS_BITS
        ends = self.scheme.first_last_bits
        if ends and node is self.origin(self.layers[-1].args[0]):
            return ends
        return self.scheme.bits.activation

    def origin(self, node: object) -> Node:
        """Follow operators that only move values back to where the values were computed."""
        assert isinstance(node, Node)
        return self.origin(node.args[0]) if moves_values(node) else node

    def place_activations(self) -> None:
        """Insert a quantizer behind each activation that the scheme rounds."""
        if self.scheme.all_activations:
            chosen = [node for node in self.network.graph.nodes if self.rounds(node)]
        else:
            chosen = list(dict.fromkeys([*self.inputs, *(self.origin(n.args[0]) for n in self.layers), *self.ends]))
        for node in chosen:
            if self.scheme.all_activations or node in self.inputs or node in self.ends:
                self.insert(node, self.bits_of(node), only_layers=False)
                continue
            for read in dict.fromkeys(n.args[0] for n in self.layers if self.origin(n.args[0]) is node):
                self.insert(read, self.bits_of(node), only_layers=True)

    def put_hardswish_on_grids(self) -> None:
        """Let hard swish of 8-bit values be computed by integers; narrower grids are too coarse for its gate."""
        for node in self.network.graph.nodes:
            name = self.placed.get(node.args[0]) if node.target is aten.hardswish.default else None
            quantizer = self.network.get_submodule(name) if name else None
            if isinstance(quantizer, ActivationQuantizer) and quantizer.bits == ENDS_BITS:
                quantizer.reach = -HARD_REACH
                with self.network.graph.inserting_before(node):
                    scale = self.network.graph.get_attr(f"{name}.scale")
                node.target, node.args = grid_hardswish, (node.args[0], scale)

    def put_gates_on_grids(self) -> None:
        """Let SiLU and GELU of rounded values be computed by an integer sigmoid and an integer product."""
        for node in self.network.graph.nodes:
            if node.target in GATED and self.is_placed(node.args[0]):
                node.target, node.args, node.kwargs = GATED[node.target], (node.args[0],), {}

    def is_placed(self, node: object) -> bool:
        """Whether a value comes out of a quantizer, moved perhaps."""
        return node in self.placed or (isinstance(node, Node) and moves_values(node) and self.is_placed(node.args[0]))

    def put_norms_on_grids(self) -> None:
        """Let each batch norm that no layer could take be computed by integers."""
        for norm in batch_norms(self.network) if self.scheme.all_activations else []:
            node = norm.node
            axes = node.meta["val"].dim() - 2
            if axes == 0:
                self.widen(node)
            elif axes not in edit.CONVOLUTION_OF:
                continue
            with self.network.graph.inserting_before(node):
                read = []
                for role, value in (("factor", norm.scale), ("shift", norm.shift)):
                    edit.set_tensor(self.network, f"{node.name}_{role}", value)
                    read.append(self.network.graph.get_attr(f"{node.name}_{role}"))
                node.target, node.args = grid_norm, (node.args[0], *read, self.input_scale(node))

    def widen(self, norm: Node) -> None:
        """Let a batch norm of vectors [N, C] compute on [N, C, 1], up to the quantizer behind it: a convolution can."""
        chain = [norm]
        while len(chain[-1].users) == 1 and (is_fused(user := next(iter(chain[-1].users))) or user in self.placed):
            chain.append(user)
        graph, end, value = self.network.graph, chain[-1], norm.meta["val"]
        with graph.inserting_before(norm):
            x = graph.call_function(aten.unsqueeze.default, (norm.args[0], 2))
        with graph.inserting_after(end):
            vectors = graph.call_function(aten.squeeze.dim, (end, 2))
        norm.args, vectors.meta["val"] = (x, *norm.args[1:]), value
        for node in (x, *chain):
            node.meta["val"] = value.unsqueeze(2)
        end.replace_all_uses_with(vectors, delete_user_cb=lambda user: user is not vectors)

    def is_gate(self, node: Node) -> bool:
        """Whether a node is a hard sigmoid that the layer in front computes: its bias adds and its rounding clips."""
        asked = self.scheme.all_activations and self.scheme.target.integer_gates
        layer = node.args[0] if node.target is aten.hardsigmoid.default and asked else None
        if not isinstance(layer, Node) or layer not in self.layers or len(layer.users) > 1:
            return False
        has_bias = isinstance(argument(layer, 2), Node)
        return has_bias and (layer.target in edit.CONVOLUTIONS or layer.meta["val"].dim() == 2)

    def put_hardsigmoid_on_grids(self) -> None:
        """Let hard sigmoid of a layer's output be computed by the layer."""
        for node in self.gates:
            layer = node.args[0]
            assert isinstance(layer, Node)
            with self.network.graph.inserting_before(node):
                weight_scale = self.network.graph.get_attr(f"weight_{self.layers.index(layer)}.scale")
                node.target, node.args = grid_hardsigmoid, (layer, self.input_scale(layer), weight_scale)

    def rounds(self, node: Node) -> bool:
        """Whether an integer-only device would store the node's value."""
        if node.op not in ("placeholder", "call_function") or node.target is pack or not is_float(node):
            return False
        if node in self.ends:
            return True
        if moves_values(node) or node in self.near_poles or node in self.in_float:
            return False
        if len(node.users) != 1 or node.op != "call_function":
            return True
        (user,) = node.users
        if user.target is aten.add.Tensor and node in self.layers and not self.scheme.target.rounds_addends:
            return False
        return (node in self.gates or not is_fused(user)) and user not in self.gates

    def insert(self, node: object, bits: int, *, only_layers: bool) -> None:
        """Insert one activation quantizer behind a node, for all readers or for layers only."""
        assert isinstance(node, Node)
        name = f"activation_{len(self.placed)}"
        symmetric = self.scheme.target.symmetric_activations
        quantizer = ActivationQuantizer(bits, learnable=self.scheme.learnable, symmetric=symmetric)
        self.network.add_submodule(name, quantizer)
        with self.network.graph.inserting_after(node):
            quantized = self.network.graph.call_module(name, (node,))
        quantized.meta["val"] = node.meta.get("val")
        readers = set(self.layers) if only_layers else set(node.users) - {quantized}
        node.replace_all_uses_with(quantized, delete_user_cb=lambda user: user in readers)
        self.placed[quantized] = name
        if node in self.ends:
            self.rounded_ends[name] = self.ends[node]

    def weight_bits_of(self, layer: Node) -> int:
        """Width of a layer's weight."""
        ends = self.scheme.first_last_bits if layer in (self.layers[0], self.layers[-1]) else None
        return self.scheme.weight_bits.get(weight_name(layer)) or ends or self.scheme.bits.weight

    def place_weight(self, layer: Node) -> None:
        """Insert the quantizers of a layer's weight and bias."""
        bits = self.weight_bits_of(layer)
        source, weight = self.own(layer, layer.args[1])
        name = f"weight_{self.layers.index(layer)}"
        target = self.scheme.target
        paired = target.keeps_pairs and not edit.is_depthwise(layer, weight)
        quantizer = WeightQuantizer(
            weight,
            bits,
            per_channel=self.scheme.per_channel,
            learnable=self.scheme.learnable,
            pair_limit=pair_limit(bits, self.grid_of(layer).bits) if paired else None,
            symmetric=target.symmetric_weights,
        )
        self.network.add_submodule(name, quantizer)
        edit.set_tensor(self.network, str(source.target), weight, trainable=True)
        graph = self.network.graph
        with graph.inserting_before(layer):
            quantized = graph.call_module(name, (source,))
        bias = argument(layer, 2)
        if isinstance(bias, Node):
            bias, value = self.own(layer, bias)
            edit.set_tensor(self.network, str(bias.target), value, trainable=True)
            with graph.inserting_before(layer):
                scales = (self.input_scale(layer), graph.get_attr(f"{name}.scale"))
                bias = graph.call_function(keep_bias if target.float_biases else quantize_bias, (bias, *scales))
        layer.args = (layer.args[0], quantized, bias, *layer.args[3:])

    def own(self, layer: Node, read: object) -> tuple[Node, Tensor]:
        """Return the node that reads a layer's weight or bias, and its value; a shared one is copied for the layer."""
        assert isinstance(read, Node)
        value = tensor_of(self.network, read)
        assert value is not None
        if len(read.users) > 1:
            name, value = f"{read.target}_{layer.name}", value.clone()
            edit.set_tensor(self.network, name, value)
            read = edit.read_attribute(self.network, name, layer)
        return read, value

    def input_scale(self, layer: Node) -> Node:
        """Return a node that reads the scale of the grid on which the layer's input lies."""
        return self.network.graph.get_attr(f"{self.input_grid(layer)}.scale")

    def input_grid(self, layer: Node) -> str:
        """Return the name of the quantizer on whose grid the layer's input lies."""
        node = layer.args[0]
        while isinstance(node, Node) and node.op != "call_module":
            node = node.args[0]
        assert isinstance(node, Node)
        return self.placed[node]

    def grid_of(self, layer: Node) -> ActivationQuantizer:
        """Return the quantizer on whose grid the layer's input lies."""
        quantizer = self.network.get_submodule(self.input_grid(layer))
        assert isinstance(quantizer, ActivationQuantizer)
        return quantizer


def weight_node(layer: Node) -> tuple[Node, Node]:
    """Return the quantizer call and the stored weight of a prepared layer."""
    quantized = layer.args[1]
    assert isinstance(quantized, Node)
    stored = quantized.args[0]
    assert isinstance(stored, Node)
    return quantized, stored


def prepared_layers(network: GraphModule) -> list[Node]:
    """List the quantized layers of a student's graph; layers of weights that depend on the images are none."""
    called = {node.target: node for node in network.graph.nodes if node.op == "call_module"}
    weights = {node for name, node in called.items() if isinstance(network.get_submodule(str(name)), WeightQuantizer)}
    return [node for node in network.graph.nodes if node.target in edit.LAYERS and node.args[1] in weights]


def quantized_weight(network: GraphModule, layer: Node) -> tuple[WeightQuantizer, torch.Tensor]:
    """Return a prepared layer's weight quantizer and float weight."""
    quantized, stored = weight_node(layer)
    quantizer = network.get_submodule(str(quantized.target))
    assert isinstance(quantizer, WeightQuantizer)
    return quantizer, edit.get_attribute(network, str(stored.target))


def mean_weight_bits(student: Student) -> float:
    """Return the width of a student's weights, averaged over all of them."""
    found = [quantized_weight(student.network, layer) for layer in prepared_layers(student.network)]
    return sum(q.bits * weight.numel() for q, weight in found) / sum(weight.numel() for _, weight in found)
