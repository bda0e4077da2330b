"""Processes, CUDA graphs, kernels, memory: what computing on this machine takes, whatever is computed."""
