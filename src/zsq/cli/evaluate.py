"""The verb that measures a file, a float network, or both."""

import json as json_format
import logging
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console
from tyro.conf import OmitArgPrefixes, Positional, arg

from zsq.cli.output import prints_to_stderr
from zsq.data.datasets import DataSet, open_dataset
from zsq.errors import InputError
from zsq.evaluation.accuracy import Evaluation, Predict, evaluate_many
from zsq.export.files import is_file_of_ours, open_file
from zsq.models.network import Network
from zsq.models.options import option
from zsq.models.teacher import Teacher, load
from zsq.reports.text_tables import percent, table
from zsq.runs.console import shown
from zsq.runs.folder import file_in
from zsq.runs.record import verified
from zsq.runs.stages import warn_of_chance
from zsq.runs.summary import figure
from zsq.runtime.device import pick_device
from zsq.types import ImageSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedNetwork(Network):
    """A network, or what a run has made of one."""

    model: Positional[str]
    """Folder of a run, its file, or a network as for `zsq quantize`."""


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure a quantized file, a float network, or both side by side: top-1, top-5 and agreement, or what suits maps,
    embeddings and values.

    Examples:
      zsq evaluate runs/digits --data digits
      zsq evaluate runs/digits/model.onnx --data digits --json
      zsq evaluate digits --file runs/digits --data digits
    """

    network: Annotated[EvaluatedNetwork, arg(name=""), OmitArgPrefixes]
    file: Annotated[Path | None, option("FILE")] = None
    """Beside a network: folder of a run or its file that is compared with it."""
    data: Annotated[str, option("SET", required=True)]
    """Images: digits, FILE.npz, or a folder with metadata.csv, with one folder a class, or of images without labels."""
    class_names: Annotated[Path | None, option("FILE")] = None
    """File with the name of one class a line, in the network's order: which class a folder is."""
    device: Literal["cpu", "cuda", "auto"] = "auto"
    """Where the float network computes."""
    json: bool = False
    """Print one JSON object."""

    def run(self, console: Console) -> None:
        """Do it and print the outcome."""
        found = self._measure()
        if self.json:
            print(json_format.dumps({name: value.as_dict() for name, value in found.items()}))
            return
        title = f"{self.network.model} on {self.data}"
        if any(evaluation.measures or evaluation.truths for evaluation in found.values()):
            console.print(table(title, ("network", "output", "measure", "value"), list(_measures(found))))
            return
        columns = ("network", "top-1 %", "95 % interval", "top-5 %", "agreement %", "correct", "images")
        console.print(table(title, columns, [_row(*item) for item in found.items()]))

    def _measure(self) -> dict[str, Evaluation]:
        with shown(None, quiet=False) as observer:

            def show(done: int, total: int) -> None:
                observer.update("evaluate", done, total, {})

            path = Path(self.network.model)
            if (path.is_dir() and self.network.model != "digits") or is_file_of_ours(path):
                self._check_alone()
                path = verified(file_in(path))
                file = open_file(path)
                data = self._open(file.spec)
                if not data.labelled:
                    raise InputError(
                        f"data set '{self.data}' has no labels; how often {path.name} and the float network agree on "
                        f"it is what zsq evaluate NETWORK --file {path} --data {self.data} measures."
                    )
                return evaluate_many({path.name: file}, data, outputs=file.spec.outputs, progress=show)
            place = None if self.file is None else verified(file_in(self.file))
            beside = None if place is None else open_file(place)
            teacher = self._loaded().to(pick_device(self.device))
            if beside is not None and replace(beside.spec, resize=None) != replace(teacher.spec, resize=None):
                raise InputError(f"{self.file} takes {beside.spec}, and {teacher.name} {teacher.spec}.")
            data = self._open(teacher.spec)
            networks: dict[str, Predict] = {teacher.name: teacher.network}
            if beside is None or place is None:
                if not data.labelled:
                    raise InputError(f"data set '{self.data}' has no labels; --file RUN measures agreement on it.")
                found = evaluate_many(networks, data, outputs=teacher.spec.outputs, progress=show)
                warn_of_chance(found[teacher.name], teacher.spec, data)
                return found
            networks |= {place.name: beside}
            outputs = teacher.spec.outputs
            found = evaluate_many(networks, data, teacher=teacher.network, outputs=outputs, progress=show)
            warn_of_chance(found[teacher.name], teacher.spec, data)
            return found

    def _loaded(self) -> Teacher:
        with prints_to_stderr():
            return load(self.network)

    def _open(self, spec: ImageSpec) -> DataSet:
        data = open_dataset(self.data, spec, class_names=self.class_names)
        for notice in data.notices:
            logger.info(notice)
        return data

    def _check_alone(self) -> None:
        """Refuse what is said of a network where there is none."""
        model = self.network.model
        said = {field.name: getattr(self.network, field.name) for field in fields(Network)} | {"file": self.file}
        for name, value in said.items():
            if name != "model" and value is not None:
                raise InputError(
                    f"--{name} goes with a network, and {model} is a quantized file, which knows its images; "
                    f"zsq evaluate NETWORK --file {model} measures both."
                )


def _measures(found: dict[str, Evaluation]) -> Iterator[list[str]]:
    """Yield a row a figure: first against what is true, then against the float network."""
    for name, evaluation in found.items():
        for measure in evaluation.truths:
            yield [name, measure.output, measure.name, figure(measure)]
    for name, evaluation in list(found.items())[1:]:
        for measure in evaluation.measures:
            yield [name, measure.output, f"{measure.name}, against float", figure(measure)]


def _row(name: str, found: Evaluation) -> list[str]:
    interval = "-" if found.top1_interval is None else "{:.2f} to {:.2f}".format(*found.top1_interval)
    shares = [percent(found.top1), interval, percent(found.top5), percent(found.teacher_agreement)]
    correct = "-" if found.top1_correct is None else str(found.top1_correct)
    return [name, *shares, correct, str(found.num_images)]
