"""The verb that measures a file, a float network, or both."""

import json as json_format
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console
from tyro.conf import OmitArgPrefixes, Positional, arg

from zsq.cli.output import prints_to_stderr
from zsq.data.datasets import DataSet, open_dataset
from zsq.errors import InputError
from zsq.evaluation.accuracy import Evaluation, Predict, evaluate_many
from zsq.evaluation.measures import Decoder
from zsq.export.files import is_file_of_ours, open_file
from zsq.models.network import Network
from zsq.models.options import option
from zsq.models.teacher import Teacher, load
from zsq.reports.text_tables import EMPTY, percent, table
from zsq.runs.boxes import own_decoder
from zsq.runs.console import shown
from zsq.runs.folder import file_in
from zsq.runs.record import verified
from zsq.runs.settings_file import SETTINGS, stored_facts
from zsq.runs.stages import warn_of_chance
from zsq.runs.stored_network import is_run, stored_network
from zsq.runs.summary import figure
from zsq.runtime.device import pick_device
from zsq.types import ImageSpec

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Is told how many images of how many are done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedNetwork(Network):
    """A network, or what a run has made of one."""

    model: Annotated[Positional[str], arg(help_behavior_hint="")] = ""
    """Folder of a run, its file, or a network as for `zsq quantize`. Unset, the network of --file's run."""


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure a quantized file, a float network, or both side by side: top-1, top-5 and agreement, or what suits maps,
    embeddings and values.

    Examples:
      zsq evaluate runs/digits --data digits
      zsq evaluate runs/digits/model.onnx --data digits --json
      zsq evaluate --file runs/digits --data digits
    """

    network: Annotated[EvaluatedNetwork, arg(name=""), OmitArgPrefixes]
    file: Annotated[Path | None, option("FILE")] = None
    """Folder of a run or its file that is compared with the network, by default with the run's own."""
    data: Annotated[str, option("SET", required=True)]
    """Images: digits, FILE.npz, or a folder with metadata.csv, with one folder a class, or of images without labels."""
    class_names: Annotated[Path | None, option("FILE")] = None
    """File with the name of one class a line, in the network's order: which class a folder is."""
    decode: Annotated[str | None, option("FILE.py:FUNCTION")] = None
    """What reads boxes from the outputs, or MODULE:FUNCTION: it is given each output, NumPy [N, ...], in order, and
    returns an array for each image, [boxes, 6]: left, top, right, bottom in pixels, score, class. The .npz of --data
    then holds `boxes` [N, M, 5], corners and class (below 0: none), and AP50 is measured."""
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
        title = f"{self.network.model or self.file} on {self.data}"
        if any(evaluation.measures or evaluation.truths for evaluation in found.values()):
            console.print(table(title, ("network", "output", "measure", "value"), list(_measures(found))))
            return
        console.print(table(title, ("", *found), _figures(list(found.values()))))

    def _measure(self) -> dict[str, Evaluation]:
        if not self.network.model and self.file is None:
            raise InputError("what is to be evaluated? Give a run's folder, its file, or a network.")
        with shown(None, quiet=False) as observer:

            def show(done: int, total: int) -> None:
                observer.update("evaluate", done, total, {})

            path = Path(self.network.model)
            if self.network.model and ((path.is_dir() and path.name != "digits") or is_file_of_ours(path)):
                return self._of_run(verified(file_in(path)), show)
            if self.file is None:
                return self._of_network(self._loaded(), None, show)
            place = verified(file_in(self.file))
            return self._of_network(self._float(place), place, show)

    def _of_run(self, place: Path, show: Progress) -> dict[str, Evaluation]:
        """Measure a run's file on labelled images, and how often it agrees with its float network on others."""
        file = open_file(place)
        data = self._open(file.spec, place)
        if data.labelled or not is_run(place.parent):
            self._check_alone(data)
            found = evaluate_many(
                {place.name: file}, data, outputs=file.spec.outputs, decoder=self._decoder(file.spec), progress=show
            )
            warn_of_chance(found[place.name], file.spec, data, place.name)
            return found
        return self._of_network(self._stored(place), place, show, data)

    def _of_network(
        self, teacher: Teacher, place: Path | None, show: Progress, data: DataSet | None = None
    ) -> dict[str, Evaluation]:
        """Measure a float network, and beside it the file at a place, on the data, which may be open already."""
        teacher = teacher.to(pick_device(self.device))
        beside = None if place is None else open_file(place)
        if beside is not None and replace(beside.spec, resize=None) != replace(teacher.spec, resize=None):
            raise InputError(f"{place} takes {beside.spec}, and {teacher.name} {teacher.spec}.")
        data = data or self._open(teacher.spec, place)
        networks: dict[str, Predict] = {teacher.name: teacher.network}
        if beside is None and not data.labelled:
            raise InputError(f"data set '{self.data}' has no labels; --file RUN measures agreement on it.")
        if beside is not None and place is not None:
            networks |= {place.name: beside}
        against = None if beside is None else teacher.network
        outputs, decoder = teacher.spec.outputs, self._decoder(teacher.spec)
        found = evaluate_many(networks, data, teacher=against, outputs=outputs, decoder=decoder, progress=show)
        warn_of_chance(found[teacher.name], teacher.spec, data)
        return found

    def _decoder(self, spec: ImageSpec) -> Decoder | None:
        """Return what reads boxes from the outputs."""
        if self.decode is None:
            return None
        return own_decoder(self.decode, spec)

    def _float(self, place: Path) -> Teacher:
        """Return the network that is named, or that of the run of a file."""
        return self._loaded() if self.network.model else self._stored(place)

    def _stored(self, place: Path) -> Teacher:
        """Return the float network of the run of a file, with what is said of it anew."""
        network = stored_network(place.parent / SETTINGS, replace(self.network, model=""))
        with prints_to_stderr():
            return network.load()

    def _loaded(self) -> Teacher:
        with prints_to_stderr():
            return load(self.network)

    def _open(self, spec: ImageSpec, place: Path | None) -> DataSet:
        names: Path | tuple[str, ...] | None = self.class_names
        if names is None and place is not None and is_run(place.parent):
            names = tuple(stored_facts(place.parent).get("class_names", ())) or None
        data = open_dataset(self.data, spec, class_names=names, boxes=self.decode is not None)
        for notice in data.notices:
            logger.info(notice)
        return data

    def _check_alone(self, data: DataSet) -> None:
        """Refuse what is said of a network where there is none."""
        model = self.network.model
        said = {field.name: getattr(self.network, field.name) for field in fields(Network)} | {"file": self.file}
        for name, value in said.items():
            if name != "model" and value is not None:
                raise InputError(
                    f"--{name} goes with a network, and {model} is a quantized file, which knows its images; "
                    f"zsq evaluate NETWORK --file {model} measures both."
                )
        if not data.labelled:
            raise InputError(
                f"data set '{self.data}' has no labels, and {model} lies in no run's folder, which would know its "
                f"float network; zsq evaluate NETWORK --file {model} --data {self.data} measures how often both agree."
            )


