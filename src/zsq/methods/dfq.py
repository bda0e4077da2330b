"""DFQ: no images at all, but a network rewritten to round well, and statistics that its batch norms imply."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from zsq.checked import Count, Factor, Positive
from zsq.errors import InputError
from zsq.graph.batchnorm import batch_norms
from zsq.graph.equalize import absorb, equalize, replace_relu6
from zsq.graph.fold import fold
from zsq.methods.base import Method, Surrogate
from zsq.methods.noise_and_real import Noise, NoiseSource
from zsq.models.teacher import Teacher
from zsq.quantization.implied_statistics import implied_statistics, uniform_pixels
from zsq.training.loop import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class DFQ(Method):
    """Equalise the weights of neighbouring layers; take ranges and mean inputs from batch norm."""

    name: ClassVar[str] = "dfq"
    summary: ClassVar[str] = "weight equalization, ranges and bias correction from batch norm, no images"
    quantizers: ClassVar[tuple[str, ...]] = ("ptq",)

    equalize: bool = True
    """Give neighbouring layers equal weight ranges, channel by channel."""
    iterations: Count = 100
    """Most sweeps of equalisation; fewer where no factor changes by more than 0.1 %."""
    absorb: bool = False
    """Move what a channel nearly always exceeds into the next layer's bias."""
    absorb_sigmas: Factor = 3.0
    """Standard deviations below a channel's mean that nearly all of its values exceed."""
    relu6: Literal["relu", "clip", "keep"] = "keep"
    """A ReLU6 stays and keeps layers from being equalised, or becomes a ReLU, or is clipped at a bound a channel, which
    no integer kernel does."""
    range_sigmas: Positive = 6.0
    """Standard deviations on both sides of a channel's mean that an activation's range spans."""

    def fit(
        self, teacher: Teacher, run: Run, *, distill_steps: int = 0, fitted: dict[str, Tensor] | None = None
    ) -> Surrogate:
        """Rewrite a copy of the network and compute its statistics; nothing is learnt.

        Raises:
            InputError: the teacher has no batch norm.
        """
        del distill_steps, fitted
        if not batch_norms(teacher.network):
            raise InputError(
                f"teacher '{teacher.name}' has no batch norm with stored statistics, and method dfq takes ranges and "
                "means from them. Methods that do without: noise, real."
            )
        network, record = fold(teacher.network)
        if self.relu6 != "keep":
            replace_relu6(network, clip=self.relu6 == "clip")
        if self.equalize:
            equalize(network, record, self.iterations)
        if self.absorb:
            absorb(network, record, self.absorb_sigmas)
        pixels = uniform_pixels(teacher.spec, run)
        statistics = implied_statistics(network, record, pixels, self.range_sigmas, run)
        checked_on = NoiseSource(Noise(distribution="uniform"), teacher.spec, run)
        return Surrogate(checked_on, network, statistics)
