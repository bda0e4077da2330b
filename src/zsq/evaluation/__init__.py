"""Metrics of a network's output."""
