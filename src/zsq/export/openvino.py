"""Run a file in OpenVINO on the processor, and write it as OpenVINO's own intermediate representation (IR)."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
import torch

from zsq.errors import ExportError, InputError, MissingExtraError
from zsq.export.classifier import FileClassifier
from zsq.export.image_spec import notes_of
from zsq.export.profile import Profile, Ran, grouped

INSTALL = "pip install 'zsq[openvino]'"

IR = ".xml"
"""How the name of an IR ends; its weights lie beside it, in a file that ends in `.bin`."""

SECTION = "zsq"
"""Part of an IR's runtime information that holds the metadata."""


def require_openvino() -> Any:
    """Return the module.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise MissingExtraError(
            f"target openvino runs its file in OpenVINO, which is not installed: {INSTALL}"
        ) from error
    return openvino


def write_ir(source: Path, path: Path) -> None:
    """Write an ONNX file as an IR, ``.xml`` and ``.bin``, metadata included.

    Raises:
        MissingExtraError: OpenVINO is not installed.
        ExportError: OpenVINO reads the IR otherwise than the ONNX file.
    """
    openvino = require_openvino()
    model = openvino.Core().read_model(str(source))
    for name, text in notes_of(source).items():
        model.set_rt_info(text, [SECTION, name])
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part = Path(folder) / path.name
        openvino.save_model(model, str(part), compress_to_fp16=False)
        one, other = OpenVinoClassifier(part, threads=1), OpenVinoClassifier(source, threads=1)
        spec = one.spec
        images = torch.randn(2, *spec.shape, generator=torch.Generator().manual_seed(0))
        if not torch.equal(one(images), other(images)):
            raise ExportError("OpenVINO computes something else from the IR than from the ONNX file.")
        part.with_suffix(".bin").replace(path.with_suffix(".bin"))
        part.replace(path)


def ir_notes(path: Path) -> dict[str, str]:
    """Return the metadata of an IR, by name.

    Raises:
        InputError: there is no such file, or it is none.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file.")
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise InputError(f"{path}: it is no IR of OpenVINO.") from error
    return {entry.tag: entry.get("value", "") for entry in root.findall(f"rt_info/{SECTION}/*")}


class OpenVinoClassifier(FileClassifier):
    """An ONNX file or an IR in OpenVINO on the processor, called like a network.

    Args:
        path: the ``.onnx`` or ``.xml`` file.
        threads: threads of inference; None leaves the choice to the runtime.
        profiled: let the runtime note what it does, for `profile`.
    Raises:
        MissingExtraError: OpenVINO is not installed.
        InputError: the file does not exist, or OpenVINO cannot read or compile it.
    """

    def __init__(self, path: Path, threads: int | None = None, profiled: bool = False) -> None:
        openvino = require_openvino()
        notes = ir_notes(path) if Path(path).suffix == IR else notes_of(path)
        settings = {"INFERENCE_PRECISION_HINT": "f32"} | ({} if threads is None else {"INFERENCE_NUM_THREADS": threads})
        settings |= {"PERF_COUNT": True} if profiled else {}
        self._profiled, self._calls, self._first = profiled, 0, dict[str, float]()
        try:
            self._compiled = openvino.Core().compile_model(str(path), "CPU", settings)
        except RuntimeError as error:
            raise InputError(f"{path}: OpenVINO cannot compile it: {str(error).strip().splitlines()[-1]}") from error
        sizes = self._compiled.input(0).partial_shape
        super().__init__(path, notes, [size.get_length() if size.is_static else "batch" for size in sizes])

    def profile(self) -> Profile:
        """See `FileClassifier.profile`; means, without the first call."""
        if not self._profiled:
            return super().profile()
        later = max(1, self._calls - 1)
        spent = {
            name: max(0.0, mean * self._calls - (self._first[name] if self._calls > 1 else 0.0)) / later
            for name, mean in self._means().items()
        }
        return Profile(
            runtime="OpenVINO",
            kernels=grouped(_kernels(self._compiled.get_runtime_model(), spent)),
            num_operators=len(onnx.load(self._path, load_external_data=False).graph.node),
            source="OpenVINO's performance counters of a few images, one at a time on one thread",
        )

    def _means(self) -> dict[str, float]:
        """Return the milliseconds of each node, as a mean over all calls."""
        nodes = self._compiled.get_runtime_model().get_ops()
        return {node.get_friendly_name(): _milliseconds(node) for node in nodes}

    def _run(self, array: np.ndarray) -> list[np.ndarray]:
        found = self._compiled([array])
        self._calls += 1
        if self._profiled and self._calls == 1:
            self._first = self._means()
        return [np.array(found[index]) for index in range(len(found))]


def _fact(node: Any, name: str) -> str:
    """Return what an executed network says of a node."""
    return str(node.get_rt_info()[name].astype(str))


def _milliseconds(node: Any) -> float:
    spent = _fact(node, "execTimeMcs")
    return int(spent) / 1000 if spent.isdecimal() else 0.0


def _kernels(model: Any, spent: dict[str, float]) -> Iterator[Ran]:
    """Yield the kernels of an executed network, without what was computed when it was compiled or only renames."""
    constant: set[str] = set()
    for node in model.get_ordered_ops():
        name, kind, how = node.get_friendly_name(), _fact(node, "layerType"), _fact(node, "primitiveType")
        sources = {value.get_node().get_friendly_name() for value in node.input_values()}
        if kind == "Const" or (sources and sources <= constant):
            constant.add(name)
        elif kind not in ("Input", "Output") and not how.startswith("unknown"):
            yield Ran(kind, (_fact(node, "runtimePrecision"),), how, spent[name])
