"""Accuracy: top-1 and top-5 with their counts, a confidence interval, and agreement with the teacher."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from pydantic import ConfigDict
from torch import Tensor, nn

from zsq.errors import InputError, NumericsError
from zsq.evaluation.measures import (
    AGREEMENT,
    CONFIDENCE_Z,
    BoxTally,
    Decoder,
    Measure,
    TeacherTally,
    TruthTally,
    mean_interval,
)
from zsq.runtime.gpu import full_float32
from zsq.types import Batch, Output

Predict = Callable[[Tensor], Tensor]
"""A network, simulation or runtime: normalised images [N, C, H, W] to logits [N, classes], or to all outputs in one row
an image, [N, K]."""

TOP_K = 5


class ImageSet(Protocol):
    """Images in batches, such as `DataSet`; those without a class have the label -1."""

    @property
    def num_images(self) -> int:
        """Images that `batches` yields; for the progress that is shown."""
        ...

    @property
    def labelled(self) -> bool:
        """Whether the labels are what is true of the images."""
        ...

    def batches(self, batch_size: int = 100) -> Iterator[Batch]:
        """Yield all of them, the same ones at each call."""
        ...


@dataclass(frozen=True, slots=True)
class Difference:
    """How much more of the same images one network recognises than another, in percentage points."""

    mean: float
    """First minus second, from -100 to 100."""
    low: float
    high: float
    """Ends of the 95 % interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What a network recognised of a data set; every share is in percent (0 to 100)."""

    __pydantic_config__ = ConfigDict(arbitrary_types_allowed=True)  # arrays, where a record is read

    num_images: int
    """Images evaluated."""
    top1_correct: int | None
    """Images whose largest logit is the label's; None where no image has a label."""
    top5_correct: int | None
    """Images whose label is among the five largest logits; None for fewer than five classes, or without labels."""
    agreement_count: int | None = None
    """Images for which the network and the teacher name the same class; None without a teacher."""
    predictions: np.ndarray | None = field(default=None, repr=False, compare=False)
    """Class that the network names for each image, int32 [num_images]."""
    labels: np.ndarray | None = field(default=None, repr=False, compare=False)
    """True class of each image, int32 [num_images]."""
    agreement: tuple[float, float | None, float | None] | None = None
    """How far it agrees with the teacher, from 0 to 1, averaged over images and outputs, with the ends of the 95 %
    interval, where a network gives something else than one vector of logits (`Answers.agreements`)."""
    measures: tuple[Measure, ...] = ()
    """The same in the measures of each output."""
    minus_float: Difference | None = None
    """How much more of the same images it recognises than the float network; None without labels."""
    truths: tuple[Measure, ...] = ()
    """How near it is to what is true of the images, where that is known."""
    scores: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    """Those of these measures that are means over images, and `agreement`, as one value an image, from 0 to 1, float32
    [num_images], where a network gives something else than one vector of logits."""

    @property
    def top1(self) -> float | None:
        """Top-1 accuracy in percent; None without labels."""
        return None if self.top1_correct is None else 100 * self.top1_correct / self.num_images

    @property
    def top5(self) -> float | None:
        """Top-5 accuracy in percent; None for fewer than five classes, or without labels."""
        return None if self.top5_correct is None else 100 * self.top5_correct / self.num_images

    @property
    def top1_interval(self) -> tuple[float, float] | None:
        """95 % Wilson interval of the top-1 accuracy, in percent; None without labels."""
        return None if self.top1_correct is None else wilson_interval(self.top1_correct, self.num_images)

    @property
    def teacher_agreement(self) -> float | None:
        """Share of images on which the network agrees with the teacher, in percent; None without a teacher.

        Of other outputs than one vector of logits it is the mean of `agreement`.
        """
        if self.agreement is not None:
            return 100 * self.agreement[0]
        return None if self.agreement_count is None else 100 * self.agreement_count / self.num_images

    @property
    def agreement_interval(self) -> tuple[float, float] | None:
        """95 % interval of the agreement, in percent (Wilson's for counts); None without a teacher."""
        if self.agreement is not None:
            _, low, high = self.agreement
            return None if low is None or high is None else (100 * max(low, 0.0), 100 * min(high, 1.0))
        return None if self.agreement_count is None else wilson_interval(self.agreement_count, self.num_images)

    def score(self, name: str) -> Measure:
        """Return a measure of `scores_of` by its name."""
        if name == "top-1" and self.top1 is not None and self.top1_interval is not None:
            return Measure("", name, self.top1 / 100, *(end / 100 for end in self.top1_interval))
        if name == AGREEMENT and self.agreement is not None:
            return Measure("", name, *self.agreement)
        return next(measure for measure in self.truths if measure.name == name)

    def as_dict(self) -> dict[str, Any]:
        """Return counts and percentages as plain values, for a JSON record."""
        return {
            "num_images": self.num_images,
            "top1_correct": self.top1_correct,
            "top5_correct": self.top5_correct,
            "agreement_count": self.agreement_count,
            "top1": self.top1,
            "top1_interval": None if self.top1_interval is None else list(self.top1_interval),
            "top5": self.top5,
            "teacher_agreement": self.teacher_agreement,
            "agreement_interval": None if self.agreement_interval is None else list(self.agreement_interval),
            "minus_float": None if self.minus_float is None else asdict(self.minus_float),
        } | self._of_outputs()

    def _of_outputs(self) -> dict[str, Any]:
        """Return what only networks have that give something else than one vector of logits."""
        found: dict[str, Any] = {"agreement": None if self.agreement is None else list(self.agreement)}
        found |= {name: [asdict(m) for m in getattr(self, name)] for name in ("measures", "truths")}
        return {name: value for name, value in found.items() if value}


