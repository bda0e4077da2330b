"""How near a network's answers are to another's, or to what is true, in the measures that suit each kind of output."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from zsq.data.shapes import average_precision
from zsq.errors import InputError
from zsq.graph.trace import FOREIGN_FAULTS, described
from zsq.training.answers import SMALLEST, Answers, two_sided
from zsq.types import Output

CONFIDENCE_Z = 1.959963984540054
"""Two-sided 95 % quantile of the standard normal."""

AGREEMENT = "agreement"
"""The score of a file where nothing is known of the images: how far it agrees with the float network."""


@dataclass(frozen=True, slots=True)
class Measure:
    """One figure of one output."""

    output: str
    """Name of the output."""
    name: str
    """`same class`, `top-1` and `pixel accuracy` (shares of images or positions), `mean IoU`, `cosine`,
    `relative error`, `R2`, `verification accuracy` (of pairs), `AP50` (of boxes, the mean over classes)."""
    value: float
    """From 0 to 1 where the name does not say otherwise; 1 is best, but for `relative error`, where 0 is."""
    low: float | None = None
    high: float | None = None
    """Ends of its 95 % interval over other images; None where there is none."""


BY_IMAGE = ("top-1", "pixel accuracy", AGREEMENT)
"""Measures of `scores_of` that are means over images, so that two files can be compared image by image."""


def scores_of(outputs: Sequence[Output], *, known: bool, boxes: bool = False) -> tuple[str, ...]:
    """Return the measures by which files of a network may be compared, of which more is better; the first suits most.

    Args:
        outputs: what the network gives; empty for one vector of logits.
        known: whether it is known what is true of the images.
        boxes: whether boxes are.
    """
    if not outputs:
        return ("top-1",) if known else ()
    if not known:
        return (AGREEMENT,)
    if boxes:
        return "AP50", AGREEMENT
    output = outputs[judged(outputs)]
    if output.kind == "classes":
        return ("pixel accuracy", "mean IoU", AGREEMENT) if len(output.shape) > 1 else ("top-1", AGREEMENT)
    return ("verification accuracy" if output.kind == "embedding" else "R2"), AGREEMENT


def judged(outputs: Sequence[Output]) -> int:
    """Return which output is compared with what is true: the first of classes, or the first."""
    kinds = [output.kind for output in outputs]
    return kinds.index("classes") if "classes" in kinds else 0


def mean_interval(values: Tensor) -> tuple[float, float | None, float | None]:
    """Return the mean of one value an image, [N], and the ends of its 95 % interval; None for a single image."""
    mean = float(values.mean())
    if len(values) < 2:
        return mean, None, None
    reach = CONFIDENCE_Z * float(values.std(correction=1)) / math.sqrt(len(values))
    return mean, mean - reach, mean + reach


def mean_iou(confusion: Tensor) -> float:
    """Return intersection over union, averaged over the classes that either side names, of counts [C, C]."""
    hits = confusion.diagonal().double()
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    known = union > 0
    return float((hits[known] / union[known]).mean()) if bool(known.any()) else 0.0


@dataclass(slots=True)
class ClassTally:
    """Counts of classes named by one side and the other, at every position of many images.

    Args:
        classes: number of classes.
    """

    classes: int
    confusion: Tensor = field(init=False)
    shares: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.confusion = torch.zeros(self.classes, self.classes, dtype=torch.int64)

    def add(self, named: Tensor, wanted: Tensor) -> None:
        """Count two maps of classes, int64 [N, ...] each; what is wanted outside of the classes is left out."""
        named, wanted = (side.reshape(len(side), -1).cpu() for side in (named, wanted))
        known = (wanted >= 0) & (wanted < self.classes)
        pairs = wanted[known] * self.classes + named[known]
        self.confusion += torch.bincount(pairs, minlength=self.classes**2).view(self.classes, self.classes)
        self.shares.append(((named == wanted) & known).double().sum(1) / known.double().sum(1).clamp(min=1))

    def measures(self, output: str, share: str, *, dense: bool) -> list[Measure]:
        """Return the share of positions, under this name, and for maps the mean IoU."""
        found = [Measure(output, share, *mean_interval(torch.cat(self.shares)))]
        return [*found, Measure(output, "mean IoU", mean_iou(self.confusion))] if dense else found


@dataclass(slots=True)
class ValueTally:
    """Sums of squares of values and of their errors."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    errors: float = 0.0

    def add(self, found: Tensor, wanted: Tensor) -> None:
        """Add values of one shape."""
        found, wanted = found.double(), wanted.double()
        self.count += wanted.numel()
        self.total += float(wanted.sum())
        self.squares += float(wanted.square().sum())
        self.errors += float((found - wanted).square().sum())

    @property
    def relative(self) -> float:
        """Squared error over the variance of what is wanted."""
        mean = self.total / self.count
        return self.errors / max(SMALLEST, self.squares - self.count * mean * mean)


