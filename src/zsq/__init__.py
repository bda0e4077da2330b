"""Quantize a pretrained image classifier to INT8, INT6 or INT4 without any of its training data.

What `__all__` names is promised; all else may change between versions.
"""

import logging
from importlib import metadata

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

__version__ = metadata.version("zsq")

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

logging.getLogger(__name__).addHandler(logging.NullHandler())


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