def wilson_interval(correct: int, count: int) -> tuple[float, float]:
    r"""95 % confidence interval of a share, in percent.

    .. math:: \frac{\hat p + \frac{z^2}{2n} \pm z \sqrt{\frac{\hat p (1 - \hat p)}{n} + \frac{z^2}{4 n^2}}}{1 + z^2/n}

    Args:
        correct: successes, 0 to `count`.
        count: trials, at least 1.
    Source: Wilson, Probable inference, the law of succession, and statistical inference, 1927.

    >>> [round(bound, 2) for bound in wilson_interval(8, 10)]
    [49.02, 94.33]
    """
    share, z = correct / count, CONFIDENCE_Z
    middle = share + z * z / (2 * count)
    reach = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    low = 0.0 if correct == 0 else (middle - reach) / scale
    high = 1.0 if correct == count else (middle + reach) / scale
    return 100 * low, 100 * high


def paired_difference(first: np.ndarray, second: np.ndarray) -> Difference:
    r"""Return the mean of the per-image differences and its 95 % interval.

    .. math:: \tilde d \pm z \sqrt{\frac{s^2}{n + 2}}, \quad \tilde d = \frac{\sum_i d_i}{n + 2},
        \quad s^2 = \frac{2 + \sum_i d_i^2}{n + 2} - \tilde d^2, \quad d_i = a_i - b_i

    Both networks saw the same images, so what makes an image easy for both cancels. Two more images, of which each
    network alone recognises one, keep the interval honest where the two hardly differ on few images. Where a network
    was trained with several seeds, each a_i is the mean over them; the interval is about other images, not about other
    seeds.

    Args:
        first, second: score of image i, such as the share of the seeds with which it was recognised, from 0 to 1, each
            [n], n at least 2.
    Raises:
        InputError: the two are not of one length of at least 2.
    Source: Bonett and Price, Adjusted Wald confidence interval for a difference of binomial proportions based on paired
    data, 2012.

    >>> found = paired_difference(np.array([1, 1, 1, 0]), np.array([1, 0, 1, 0]))
    >>> found.mean, round(found.low, 2), round(found.high, 2)
    (25.0, -38.32, 71.65)
    """
    if first.shape != second.shape or first.ndim != 1 or len(first) < 2:
        raise InputError(
            f"results on {list(first.shape)} and {list(second.shape)} images; two on the same images, 2 at least, "
            "can be compared."
        )
    differences = first.astype(np.float64) - second.astype(np.float64)
    count = len(differences) + 2
    middle = float(differences.sum()) / count
    variance = (2 + float(np.square(differences).sum())) / count - middle * middle
    reach = CONFIDENCE_Z * math.sqrt(variance / count)
    low, high = max(-1.0, middle - reach), min(1.0, middle + reach)
    return Difference(100 * float(differences.mean()), 100 * low, 100 * high)


def beside_float(found: Evaluation, floats: Evaluation) -> Evaluation:
    """Return results with their difference to the float network's, image by image, where labels are known."""
    if found.top1_correct is None or floats.top1_correct is None or found.num_images < 2:
        return found
    hits = []
    for results in (found, floats):
        assert results.predictions is not None
        assert results.labels is not None
        hits.append(results.predictions == results.labels)
    return replace(found, minus_float=paired_difference(*hits))


