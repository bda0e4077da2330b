"""What a runtime does with a file, in its own words: which kernels it runs, in integers or in float, and how long."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["integers", "float", "conversion", "other"]

INTEGERS = frozenset({"int8", "uint8", "int16", "i8", "u8", "i16", "u16", "i4", "u4"})
FLOATS = frozenset({"float", "float16", "bfloat16", "double", "float32", "float64", "f16", "bf16", "f32", "f64"})

CONVERSIONS = frozenset(
    {
        *("QuantizeLinear", "DequantizeLinear", "Cast", "FakeQuantize", "Convert"),
        *("QUANTIZE", "DEQUANTIZE", "CAST", "_to_dim_order_copy"),
    }
)
"""Operators that only go from one type to another, as runtimes name them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """The kernels of one kind that a runtime runs for an image."""

    name: str
    """Operator, as the runtime names it."""
    computes: Kind
    """In `integers` or `float`; `conversion` between the two, or `other`, such as shapes and indices."""
    count: int
    """How many there are."""
    implementation: str = ""
    """What the runtime says of where or how they are computed."""
    milliseconds: float | None = None
    """Of all of them for one image; None where the runtime does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What a runtime does with a file."""

    runtime: str
    """Name of the runtime."""
    kernels: tuple[Kernels, ...] = ()
    """Slowest first; where there are no times, most first."""
    num_operators: int | None = None
    """Operators of the file, of which a runtime fuses some into one kernel; None where it was not run."""
    source: str = ""
    """Where this is from, and what it leaves out."""

    def num_kernels(self, *kinds: Kind) -> int:
        """Return how many kernels there are of these kinds, or of all."""
        return sum(found.count for found in self.kernels if not kinds or found.computes in kinds)

    @property
    def milliseconds(self) -> float | None:
        """Sum over all kernels; None where the runtime gives no times."""
        times = [found.milliseconds for found in self.kernels if found.milliseconds is not None]
        return sum(times) if times else None

    def share(self, *kinds: Kind) -> float | None:
        """Return the percentage of the time that kernels of these kinds take; None where there are no times."""
        whole = self.milliseconds
        if not whole:
            return None
        return 100 * sum(found.milliseconds or 0.0 for found in self.kernels if found.computes in kinds) / whole


@dataclass(frozen=True, slots=True)
class Ran:
    """One kernel that a runtime has run."""

    name: str
    types: tuple[str, ...]
    """Of what it reads and gives: the types that tell in what it computes."""
    implementation: str = ""
    milliseconds: float | None = None

    @property
    def computes(self) -> Kind:
        """In what it computes: a kernel that reads or gives integers is one of integers."""
        if self.name in CONVERSIONS:
            return "conversion"
        if INTEGERS & set(self.types):
            return "integers"
        return "float" if FLOATS & set(self.types) else "other"


def grouped(found: Iterable[Ran]) -> tuple[Kernels, ...]:
    """Return kernels by operator, kind and implementation."""
    groups: dict[tuple[str, Kind, str], list[float | None]] = {}
    for kernel in found:
        key = (kernel.name, kernel.computes, kernel.implementation)
        groups.setdefault(key, []).append(kernel.milliseconds)
    kernels = [
        Kernels(
            name=name,
            computes=kind,
            implementation=implementation,
            count=len(times),
            milliseconds=None if None in times else round(sum(time or 0.0 for time in times), 4),
        )
        for (name, kind, implementation), times in groups.items()
    ]
    return tuple(sorted(kernels, key=lambda found: (-(found.milliseconds or 0.0), -found.count, found.name)))
