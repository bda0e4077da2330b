"""Quantize a pretrained image classifier to INT8, INT6 or INT4 without any of its training data."""

from importlib import metadata

from zsq.allocation import allocate
from zsq.errors import ExportError, InputError, MissingExtraError, NumericsError, TeacherError, ZsqError
from zsq.evaluate import Evaluation, evaluate
from zsq.experiment import Result, quantize
from zsq.methods import METHODS, ZSCGAN, Adversarial, BigGAN, DeepInversion, KnowledgeWithin, Noise, Real, ZeroQ
from zsq.quantize import PTQ, QAT
from zsq.samples import synthesize
from zsq.teachers import Teacher, load_teacher, teacher_from_module
from zsq.types import ImageSpec
from zsq.verification import OnnxClassifier

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
