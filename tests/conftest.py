"""Fixtures that several test files use.

What they need is imported inside: pytest-xdist's own process reads this file, too, and runs no test.
"""

import copy
import functools
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # tests import the runtime by themselves

pytest_plugins = ["enforce_slow", "pytester"]

REAL_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    if not REAL_DATA.is_dir():
        pytest.skip("the real weights and images (../shared/data) are not on this machine")
    return REAL_DATA


@pytest.fixture(autouse=True, scope="session")
def few_threads() -> None:
    import torch

    torch.set_num_threads(1)


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        from zsq.runs.console import Lines

        self.lines.append(Lines().format(record))


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What zsq logs while the test runs, as a user reads it."""
    logger, handler = logging.getLogger("zsq"), _Kept()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield handler.lines
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture(autouse=True, scope="session")
def operators_listed_once() -> Iterator[None]:
    """The exporter lists its operators anew for every file: half a second, of two, for the same list."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    listed = functools.cache(ONNXRegistry.from_torchlib)

    def from_torchlib(cls: type[ONNXRegistry], **options: object) -> ONNXRegistry:
        registry = copy.copy(listed(**options))
        registry.functions = {name: list(functions) for name, functions in registry.functions.items()}
        return registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", classmethod(from_torchlib))
        yield


@pytest.fixture(autouse=True, scope="session")
def digits_traced_once() -> Iterator[None]:
    """Hundreds of tests load the bundled network; each time, its export takes a quarter of a second for one graph."""
    from torch import nn
    from torch.fx import GraphModule

    from zsq.data.digits.network import DigitsNet
    from zsq.graph.edit import copy_network
    from zsq.models import teacher
    from zsq.types import ImageSpec

    traced, original = {}, teacher.trace

    def trace(net: nn.Module, spec: ImageSpec, name: str) -> GraphModule:
        if type(net) is not DigitsNet:
            return original(net, spec, name)
        key = spec, name, teacher.state_sha256(net.state_dict())
        if key not in traced:
            traced[key] = original(net, spec, name)
        return copy_network(traced[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher, "trace", trace)
        yield


@pytest.fixture(autouse=True, scope="session")
def digits_rehearsed_once() -> Iterator[None]:
    """Each run of the bundled network takes the way to its file first: a second, for the same counts."""
    from zsq.models.teacher import Teacher
    from zsq.quantization import PTQ
    from zsq.quantization.coverage import Coverage
    from zsq.runs import start
    from zsq.training.loop import Run

    known, original = {}, start.rehearse

    def rehearse(teacher: Teacher, quantizer: PTQ, run: Run) -> Coverage:
        if teacher.name != "digits":
            return original(teacher, quantizer, run)
        key = teacher.weights_sha256, teacher.spec, quantizer.target, quantizer.bits, quantizer.pixels, quantizer.batch
        if key not in known:
            known[key] = original(teacher, quantizer, run)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "rehearse", rehearse)
        yield
