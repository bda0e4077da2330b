"""What is installed here that results depend on."""

import contextlib
import platform
from importlib import metadata

import torch


def versions() -> dict[str, str]:
    """Return the versions on which a result depends, and the processor's kind."""
    names = ("zsq", "onnx", "onnxruntime")
    found = {name: metadata.version(name) for name in names}
    for name in ("openvino", "ai-edge-litert", "executorch"):
        with contextlib.suppress(metadata.PackageNotFoundError):  # an extra
            found[name] = metadata.version(name)
    return found | {
        "torch": torch.__version__,  # names the build, which the package's metadata may not
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
