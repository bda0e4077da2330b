"""What the stages of a run work on."""

from dataclasses import dataclass, field
from pathlib import Path

from zsq.data.datasets import DataSet, EvenSubset
from zsq.evaluation.accuracy import Evaluation
from zsq.evaluation.measures import Decoder
from zsq.export.options import FileOptions
from zsq.models.teacher import Teacher
from zsq.quantization import PTQ
from zsq.runs.fitted import FittedRun
from zsq.runs.settings import Settings
from zsq.targets import Target, target_of
from zsq.training.loop import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """What a run writes and measures beside its target's file and its record."""

    pt2: bool = True
    """Write `model.pt2`."""
    predictions: bool = False
    """Write the class that the file names for each image of the data, and the true one; of other outputs, how near they
    are to what is true and to the float network's."""
    simulation: bool = True
    """Measure the accuracy of the simulation, too."""
    layers: bool = True
    """Measure what rounding does to each layer and the latency, and profile the file."""
    float_results: Evaluation | None = None
    """The float network's results on the data where they are known; None measures them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A run that is ready to start: all that is asked for has been checked."""

    teacher: Teacher
    """The float network, on the run's device."""
    run: Run
    """Seed, device, folder, observer."""
    folder: Path
    """Where everything is written."""
    settings: Settings
    """Method and quantizer with their schedule."""
    data: DataSet | EvenSubset | None = None
    """Images on which accuracy is measured."""
    decoder: Decoder | None = None
    """Reads boxes from the outputs, where the data say which there are."""
    fitted: FittedRun | None = None
    """A finished fit that is reused."""
    outputs: Outputs = field(default_factory=Outputs)

    @property
    def file_options(self) -> FileOptions:
        """What was chosen of the file's form."""
        return file_options(self.settings.quantizer)

    @property
    def target(self) -> Target:
        """What the file is for."""
        return target_of(self.settings.quantizer.target)

    @property
    def file(self) -> Path:
        """Where the file is written."""
        return self.folder / self.target.file


def file_options(quantizer: PTQ) -> FileOptions:
    """Return what a quantizer's settings say of the file's form."""
    batch = None if quantizer.batch == "dynamic" else quantizer.batch
    return FileOptions(pixels=quantizer.pixels, batch=batch, packed=quantizer.packed)
