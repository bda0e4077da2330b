"""From a float graph to a quantized one: fake quantization, calibration, distillation, conversion."""

from zsq.quantization.ptq import PTQ
from zsq.quantization.qat import QAT

QUANTIZERS: dict[str, type[PTQ]] = {quantizer.name: quantizer for quantizer in (PTQ, QAT)}
"""Every quantizer by its name on the command line."""

__all__ = ["PTQ", "QAT", "QUANTIZERS"]
