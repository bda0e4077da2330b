"""From a float graph to a quantized one: fake quantization, calibration, distillation, conversion."""
