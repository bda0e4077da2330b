"""Check a machine, and describe the settings."""

import ast
import inspect
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch

from zsq.models.teacher import known_models, load_teacher
from zsq.runs.folder import versions
from zsq.runs.quantize import quantize


def settings_of(kind: type) -> Iterator[tuple[str, str, str]]:
    """Yield name, default and docstring of each setting of a method or quantizer."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if base is not object:
            texts |= _field_texts(base)
    for field in fields(kind):
        default: Any = "" if field.default is MISSING else field.default
        yield field.name, "none" if default is None else str(default), texts.get(field.name, "")


def _field_texts(kind: type) -> dict[str, str]:
    """Return the string that stands below each annotated name of a class; none where its source cannot be read."""
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    except (OSError, TypeError, SyntaxError):
        return {}
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for above, below in zip(body.body, body.body[1:], strict=False):
        is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        if isinstance(above, ast.AnnAssign) and isinstance(above.target, ast.Name) and is_text:
            assert isinstance(below, ast.Expr)
            assert isinstance(below.value, ast.Constant)
            texts[above.target.id] = " ".join(str(below.value.value).split())
    return texts


def report() -> Iterator[tuple[str, str]]:
    """Yield what is installed, and the outcome of a small quantization from end to end.

    Raises:
        ZsqError: the quantization fails; the text says how.
    """
    yield from versions().items()
    yield "threads", str(torch.get_num_threads())
    cuda = torch.cuda.is_available()
    yield "cuda", torch.cuda.get_device_name() if cuda else "none; zsq runs on the CPU"
    for group in known_models():
        yield group.form, group.reason if group.installed else f"not usable here: {group.reason}"
    with tempfile.TemporaryDirectory() as folder:
        result = quantize(
            load_teacher("digits"),
            out=Path(folder) / "run",
            method="noise",
            data="digits",
            settings=("quantizer.num_samples=200",),
            quiet=True,
        )
    float_top1, top1 = result.record["float_top1"], result.record["quantized_top1"]
    yield "self-test", f"passed: digits float {float_top1:.2f} %, INT8 from noise {top1:.2f} % in ONNX Runtime"
