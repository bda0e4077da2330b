"""Quantize a pretrained image classifier to INT8, INT6 or INT4 without any of its training data."""

import logging
from importlib import metadata

from zsq.errors import ExportError, InputError, MissingExtraError, NumericsError, TeacherError, ZsqError
from zsq.evaluation.accuracy import Evaluation, evaluate
from zsq.export.verify import OnnxClassifier
from zsq.methods import METHODS, ZSCGAN, Adversarial, BigGAN, DeepInversion, KnowledgeWithin, Noise, Real, ZeroQ
from zsq.models.teacher import Teacher, load_teacher, teacher_from_module
from zsq.quantization import PTQ, QAT
from zsq.runs.allocate import allocate
from zsq.runs.quantize import Result, quantize
from zsq.runs.synthesize import synthesize
from zsq.types import ImageSpec

logging.getLogger(__name__).addHandler(logging.NullHandler())

__version__ = metadata.version("zsq")

__all__ = [
    "METHODS",
    "PTQ",
    "QAT",
    "ZSCGAN",
    "Adversarial",
    "BigGAN",
    "DeepInversion",
    "Evaluation",
    "ExportError",
    "ImageSpec",
    "InputError",
    "KnowledgeWithin",
    "MissingExtraError",
    "Noise",
    "NumericsError",
    "OnnxClassifier",
    "Real",
    "Result",
    "Teacher",
    "TeacherError",
    "ZeroQ",
    "ZsqError",
    "allocate",
    "evaluate",
    "load_teacher",
    "quantize",
    "synthesize",
    "teacher_from_module",
]
