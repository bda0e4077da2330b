"""What stands in for the training data: one frozen dataclass of settings a method."""

from typing import Any

from zsq.methods.base import Method, Surrogate
from zsq.methods.given import Noise, Real
from zsq.methods.zscgan import ZSCGAN

METHODS: dict[str, Any] = {method.name: method for method in (ZSCGAN, Noise, Real)}
"""Every method by its name on the command line."""

__all__ = ["METHODS", "ZSCGAN", "Method", "Noise", "Real", "Surrogate"]