class TeacherTally:
    """How near a network's answers are to the teacher's, over a data set.

    Args:
        outputs: what both give; not empty.
    """

    def __init__(self, outputs: Sequence[Output]) -> None:
        self.answers = Answers(outputs)
        self.classes = {o.name: ClassTally(o.classes) for o in outputs if o.kind == "classes"}
        self.values = {o.name: ValueTally() for o in outputs if o.kind == "values"}
        self.cosines: dict[str, list[Tensor]] = {o.name: [] for o in outputs if o.kind == "embedding"}
        self.agreements: list[Tensor] = []

    def add(self, answers: Tensor, told: Tensor) -> None:
        """Add a batch of both, [N, K]."""
        self.agreements.append(self.answers.agreements(told, answers).mean(1))
        parts = zip(self.answers.outputs, self.answers.parts(answers), self.answers.parts(told), strict=True)
        for output, found, wanted in parts:
            if output.kind == "classes":
                self.classes[output.name].add(two_sided(found).argmax(1), two_sided(wanted).argmax(1))
            elif output.kind == "values":
                self.values[output.name].add(found, wanted)
            else:
                cosine = F.cosine_similarity(found.double(), wanted.double(), dim=1)
                self.cosines[output.name].append(cosine.flatten(1).mean(1) if cosine.dim() > 1 else cosine)

    def measures(self) -> tuple[Measure, ...]:
        """Return the figures of each output, in order."""
        found: list[Measure] = []
        for output in self.answers.outputs:
            if output.kind == "classes":
                dense = len(output.shape) > 1
                found += self.classes[output.name].measures(output.name, "same class", dense=dense)
            elif output.kind == "values":
                found.append(Measure(output.name, "relative error", math.sqrt(self.values[output.name].relative)))
            else:
                found.append(Measure(output.name, "cosine", *mean_interval(torch.cat(self.cosines[output.name]))))
        return tuple(found)


Decoder = Callable[..., Sequence[np.ndarray]]
"""Reads boxes: a network's outputs, each [N, ...], to an array an image, [M, 6]: left, top, right, bottom in pixels,
score, class."""

BOX_VALUES = 6
"""Numbers of a box that a decoder reads."""


class BoxTally:
    """How well boxes are found, over a data set.

    Args:
        outputs: what the network gives; not empty.
        decoder: reads boxes from them.
    """

    def __init__(self, outputs: Sequence[Output], decoder: Decoder) -> None:
        self.answers, self.decoder = Answers(outputs), decoder
        self.found: list[np.ndarray] = []
        self.truth: list[np.ndarray] = []

    def add(self, answers: Tensor, truth: Tensor) -> None:
        """Add a batch of answers [N, K] and the boxes there are, [N, M, 5]: corners and class, below 0 for none.

        Raises:
            InputError: the decoder fails, or gives something else than boxes.
        """
        parts = [part.float().numpy() for part in self.answers.parts(answers)]
        try:
            found = [np.asarray(boxes, np.float32) for boxes in self.decoder(*parts)]
        except FOREIGN_FAULTS as error:
            raise InputError(f"the decoder fails on {len(answers)} images: {described(error)}") from error
        shapes = [boxes.shape for boxes in found]
        if len(found) != len(answers) or any(len(shape) != 2 or shape[1] != BOX_VALUES for shape in shapes):
            raise InputError(
                f"the decoder gives {len(found)} arrays ({', '.join(map(str, shapes[:3]))}) for {len(answers)} images; "
                "one [boxes, 6] an image is needed: left, top, right, bottom, score, class."
            )
        self.found += found
        self.truth += list(truth.numpy())

    def scores(self) -> dict[str, Tensor]:
        """Return nothing: the average precision is no mean over images."""
        return {}

    def measures(self) -> tuple[Measure, ...]:
        """Return the average precision at an overlap of a half."""
        most = max(len(boxes) for boxes in self.truth)
        rows = np.stack([np.pad(b, ((0, most - len(b)), (0, 0)), constant_values=-1) for b in self.truth])
        return (Measure("boxes", "AP50", average_precision(self.found, rows[..., :4], rows[..., 4])),)


