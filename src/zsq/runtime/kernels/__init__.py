"""Kernels for GPUs, in Triton, which this module imports: what a step does a value at a time, in one pass.

PyTorch has no kernel for most of it, or one that reads scales back to the host, for which every layer would wait.
"""

from zsq.runtime.kernels.base import dense
from zsq.runtime.kernels.biases import RoundBias
from zsq.runtime.kernels.norms import moments_gradient, scaled
from zsq.runtime.kernels.ranges import ends, follow
from zsq.runtime.kernels.rounding import FakeQuantize
from zsq.runtime.kernels.weights import Layer, RoundWeights, Tables

__all__ = [
    "FakeQuantize",
    "Layer",
    "RoundBias",
    "RoundWeights",
    "Tables",
    "dense",
    "ends",
    "follow",
    "moments_gradient",
    "scaled",
]
