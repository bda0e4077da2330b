"""What a timing depends on beside versions: the processor, and what else it is doing."""

import os
import platform
from pathlib import Path


def processor() -> str:
    """Return the processor's name, with the integer instructions that it has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines) if value}
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    known = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")
    name = fields.get("model name", platform.machine())
    return " ".join([name, *(flag for flag in known if flag in flags)])


def load() -> float | None:
    """Return how many processes wanted to run in the last minute; None where the system does not tell."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None
