"""Quantize a pretrained image classifier to INT8, INT6 or INT4 without any of its training data.

What `__all__` names is promised; all else may change between versions. A name is imported when it is first used, so
that `import zsq` alone takes no time.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zsq.comparison.compare import compare
    from zsq.comparison.result import Comparison
    from zsq.errors import ExportError, InputError, MissingExtraError, NumericsError, TeacherError, ZsqError
    from zsq.evaluation.accuracy import Evaluation, evaluate
    from zsq.export.onnx_runtime import OnnxClassifier
    from zsq.methods import (
        METHODS,
        ZSCGAN,
        Adversarial,
        BigGAN,
        DeepInversion,
        KnowledgeWithin,
        Noise,
        Real,
        Spectral,
        ZeroQ,
    )
    from zsq.methods.dfq import DFQ
    from zsq.models.network import Network
    from zsq.models.teacher import Teacher, load_teacher, teacher_from_module
    from zsq.quantization import PTQ, QAT
    from zsq.runs.allocate import Allocated, allocate
    from zsq.runs.export import Exported, export_run
    from zsq.runs.pipeline import Result
    from zsq.runs.quantize import quantize
    from zsq.runs.record import Record
    from zsq.runs.synthesize import synthesize
    from zsq.runtime.observer import Observer
    from zsq.types import ImageSpec, Output

    __version__: str

__all__ = [
    "DFQ",
    "METHODS",
    "PTQ",
    "QAT",
    "ZSCGAN",
    "Adversarial",
    "Allocated",
    "BigGAN",
    "Comparison",
    "DeepInversion",
    "Evaluation",
    "ExportError",
    "Exported",
    "ImageSpec",
    "InputError",
    "KnowledgeWithin",
    "MissingExtraError",
    "Network",
    "Noise",
    "NumericsError",
    "Observer",
    "OnnxClassifier",
    "Output",
    "Real",
    "Record",
    "Result",
    "Spectral",
    "Teacher",
    "TeacherError",
    "ZeroQ",
    "ZsqError",
    "allocate",
    "compare",
    "evaluate",
    "export_run",
    "load_teacher",
    "quantize",
    "synthesize",
    "teacher_from_module",
]

_MODULES = {
    "zsq.comparison.compare": ("compare",),
    "zsq.comparison.result": ("Comparison",),
    "zsq.errors": (
        "ExportError",
        "InputError",
        "MissingExtraError",
        "NumericsError",
        "TeacherError",
        "ZsqError",
    ),
    "zsq.evaluation.accuracy": ("Evaluation", "evaluate"),
    "zsq.export.onnx_runtime": ("OnnxClassifier",),
    "zsq.methods": (
        "Adversarial",
        "BigGAN",
        "DeepInversion",
        "KnowledgeWithin",
        "METHODS",
        "Noise",
        "Real",
        "Spectral",
        "ZSCGAN",
        "ZeroQ",
    ),
    "zsq.methods.dfq": ("DFQ",),
    "zsq.models.network": ("Network",),
    "zsq.models.teacher": ("Teacher", "load_teacher", "teacher_from_module"),
    "zsq.quantization": ("PTQ", "QAT"),
    "zsq.runs.allocate": ("Allocated", "allocate"),
    "zsq.runs.export": ("Exported", "export_run"),
    "zsq.runs.pipeline": ("Result",),
    "zsq.runs.quantize": ("quantize",),
    "zsq.runs.record": ("Record",),
    "zsq.runs.synthesize": ("synthesize",),
    "zsq.runtime.observer": ("Observer",),
    "zsq.types": ("ImageSpec", "Output"),
}
"""Where the promised names are defined: those of the imports above, which only type checkers follow."""

logging.getLogger(__name__).addHandler(logging.NullHandler())

if not TYPE_CHECKING:  # else any misspelled name would pass

    def __getattr__(name: str) -> Any:
        """Import what is asked for."""
        if name == "__version__":
            from importlib import metadata

            found = metadata.version("zsq")
        elif (module := next((m for m, names in _MODULES.items() if name in names), None)) is not None:
            found = getattr(importlib.import_module(module), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
