"""What is installed here that results depend on."""

import platform
from importlib import metadata

import torch


def versions() -> dict[str, str]:
    """Return the versions on which a result depends, and the processor's kind."""
    names = ("zsq", "onnx", "onnxruntime")
    return {name: metadata.version(name) for name in names} | {
        "torch": torch.__version__,  # names the build, which the package's metadata may not
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