class TruthTally:
    """How near a network's first output that can be judged is to what is true, over a data set.

    Of classes the labels are maps or vectors of classes, below 0 where unknown; of an embedding they say who is the
    same; of values they are values.

    Args:
        outputs: what the network gives; not empty.
    """

    def __init__(self, outputs: Sequence[Output]) -> None:
        self.answers, self.index = Answers(outputs), judged(outputs)
        self.output = outputs[self.index]
        self.classes, self.values = ClassTally(max(1, self.output.classes)), ValueTally()
        self.vectors: list[Tensor] = []
        self.identities: list[Tensor] = []

    def add(self, answers: Tensor, truth: Tensor) -> None:
        """Add a batch of answers [N, K] and what is true of it."""
        found = self.answers.parts(answers)[self.index]
        if self.output.kind == "classes":
            named = two_sided(found).argmax(1)
            if named.dim() > 1 and named.shape != truth.shape:
                named = F.interpolate(named[:, None].float(), truth.shape[1:], mode="nearest").long()[:, 0]
            self.classes.add(named, truth)
        elif self.output.kind == "embedding":
            self.vectors.append(F.normalize(found.double(), dim=1).flatten(1).cpu())
            self.identities.append(truth.cpu())
        else:
            self.values.add(found.reshape(truth.shape), truth)

    @property
    def share(self) -> str:
        """What the share of positions with the right class is called."""
        return "pixel accuracy" if len(self.output.shape) > 1 else "top-1"

    def scores(self) -> dict[str, Tensor]:
        """Return the measures that are means over images, by name, as one value an image, [N]."""
        return {self.share: torch.cat(self.classes.shares)} if self.output.kind == "classes" else {}

    def measures(self) -> tuple[Measure, ...]:
        """Return the figures of the output."""
        name = self.output.name
        if self.output.kind == "classes":
            return tuple(self.classes.measures(name, self.share, dense=len(self.output.shape) > 1))
        if self.output.kind == "values":
            error = self.values.relative
            return (Measure(name, "R2", 1 - error), Measure(name, "relative error", math.sqrt(error)))
        return verification_measures(name, torch.cat(self.vectors), torch.cat(self.identities))


def verification_measures(output: str, vectors: Tensor, identities: Tensor) -> tuple[Measure, ...]:
    """Return how well cosines tell pairs of the same identity from pairs of two, at the best threshold.

    All pairs of the same identity are taken, and as many others, drawn evenly.

    Args:
        output: name of the output.
        vectors: of unit length, [N, D].
        identities: int64 [N].
    """
    first, second = torch.triu_indices(len(vectors), len(vectors), 1)
    alike = identities[first] == identities[second]
    same, others = (torch.nonzero(where).flatten() for where in (alike, ~alike))
    count = min(len(same), len(others))
    if count == 0:
        return ()
    chosen = torch.cat([values[(torch.arange(count) * len(values)) // count] for values in (same, others)])
    cosines, wanted = (vectors[first[chosen]] * vectors[second[chosen]]).sum(1), alike[chosen]
    order = cosines.argsort(descending=True)
    right = wanted[order].long().cumsum(0) + count - (~wanted[order]).long().cumsum(0)
    return (Measure(output, "verification accuracy", float(right.max().clamp(min=count)) / (2 * count)),)
