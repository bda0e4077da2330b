"""What is installed here that results depend on."""

import contextlib
import platform
import runpy
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path


def versions() -> dict[str, str]:
    """Return the versions on which a result depends, and the processor's kind."""
    names = ("zsq", "onnx", "onnxruntime")
    found = {name: metadata.version(name) for name in names}
    for name in ("openvino", "ai-edge-litert", "executorch"):
        with contextlib.suppress(metadata.PackageNotFoundError):  # an extra
            found[name] = metadata.version(name)
    return found | {
        "torch": _version_of_torch(),
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def version_line() -> str:
    """Return them as one line."""
    return ", ".join(f"{name} {number}" for name, number in versions().items())


def _version_of_torch() -> str:
    """Return PyTorch's version with its build, which the package's metadata may not name; it is not imported."""
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return str(runpy.run_path(str(Path(spec.origin).with_name("version.py")))["__version__"])
