"""Files of every kind: written for a target, and opened in its runtime."""

import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from zsq.errors import InputError
from zsq.export.classifier import FileClassifier
from zsq.export.executorch import ExecuTorchClassifier, require_executorch, write_executorch
from zsq.export.image_spec import notes_of
from zsq.export.litert.runtime import LiteRtClassifier, require_litert
from zsq.export.litert.write import IN_FLOAT, write_litert
from zsq.export.onnx import write_onnx
from zsq.export.onnx_runtime import OnnxClassifier
from zsq.export.openvino import IR, OpenVinoClassifier, require_openvino
from zsq.export.options import PLAIN, FileOptions
from zsq.export.profile import Profile
from zsq.export.tensorrt_rules import profile_by_rules
from zsq.targets import TARGETS, Target
from zsq.types import ImageSpec

logger = logging.getLogger(__name__)

PROFILED_CALLS = 6
"""Of a profile; the first does not count."""

EXECUTORCH, LITERT, ONNX = ".pte", ".tflite", ".onnx"

REQUIRED: dict[str, Callable[[], object]] = {
    "ai_edge_litert": require_litert,
    "executorch": require_executorch,
    "openvino": require_openvino,
}
"""What imports a runtime that the core does not bring."""


def write_file(
    converted: fx.GraphModule,
    spec: ImageSpec,
    path: Path,
    target: Target = TARGETS["onnxruntime"],
    options: FileOptions = PLAIN,
    notes: Mapping[str, str] | None = None,
) -> float | None:
    """Write the file that a target takes, and return the percentage of its operators that a backend lowers.

    None where the target has no backend beside its kernels.

    Args:
        converted: the converted network (see `zsq.export.converted`), left as it is.
        spec: what the network takes and gives; also stored in the file's metadata under ``image_spec``.
        path: the file to write; it appears whole or not at all.
        target: the runtime that it is for, whose grids the network was quantized with.
        options: what a user may choose of a file.
        notes: what else stands in the metadata, by name.
    Raises:
        ExportError: an operation has no form in such a file, or its integers do not fit.
        InputError: pixels are asked for, and the network takes no images.
        MissingExtraError: the target's package is not installed.
    """
    if options.pixels is not None and not spec.is_image:
        raise InputError(
            f"a file takes pixels of images only, and this network takes {spec.shape_text}; omit --pixels."
        )
    if target.suffix == EXECUTORCH:
        lowered = write_executorch(converted, spec, path, options, notes=notes)
        if lowered.left:
            logger.info(f"XNNPACK computes no {', '.join(lowered.left)}; ExecuTorch's portable kernels do.")
        return lowered.percent
    if target.suffix == LITERT:
        write_litert(converted, spec, path, options, notes=notes)
    else:
        write_onnx(converted, spec, path, target, options, notes=notes)
    return None


def require_runtime(target: Target) -> None:
    """Return if the package is installed in which a target's file is run.

    Raises:
        MissingExtraError: it is not; the text says how to install it.
    """
    if target.runs_in in REQUIRED:
        REQUIRED[target.runs_in]()


def float_operators(target: Target) -> Collection[Any]:
    """Return the operators that a target's file computes in float, though other runtimes have integers for them."""
    return IN_FLOAT if target.suffix == LITERT else ()


def is_file_of_ours(path: Path) -> bool:
    """Whether a path ends as the files of some target do."""
    return path.suffix in {IR, *(target.suffix for target in TARGETS.values())}


def open_file(path: Path, threads: int | None = None, profiled: bool = False) -> FileClassifier:
    """Open a file in the runtime that it was written for, as its ending and its metadata say.

    An ONNX file for another processor than this one is run literally, since kernels here may saturate. With `profiled`,
    the runtime notes what it does, for `FileClassifier.profile`.

    Raises:
        InputError: it does not exist, or its runtime cannot load it.
        MissingExtraError: its runtime is not installed.
    """
    path = Path(path)
    if path.suffix == IR:
        return OpenVinoClassifier(path, threads=threads, profiled=profiled)
    if not is_file_of_ours(path):
        known = ", ".join(sorted({target.suffix for target in TARGETS.values()}))
        raise InputError(f"{path}: such a file is not one that zsq writes; known: {known}.")
    if path.suffix == EXECUTORCH:
        return ExecuTorchClassifier(path, threads=threads)
    if path.suffix == LITERT:
        return LiteRtClassifier(path, threads=threads)
    target = TARGETS.get(notes_of(path).get("target", ""), TARGETS["onnxruntime"])
    if target.runs_in == "openvino":
        return OpenVinoClassifier(path, threads=threads, profiled=profiled)
    return OnnxClassifier(path, optimize=target.keeps_pairs, threads=threads, profiled=profiled)


def profile_file(path: Path, target: Target, image: Tensor) -> Profile:
    """Return what a target's runtime does with a file, from a few calls with one normalised image [1, C, H, W].

    Raises:
        InputError: it cannot be run.
        MissingExtraError: its runtime is not installed.
    """
    if target.name == "tensorrt":
        return profile_by_rules(path)
    file = open_file(path, threads=1, profiled=True)
    for _ in range(PROFILED_CALLS):
        file(image)
    return file.profile()
