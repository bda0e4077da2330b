"""Labels that samples are asked for: a class an image, or a map of classes where a network names one at each place."""

import torch
from torch import Tensor
from torch.nn import functional as F

from zsq.training.answers import Answers, two_sided
from zsq.types import ImageSpec, Output

MAP_SIDE = 16
"""Most cells a side of a label map."""

REGIONS = 5
"""Regions of a label map, each of one class; neighbours may have the same."""


def labelled_output(spec: ImageSpec) -> Output | None:
    """Return the output that labels are of: the first of classes; None where there is none."""
    if not spec.outputs:
        return Output("logits", "classes", (spec.classes,))
    return next((output for output in spec.outputs if output.kind == "classes"), None)


def map_shape(spec: ImageSpec) -> tuple[int, ...]:
    """Return the shape of one image's label: () for a class, cells along each axis for a map."""
    output = labelled_output(spec)
    return () if output is None else tuple(min(side, MAP_SIDE) for side in output.shape[1:])


def draw_labels(spec: ImageSpec, count: int, random: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """Return uniform labels, int64 [N], or maps of a few regions, [N, ...]; zeros where the network names no class.

    A region is where a random point is nearer than the others (a Voronoi cell).
    """
    if spec.classes == 0:
        return torch.zeros(count, dtype=torch.int64, device=device)
    shape = map_shape(spec)
    if not shape:
        return torch.randint(0, spec.classes, (count,), generator=random, device=device)
    labels = torch.randint(0, spec.classes, (count, REGIONS), generator=random, device=device)
    points = torch.rand(count, REGIONS, len(shape), generator=random, device=device)
    axes = [(torch.arange(side, device=device) + 0.5) / side for side in shape]
    cells = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).view(1, -1, len(shape))
    nearest = torch.cdist(cells.expand(count, -1, -1), points).argmin(2)
    return labels.gather(1, nearest).view(count, *shape)


def maps_of(labels: Tensor, spec: ImageSpec) -> Tensor:
    """Return labels [N] as maps of one region, where the network names a class at each place."""
    shape = map_shape(spec)
    return labels.view(-1, *[1] * len(shape)).expand(-1, *shape) if labels.dim() == 1 and shape else labels


def placed(labels: Tensor, logits: Tensor) -> Tensor:
    """Return labels [N, ...] at the places of logits [N, C, ...], by the nearest cell."""
    if labels.dim() == 1:
        return labels
    return F.interpolate(labels[:, None].float(), logits.shape[2:], mode="nearest").long()[:, 0]


def class_logits(spec: ImageSpec, answers: Tensor) -> Tensor | None:
    """Return the logits [N, classes, ...] of a network's answers [N, K] that labels are of; None without classes."""
    if spec.classes == 0:
        return None
    if not spec.outputs:
        return answers
    index = spec.outputs.index(next(output for output in spec.outputs if output.kind == "classes"))
    return two_sided(Answers(spec.outputs).parts(answers)[index])


def label_terms(spec: ImageSpec, answers: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return the loss of wanted labels, `ce`, in nats, and the percentage recognised; nothing without classes.

    Args:
        spec: of the network.
        answers: the teacher's, [N, K].
        labels: int64 [N] or maps [N, ...], as `draw_labels` makes them.
    """
    logits = class_logits(spec, answers)
    if logits is None:
        return {}
    wanted = placed(labels, logits)
    recognised = (logits.detach().argmax(1) == wanted).float().mean() * 100
    return {"ce": F.cross_entropy(logits, wanted), "label_recognition": recognised}
