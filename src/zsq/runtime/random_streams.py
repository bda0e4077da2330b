"""Random draws that are pure functions of seed, name and step."""

import hashlib

import torch


def stream(seed: int, name: str, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return the random generator that is a pure function of (seed, name, step), so that no state is ever stored."""
    digest = hashlib.sha256(f"{seed}/{name}/{step}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
