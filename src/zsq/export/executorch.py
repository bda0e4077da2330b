"""Write a network as an ExecuTorch program lowered to XNNPACK, and run such a file.

The program takes one image at a time, since XNNPACK takes no slice of an open batch. Activations stay int8 as they are
simulated. XNNPACK rounds each layer's float bias to int32 at input scale times weight scale, as
is simulated; what it does not compute is left to ExecuTorch's portable kernels, in float.
"""

import contextlib
import importlib
import io
import logging
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from zsq.errors import ExportError, InputError, MissingExtraError
from zsq.export.classifier import FileClassifier
from zsq.export.converted import DEQUANTIZE, QUANTIZE, detached_copy, drop_implied_clamps
from zsq.export.image_spec import KEY, to_json
from zsq.export.options import PLAIN, FileOptions
from zsq.export.pixels import NOTE, Layout
from zsq.graph import edit
from zsq.graph.activations import clamp_limits
from zsq.graph.edit import aten
from zsq.runtime.files import replacing
from zsq.runtime.quiet import silent_stderr
from zsq.types import ImageSpec

INSTALL = "pip install 'zsq[executorch]'"
OLDEST = (1, 5)
"""Version of ExecuTorch from which files are known to run as they are written."""

DEQUANTIZE_CHANNELS = torch.ops.quantized_decomposed.dequantize_per_channel.default

FORWARD = "forward"
"""Method of a program that computes the logits; every other one returns a note."""


@dataclass(frozen=True, slots=True)
class Lowered:
    """How much of a program XNNPACK computes."""

    num_nodes: int
    """Operators of the program."""
    num_lowered: int
    """Those that XNNPACK computes."""
    left: tuple[str, ...]
    """Names of the others, which ExecuTorch's portable kernels compute."""

    @property
    def percent(self) -> float:
        """Share of the operators that XNNPACK computes."""
        return 100 * self.num_lowered / max(1, self.num_nodes)