def _measures(found: dict[str, Evaluation]) -> Iterator[list[str]]:
    """Yield a row a figure: first against what is true, then against the float network."""
    for name, evaluation in found.items():
        for measure in evaluation.truths:
            yield [name, measure.output, measure.name, figure(measure)]
    for name, evaluation in list(found.items())[1:]:
        for measure in evaluation.measures:
            yield [name, measure.output, f"{measure.name}, against float", figure(measure)]


def _figures(found: Sequence[Evaluation]) -> Iterator[list[str]]:
    """Yield a row a figure, with its name; none where nothing is known. Of several, the first is the float network."""
    agreements = [(e.teacher_agreement, e.agreement_interval) for e in found]
    if len(found) > 1:
        agreements[0] = (None, None)  # it agrees with itself
    rows = (
        ("top-1 %", [percent(e.top1) for e in found]),
        ("  95 % interval", [_reach(e.top1_interval) for e in found]),
        ("top-5 %", [percent(e.top5) for e in found]),
        ("agreement with float %", [percent(share) for share, _ in agreements]),
        ("  95 % interval", [_reach(interval) for _, interval in agreements]),
        ("correct", [EMPTY if e.top1_correct is None else str(e.top1_correct) for e in found]),
        ("images", [str(e.num_images) for e in found]),
    )
    for name, cells in rows:
        if set(cells) != {EMPTY}:
            yield [name, *cells]


def _reach(interval: tuple[float, float] | None) -> str:
    return EMPTY if interval is None else "{:.2f} to {:.2f}".format(*interval)
