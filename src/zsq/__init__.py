"""Quantize a pretrained image classifier to INT8, INT6 or INT4 without any of its training data."""