def require_executorch() -> Any:
    """Return what is used of the package, by name.

    Raises:
        MissingExtraError: it is not installed, is too old, or does not load.
    """
    try:
        found = metadata.version("executorch")
        if tuple(int(part) for part in re.findall(r"\d+", found)[:2]) < OLDEST:
            raise MissingExtraError(
                f"target executorch needs ExecuTorch {'.'.join(map(str, OLDEST))} or newer, and {found} is installed: "
                f"{INSTALL}"
            )
        with _quiet():
            importlib.import_module("executorch.kernels.quantized")  # for what XNNPACK leaves of quantization
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import to_edge_transform_and_lower
            from executorch.extension.pybindings import portable_lib
            from executorch.runtime import Runtime
    except metadata.PackageNotFoundError as error:
        raise MissingExtraError(
            f"target executorch runs its file in ExecuTorch, which is not installed: {INSTALL}"
        ) from error
    except ImportError as error:
        if isinstance(error, MissingExtraError):
            raise
        raise MissingExtraError(f"target executorch: ExecuTorch {found} does not load: {error}") from error
    return SimpleNamespace(
        partitioner=XnnpackPartitioner, lower=to_edge_transform_and_lower, pool=portable_lib, runtime=Runtime
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the package's warnings and log, and undo that its import configures the root logger."""
    root, disabled = logging.getLogger(), logging.root.manager.disable
    handlers, level = list(root.handlers), root.level
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers
        root.setLevel(level)


def write_executorch(
    converted: fx.GraphModule,
    spec: ImageSpec,
    path: Path,
    options: FileOptions = PLAIN,
    *,
    notes: Mapping[str, str] | None = None,
) -> Lowered:
    """Write a ``.pte`` file that takes images [N, C, H, W], float and contiguous, and gives logits [N, classes].

    Its batch is fixed: one image, where the options name no number.

    Args:
        converted: the converted network (see `zsq.export.converted`), left as it is.
        spec: what the network takes and gives; also stored in the file, as a constant method ``image_spec``.
        path: the file to write; it appears whole or not at all.
        options: what a user may choose of a file: uint8 pixels, [N, C, H, W] or [N, H, W, C], and a batch.
        notes: further constant methods, by name.
    Returns:
        How much of it XNNPACK computes.
    Raises:
        ExportError: ExecuTorch cannot lower the network, or could not run it.
        MissingExtraError: ExecuTorch is not installed.
    """
    for node in converted.graph.nodes:
        if node.target is aten.conv3d.default:  # it would be lowered, and fail when it is loaded or run
            raise ExportError(
                f"the network has no ExecuTorch form: '{node.name}' is a 3-D convolution, which ExecuTorch's kernels "
                "do not compute. Targets onnxruntime and openvino take it."
            )
    network = detached_copy(converted)
    _adapt(network)
    return _write(network, spec, path, options, notes or {})


def write_float_executorch(network: fx.GraphModule, spec: ImageSpec, path: Path) -> Lowered:
    """Write a float network as a ``.pte`` file, for comparison; arguments, returns and raises as `write_executorch`."""
    return _write(detached_copy(network), spec, path, PLAIN, {})


def _write(
    network: fx.GraphModule, spec: ImageSpec, path: Path, options: FileOptions, notes: Mapping[str, str]
) -> Lowered:
    program, lowered = _program(network, spec, options, notes)
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(program)
    return lowered


def _program(
    network: fx.GraphModule, spec: ImageSpec, options: FileOptions, notes: Mapping[str, str]
) -> tuple[bytes, Lowered]:
    """Return the content of a file, and how much of it XNNPACK computes."""
    used, notes = require_executorch(), {KEY: to_json(spec), **notes}
    module: nn.Module = network
    image = torch.zeros(options.batch or 1, *spec.shape)
    if options.pixels is not None:
        notes[NOTE] = options.pixels
        module = _OfPixels(network, spec, options.pixels)
        image = (image if options.pixels == "nchw" else image.permute(0, 2, 3, 1).contiguous()).to(torch.uint8)
    try:
        with _quiet():
            exported = torch.export.export(module, (image,))
            edge = used.lower(exported, partitioner=[used.partitioner()], constant_methods=dict(sorted(notes.items())))
            lowered = _lowered(edge.exported_program().graph_module)
            buffer = io.BytesIO()
            edge.to_executorch().write_to_file(buffer)
    except Exception as error:  # the compiler raises whatever its passes come across
        raise ExportError(f"ExecuTorch cannot lower the network: {_first_line(error)}") from error
    return buffer.getvalue(), lowered


class _OfPixels(nn.Module):
    """A network with the normalisation of pixels in front, in the order of `ImageSpec.normalize`."""

    def __init__(self, network: nn.Module, spec: ImageSpec, layout: Layout) -> None:
        super().__init__()
        self.network, self.spec, self.layout = network, spec, layout

    def forward(self, pixels: Tensor) -> Any:
        """Map uint8 pixels in the layout to what the network gives."""
        planar = pixels.permute(0, 3, 1, 2) if self.layout == "nhwc" else pixels
        return self.network(self.spec.normalize(planar.to(torch.float32) / 255))


def _first_line(error: Exception) -> str:
    """Return what an error says first, as a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".") + "."


def _lowered(network: fx.GraphModule) -> Lowered:
    """Count the operators inside and outside of what XNNPACK computes."""
    calls = [node for node in network.graph.nodes if node.op == "call_function"]
    inside = [getattr(network, node.target) for node in network.graph.nodes if node.op == "get_attr"]
    graphs = [part.original_module.graph for part in inside if hasattr(part, "original_module")]
    num_lowered = sum(node.op == "call_function" for graph in graphs for node in graph.nodes)
    left = [node.target._schema.name.partition("::")[2] for node in calls if hasattr(node.target, "_schema")]
    return Lowered(num_lowered + len(left), num_lowered, tuple(sorted(set(left))))


def _adapt(network: fx.GraphModule) -> None:
    """Write the same computation in the form of which XNNPACK takes most."""
    graph = network.graph
    drop_implied_clamps(graph)
    for node in list(graph.nodes):
        if node.target is aten.cat.default:
            _join_on_one_grid(graph, node)
        elif node.target is aten.mean.dim:
            _keep_dimensions(graph, node)
        elif node.target in (aten.pad.default, aten.constant_pad_nd.default):
            _round_padding(graph, node)
        elif node.target is aten.clamp.default and all(map(math.isfinite, clamp_limits(node) or (math.inf,))):
            node.target, node.args, node.kwargs = aten.hardtanh.default, (node.args[0], *(clamp_limits(node) or ())), {}
    for node in list(graph.nodes):
        if node.target in edit.LAYERS:
            _store_layer(network, node)
    for node in list(graph.nodes):
        if node.target == DEQUANTIZE:
            _give_each_reader_its_own(graph, node)
    edit.finish(network)


def _store_layer(network: fx.GraphModule, layer: fx.Node) -> None:
    """Store a layer's bias as the float that XNNPACK rounds to the same int32, and its weight as int8 of full range.

    XNNPACK packs int8 in [-8, 7] as 4 bits, which its kernels for int8 activations do not take. The weight of a layer
    that XNNPACK cannot compute in integers becomes float as well: ExecuTorch's own `dequantize_per_channel` was seen to
    give other values.
    """
    weight, bias = layer.args[1], edit.argument(layer, 2)
    if isinstance(bias, fx.Node):
        _store_float(network, bias)
    if not isinstance(weight, fx.Node) or weight.target not in (DEQUANTIZE, DEQUANTIZE_CHANNELS):
        return
    if _in_integers(layer):
        ends = 4 if weight.target == DEQUANTIZE_CHANNELS else 3
        weight.args = (*weight.args[:ends], -128, 127, *weight.args[ends + 2 :])
    else:
        _store_float(network, weight)


def _in_integers(layer: fx.Node) -> bool:
    """Whether XNNPACK takes a layer in int8: it reads such, and its output is rounded, at once or behind a limit."""
    source, output = layer.args[0], layer
    while len(output.users) == 1 and next(iter(output.users)).target in (aten.relu.default, aten.hardtanh.default):
        output = next(iter(output.users))
    rounded = len(output.users) == 1 and next(iter(output.users)).target == QUANTIZE
    return rounded and isinstance(source, fx.Node) and source.target == DEQUANTIZE


def _store_float(network: fx.GraphModule, node: fx.Node) -> None:
    """Store what a dequantization of stored integers gives in their place."""
    stored = node.args[0]
    if node.target not in (DEQUANTIZE, DEQUANTIZE_CHANNELS) or not isinstance(stored, fx.Node):
        return
    values = [edit.get_attribute(network, str(arg.target)) if isinstance(arg, fx.Node) else arg for arg in node.args]
    edit.set_tensor(network, str(stored.target), node.target(*values))
    node.replace_all_uses_with(stored)


def _round_again(graph: fx.Graph, node: fx.Node, grid: tuple[Any, ...], readers: set[fx.Node]) -> fx.Node:
    """Insert quantize and dequantize on a grid between a node and some that read it."""
    with graph.inserting_after(node):
        integers = graph.call_function(QUANTIZE, (node, *grid))
    with graph.inserting_after(integers):
        rounded = graph.call_function(DEQUANTIZE, (integers, *grid))
    node.replace_all_uses_with(rounded, delete_user_cb=lambda user: user in readers)
    return rounded


def _join_on_one_grid(graph: fx.Graph, node: fx.Node) -> None:
    """Round what is concatenated on the grid of the result before instead of after: XNNPACK takes one grid alone."""
    after = next(iter(node.users))
    if len(node.users) != 1 or after.target != QUANTIZE:
        return
    parts = node.args[0]
    assert isinstance(parts, list | tuple)
    for part in dict.fromkeys(parts):
        if part.target != DEQUANTIZE or part.args[1:] != after.args[1:]:
            _round_again(graph, part, after.args[1:], {node})


def _keep_dimensions(graph: fx.Graph, node: fx.Node) -> None:
    """Let a mean of maps keep its two axes, as XNNPACK's does, and drop them once it is rounded."""
    axes, keeps = node.args[1], bool(edit.argument(node, 2, False))
    after = next(iter(node.users))
    rounded = next(iter(after.users))
    assert isinstance(axes, list | tuple)
    if keeps or len(node.users) != 1 or after.target != QUANTIZE or rounded.target != DEQUANTIZE:
        return
    if not isinstance(node.args[0], fx.Node) or sorted(axes) not in ([2, 3], [-2, -1]):
        return
    node.args = (*node.args[:2], True)
    readers = set(rounded.users)
    with graph.inserting_after(rounded):
        flat = graph.call_function(aten.flatten.using_ints, (rounded, 1))
    rounded.replace_all_uses_with(flat, delete_user_cb=lambda user: user in readers)
    _round_again(graph, flat, rounded.args[1:], readers)


def _round_padding(graph: fx.Graph, node: fx.Node) -> None:
    """Round padded values again, which changes none, so that the layer behind reads integers."""
    source = node.args[0]
    if isinstance(source, fx.Node) and source.target == DEQUANTIZE:
        _round_again(graph, node, source.args[1:], {user for user in node.users if user.target != QUANTIZE})


def _give_each_reader_its_own(graph: fx.Graph, node: fx.Node) -> None:
    """Let each reader of integers dequantize them itself: XNNPACK's partitioner makes cycles of shared ones."""
    for reader in list(node.users)[1:]:
        with graph.inserting_after(node):
            own = graph.call_function(DEQUANTIZE, node.args)
        reader.replace_input_with(node, own)


def content_of(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield what a ``.pte`` file computes with, by name: its operators and all its data, without the notes."""
    require_executorch()
    from executorch.exir._serialize._program import deserialize_pte_binary

    file = deserialize_pte_binary(Path(path).read_bytes())
    (plan,) = (plan for plan in file.program.execution_plan if plan.name == FORWARD)
    yield FORWARD, repr(plan).encode()
    for kind, parts in (
        ("constants", (part.storage for part in file.program.constant_buffer)),
        ("delegates", (part.data for part in file.program.backend_delegate_data)),
        ("named", file.named_data.buffers if file.named_data else ()),
    ):
        yield from ((f"{kind}/{number}", bytes(part)) for number, part in enumerate(parts))


class _Threads:
    """ExecuTorch's pool of threads, of which a process has one; programs loaded before it is changed hold the old."""

    changes = 0

    @classmethod
    def use(cls, pool: Any, threads: int | None) -> int:
        """Give the pool so many threads, None leaves it; return how often it has been changed."""
        if threads is not None and pool._threadpool_get_thread_count() != threads:
            pool._unsafe_reset_threadpool(threads)
            cls.changes += 1
        return cls.changes


class ExecuTorchClassifier(FileClassifier):
    """A ``.pte`` file in ExecuTorch on the processor, called like a network; as many images run at a time as it takes.

    Args:
        path: the ``.pte`` file.
        threads: threads of ExecuTorch in this process; None leaves them as they are.
    Raises:
        MissingExtraError: ExecuTorch is not installed.
        InputError: the file does not exist, or ExecuTorch cannot load it.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        if not Path(path).is_file():
            raise InputError(f"{path}: no such file; write one with write_executorch.")
        used = require_executorch()
        self._runtime, self._pool, self._threads, self._path = used.runtime, used.pool, threads, path
        self._load()
        notes = {}
        for name in self._program.method_names - {FORWARD}:
            (text,) = self._program.load_method(name).execute([])
            notes[name] = str(text)
        sizes = self._program.metadata(FORWARD).input_tensor_meta(0).sizes()
        super().__init__(path, notes, list(sizes))

    def _load(self) -> None:
        """Load the program, on as many threads as are asked for."""
        try:
            with silent_stderr():
                self._loaded_at = _Threads.use(self._pool, self._threads)
                program = self._runtime.get().load_program(Path(self._path))
                self._forward, self._program = program.load_method(FORWARD), program  # which the method needs alive
        except (RuntimeError, KeyError) as error:
            raise InputError(f"{self._path}: ExecuTorch cannot load it: {_first_line(error)}") from error

    def _run(self, array: np.ndarray) -> list[np.ndarray]:
        with silent_stderr():
            changes = _Threads.use(self._pool, self._threads)
        if self._loaded_at != changes:
            self._load()
        try:
            return [answer.numpy() for answer in self._forward.execute([torch.from_numpy(array)])]
        except RuntimeError as error:
            raise InputError(f"{self._path}: ExecuTorch cannot run it: {_first_line(error)}") from error