def evaluate(
    predict: Predict,
    data: ImageSet,
    *,
    teacher: Predict | None = None,
    outputs: Sequence[Output] = (),
    decoder: Decoder | None = None,
    batch_size: int = 100,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Return the accuracy of one network on a data set, streamed in batches.

    Args:
        predict: images [N, C, H, W] to logits [N, classes]; a module gets its images on its own device.
        data: the images; without labels, agreement alone is measured.
        teacher: the float network, for the agreement.
        outputs: what the networks give, where it is not one vector of logits; then agreement alone is measured.
        decoder: reads boxes from the outputs; the data then say which there are.
        batch_size: images a batch.
        progress: called at first and after each batch with the images done and the images in all.

    Raises:
        InputError: the logits are not one row an image.
        NumericsError: a logit is not finite.
    """
    networks = {"network": predict}
    found = evaluate_many(
        networks,
        data,
        teacher=teacher,
        outputs=outputs,
        decoder=decoder,
        batch_size=batch_size,
        progress=progress,
    )
    return found["network"]


def evaluate_many(
    predictors: dict[str, Predict],
    data: ImageSet,
    *,
    teacher: Predict | Evaluation | None = None,
    outputs: Sequence[Output] = (),
    decoder: Decoder | None = None,
    batch_size: int = 100,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Evaluation]:
    """Return the accuracy of several networks, by name, in one pass over the data; otherwise as `evaluate`.

    A teacher that is one of them is asked once. A classifier that was evaluated on the same data before may be given as
    its `Evaluation`.
    """
    counts: dict[str, _Tallies | _Counts] = {
        name: _Tallies(outputs, known=data.labelled, decoder=decoder) if outputs else _Counts(data.num_images)
        for name in predictors
    }
    done = 0
    show = progress or (lambda done, total: None)
    show(done, data.num_images)
    with torch.no_grad():
        for batch in data.batches(batch_size):
            answered: Tensor | None = None
            if isinstance(teacher, Evaluation):
                assert teacher.predictions is not None
                told: Tensor | None = torch.from_numpy(teacher.predictions[done : done + len(batch.labels)])
            else:
                answered = None if teacher is None else _logits("teacher", teacher, batch.images)
                told = answered if answered is None or outputs else answered.argmax(1)
            for name, predict in predictors.items():
                known = answered if predict is teacher else None
                logits = _logits(name, predict, batch.images) if known is None else known
                counts[name].add(logits, batch.labels.cpu(), told)
            done += len(batch.labels)
            show(done, data.num_images)
    return {name: count.evaluation() for name, count in counts.items()}


class _Counts:
    """What is counted of one vector of logits.

    Args:
        expected: images in all; their classes are written to one block, since small ones that stay would keep the
            memory of each batch from being used again.
    """

    def __init__(self, expected: int) -> None:
        self.num_images = 0
        self.top1: int | None = 0
        self.top5: int | None = 0
        self.agreement: int | None = 0
        self.predictions, self.labels = np.empty((2, expected), np.int32)

    def add(self, logits: Tensor, labels: Tensor, told: Tensor | None) -> None:
        guess = logits.argmax(1)
        rows = slice(self.num_images, self.num_images + len(labels))
        self.predictions[rows], self.labels[rows] = guess.numpy(), labels.numpy()
        self.num_images += len(labels)
        known = bool((labels >= 0).all())
        if self.top1 is not None and known:
            self.top1 += int((guess == labels).sum())
        else:
            self.top1 = None
        if self.top5 is not None and known and logits.shape[1] >= TOP_K:
            self.top5 += int((logits.topk(TOP_K, dim=1).indices == labels[:, None]).sum())
        else:
            self.top5 = None
        if self.agreement is not None and told is not None:
            self.agreement += int((guess == told).sum())
        else:
            self.agreement = None

    def evaluation(self) -> Evaluation:
        return Evaluation(
            num_images=self.num_images,
            top1_correct=self.top1,
            top5_correct=self.top5,
            agreement_count=self.agreement,
            predictions=self.predictions[: self.num_images],
            labels=self.labels[: self.num_images],
        )


class _Tallies:
    """What is counted where a network gives something else than one vector of logits.

    Args:
        outputs: what it gives.
        known: whether labels are what is true of the images.
        decoder: reads boxes, where those are what is true.
    """

    def __init__(self, outputs: Sequence[Output], *, known: bool, decoder: Decoder | None = None) -> None:
        self.num_images, self.teacher, self.told = 0, TeacherTally(outputs), False
        self.truth, self.known = BoxTally(outputs, decoder) if decoder else TruthTally(outputs), known

    def add(self, answers: Tensor, labels: Tensor, told: Tensor | None) -> None:
        self.num_images += len(labels)
        if self.known:
            self.truth.add(answers, labels)
        if told is not None:
            self.told = True
            self.teacher.add(answers, told)

    def evaluation(self) -> Evaluation:
        agreements = torch.cat(self.teacher.agreements) if self.told else None
        scores = self.truth.scores() if self.known else {}
        scores |= {} if agreements is None else {AGREEMENT: agreements}
        return Evaluation(
            num_images=self.num_images,
            top1_correct=None,
            top5_correct=None,
            agreement=None if agreements is None else mean_interval(agreements),
            scores={name: values.float().numpy() for name, values in scores.items()},
            measures=self.teacher.measures() if self.told else (),
            truths=self.truth.measures() if self.known else (),
        )


def _logits(name: str, predict: Predict, images: Tensor) -> Tensor:
    if isinstance(predict, nn.Module):
        first = next(predict.parameters(), None)
        images = images if first is None else images.to(first.device)
    with full_float32():
        logits = torch.as_tensor(predict(images)).cpu()
    if logits.dim() != 2 or len(logits) != len(images):
        raise InputError(f"{name} gives {list(logits.shape)} for {len(images)} images; [N, classes] is needed.")
    if not bool(torch.isfinite(logits).all()):
        raise NumericsError(f"{name} gives logits that are not finite.")
    return logits
