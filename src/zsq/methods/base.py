"""What every method gives: something to quantize, and images to do it with."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from zsq.checked import Checked
from zsq.errors import InputError
from zsq.graph.observe import ObservedTeacher
from zsq.models.teacher import Teacher
from zsq.training.loop import Run
from zsq.types import SampleSource, Statistics

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class Surrogate:
    """The result of `fit`: what stands in for the training data."""

    source: SampleSource
    """Images for calibration and distillation."""
    network: GraphModule
    """The float network to quantize: the teacher's own, unless the method rewrites it."""
    statistics: Statistics | None = None
    """Ranges and means of the folded network, where they take the place of images in calibration."""


def restore(source: SampleSource, state: dict[str, Tensor]) -> None:
    """Give a source what another run has fitted.

    Raises:
        InputError: it does not fit.
    """
    try:
        source.load_state_dict(state)
    except (LookupError, RuntimeError) as error:
        raise InputError(
            "what is stored of the generator is not what its settings make here; another version of zsq may have "
            "written it. Fit anew, without --from."
        ) from error


class Method(Checked, ABC):
    """A frozen dataclass whose fields are its settings, with one verb."""

    __slots__ = ()

    section: ClassVar[str] = "method"
    name: ClassVar[str]
    """Name on the command line."""
    summary: ClassVar[str]
    """What it is, in half a line."""
    quantizers: ClassVar[tuple[str, ...]] = ("ptq", "qat")
    """Names of the quantizers that can use it."""
    paths: ClassVar[tuple[str, ...]] = ()
    """Names of the settings that name files or folders."""

    @property
    def steps(self) -> int:
        """Steps of `fit`: none, since nothing is learnt."""
        return 0

    @property
    def data_set(self) -> str | None:
        """Name or path of the labelled images that the method reads; None where it reads none."""
        return None

    def with_steps(self, steps: int) -> Self:
        """Return these settings with another number of steps of `fit`: the same where `steps` is no setting."""
        learns = "steps" in {field.name for field in fields(self)}  # type: ignore[arg-type]
        return replace(self, steps=steps) if learns else self  # type: ignore[type-var]

    def until_settled(self) -> Self:
        """Return these settings with a fit that ends by itself when it suffices for 8 bits: the same if it cannot."""
        return self

    def with_paths(self, located: Callable[[str], str]) -> Self:
        """Return these settings with each file or folder that they name where `located` says that it lies."""
        found = {name: located(path) for name in self.paths if (path := getattr(self, name))}
        return replace(self, **found)  # type: ignore[type-var]

    @abstractmethod
    def fit(
        self, teacher: Teacher, run: Run, *, distill_steps: int = 0, fitted: dict[str, Tensor] | None = None
    ) -> Surrogate:
        """Learn what stands in for the training data; the teacher is left alone, bit for bit.

        Args:
            teacher: the float network.
            run: seed, device, folder for checkpoints, progress.
            distill_steps: steps of distillation that will follow, for schedules that span both.
            fitted: the state of a source fitted before, by these settings; nothing is learnt again.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningMethod(Method, ABC):
    """What methods that learn from the teacher share: how they compute."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Of layers while the method learns; statistics, losses and samples stay float32."""

    def observed(self, teacher: Teacher, device: torch.device, *, required: bool = True) -> ObservedTeacher:
        """Return the teacher with the statistics of its batch norms, in channels-last order.

        Raises:
            InputError: it stores none, and they are required.
        """
        low = self.precision == "bfloat16"
        observed = ObservedTeacher(teacher.network, teacher.name, low_precision=low, required=required)
        return in_channels_last(observed.to(device))


def in_channels_last(network: Network) -> Network:
    """Return a network with the filters of its 2-D convolutions in channels-last order, in place."""
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.to(memory_format=torch.channels_last)
    return network


def takes_size(teacher: Teacher, sides: Sequence[int], device: torch.device) -> bool:
    """Whether a teacher takes images of another size than its own, and answers in the same shape.

    It does not where a layer reads a whole map, or where there is an answer for each place.
    """
    try:
        with torch.no_grad():
            answers = teacher.network(torch.zeros(2, teacher.spec.channels, *sides, device=device))
    except RuntimeError:  # such as a linear layer behind flatten
        return False
    outputs = teacher.spec.outputs
    return not outputs or answers.shape[1] == sum(output.size for output in outputs)
