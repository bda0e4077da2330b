"""What stands in for the training data: one frozen dataclass of settings a method."""

from zsq.methods.adversarial import Adversarial
from zsq.methods.base import Method, Surrogate
from zsq.methods.biggan import BigGAN
from zsq.methods.deepinversion import DeepInversion
from zsq.methods.dfq import DFQ
from zsq.methods.knowledge_within import KnowledgeWithin
from zsq.methods.noise_and_real import Noise, Real
from zsq.methods.spectral import Spectral
from zsq.methods.zeroq import ZeroQ
from zsq.methods.zscgan import ZSCGAN
from zsq.runtime.plugins import Registry

METHODS = Registry(
    "zsq.methods",
    kind="method",
    base=Method,
    own=(ZSCGAN, Adversarial, BigGAN, ZeroQ, DeepInversion, KnowledgeWithin, Spectral, DFQ, Noise, Real),
)
"""Every method by its name on the command line: zsq's own, and those that installed packages register."""

__all__ = [
    "DFQ",
    "METHODS",
    "ZSCGAN",
    "Adversarial",
    "BigGAN",
    "DeepInversion",
    "KnowledgeWithin",
    "Method",
    "Noise",
    "Real",
    "Spectral",
    "Surrogate",
    "ZeroQ",
]
