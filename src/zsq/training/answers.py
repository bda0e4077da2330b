"""What a network answers, by the kind of each output: the losses and the agreement that suit it.

Answers travel as one row an image, [N, K]: a vector of logits, or all outputs one behind the other.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from zsq.errors import InputError
from zsq.training.losses import kl_divergence, soft_cross_entropy
from zsq.types import Output

SMALLEST = 1e-12
"""Keeps a quotient finite where an output is constant."""


def two_sided(logits: Tensor) -> Tensor:
    """Return logits over axis 1 of which a single one, of yes against no, has become two: 0 and itself.

    Its softmax is the sigmoid, and its class 1 where the logit is above 0.
    """
    return torch.cat([torch.zeros_like(logits), logits], dim=1) if logits.shape[1] == 1 else logits


def as_rows(logits: Tensor) -> Tensor:
    """Return logits [N, C, ...] as one row a position, [N x positions, C]."""
    return logits.movedim(1, -1).reshape(-1, logits.shape[1])


def cosine_distance(teacher: Tensor, student: Tensor) -> Tensor:
    """One minus the cosine of the angle between vectors along axis 1, [N, C, ...], averaged over all.

    Returns:
        Scalar: 0 where directions agree, 1 where they are at right angles, 2 where they are opposite.
    """
    return 1 - F.cosine_similarity(teacher, student, dim=1).mean()


def relative_squared_error(teacher: Tensor, student: Tensor) -> Tensor:
    r"""Mean squared error over the teacher's own variance, both over all values of the batch.

    .. math:: \frac{mean\,(s - t)^2}{mean\,(t - mean\,t)^2}

    Returns:
        Scalar without unit: 0 where all agree, 1 where the student gives the teacher's mean alone; 1 less R2.
    """
    return F.mse_loss(student, teacher) / teacher.var(correction=0).clamp(min=SMALLEST)


class Answers:
    """The outputs of a network, and what is computed of their values.

    Args:
        outputs: what the network gives, in order; empty for one vector of logits (the paper's case).
    """

    def __init__(self, outputs: Sequence[Output] = ()) -> None:
        self.outputs = tuple(outputs)

    def parts(self, packed: Tensor) -> list[Tensor]:
        """Return the outputs, each [N, ...], of rows [N, K]."""
        if not self.outputs:
            return [packed]
        rows = packed.split([output.size for output in self.outputs], dim=1)
        return [row.reshape(-1, *output.shape) for row, output in zip(rows, self.outputs, strict=True)]

    def class_columns(self) -> list[int]:
        """Return the first column of each output of classes."""
        if not self.outputs:
            return [0]
        starts = [sum(output.size for output in self.outputs[:index]) for index in range(len(self.outputs))]
        return [start for start, output in zip(starts, self.outputs, strict=True) if output.kind == "classes"]

    def class_logits(self, packed: Tensor) -> list[Tensor]:
        """Return the logits of each output of classes, [N, C, ...], at least two of them."""
        if not self.outputs:
            return [packed]
        pairs = zip(self.parts(packed), self.outputs, strict=True)
        return [two_sided(part) for part, output in pairs if output.kind == "classes"]

    def distances(self, teacher: Tensor, student: Tensor) -> Tensor:
        """Return how far each output of the student is from the teacher's, [outputs], float64; 0 where they agree.

        Of classes it is the KL divergence in nats, averaged over positions; of an embedding one minus the cosine; of
        values the relative squared error.

        Raises:
            InputError: shapes differ.
        """
        if teacher.shape != student.shape:
            raise InputError(f"teacher gives {tuple(teacher.shape)}, student {tuple(student.shape)}.")
        if not self.outputs:
            return kl_divergence(teacher, student)[None]
        found = []
        for output, t, s in zip(self.outputs, self.parts(teacher), self.parts(student), strict=True):
            if output.kind == "classes":
                found.append(kl_divergence(as_rows(two_sided(t)), as_rows(two_sided(s))))
            elif output.kind == "embedding":
                found.append(cosine_distance(t.double(), s.double()))
            else:
                found.append(relative_squared_error(t.double(), s.double()))
        return torch.stack(found)

    def distance(self, teacher: Tensor, student: Tensor) -> Tensor:
        """Return the sum of `distances`, a scalar."""
        return self.distances(teacher, student).sum()

    def losses(self, teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
        """Return what distillation makes small, for each output, [outputs].

        Of classes it is the cross-entropy of eq. (4) at every position; else as `distances`.

        Raises:
            InputError: shapes differ, or the temperature is not positive.
        """
        if not self.outputs:
            return soft_cross_entropy(teacher, student, temperature)[None]
        found = []
        for output, t, s in zip(self.outputs, self.parts(teacher), self.parts(student), strict=True):
            if output.kind == "classes":
                rows = as_rows(two_sided(t)), as_rows(two_sided(s))
                found.append(soft_cross_entropy(*rows, temperature))
            elif output.kind == "embedding":
                found.append(cosine_distance(t, s))
            else:
                found.append(relative_squared_error(t, s))
        return torch.stack(found)

    def named_classes(self, packed: Tensor) -> Tensor:
        """Return the class that the first output of classes names, int64 [N] or [N, ...]; zeros [N] without one."""
        logits = self.class_logits(packed)
        return logits[0].argmax(1) if logits else torch.zeros(len(packed), dtype=torch.int64, device=packed.device)

    def sameness(self, packed: Tensor) -> Tensor | None:
        """Return how alike the images of a batch are answered, a scalar; None where all outputs are of classes.

        Of an embedding it is the mean squared cosine between images; of values the share of their variance that does
        not lie between images at the same place. Both are 0 where answers differ most.
        """
        found = []
        for output, part in zip(self.outputs, self.parts(packed) if self.outputs else [], strict=True):
            if output.kind == "embedding":
                directions = F.normalize(part, dim=1).flatten(1)
                places = directions[0].numel() // part.shape[1]
                cosines = (directions @ directions.T) / places
                count = len(part)
                found.append((cosines.square().sum() - cosines.diagonal().square().sum()) / max(1, count * (count - 1)))
            elif output.kind == "values":
                rows = part.flatten(1) if part.dim() > 1 else part[:, None]
                whole = rows.var(correction=0).clamp(min=SMALLEST)
                found.append(1 - (rows.var(0, correction=0).mean() / whole).clamp(max=1))
        return torch.stack(found).sum() if found else None

    def label_loss(self, packed: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy of the first output of classes against labels, int64 [N] or [N, ...]."""
        return F.cross_entropy(self.class_logits(packed)[0], labels)

    def agreements(self, teacher: Tensor, student: Tensor) -> Tensor:
        """Return how far both agree on each image, [N, outputs], from 0 to 1.

        Of classes it is the share of positions with the same class; of an embedding the cosine, or 0 where that is
        negative; of values what the student explains of the teacher's variance on that image.
        """
        if not self.outputs:
            return (teacher.argmax(1) == student.argmax(1)).double()[:, None]
        found = []
        for output, t, s in zip(self.outputs, self.parts(teacher), self.parts(student), strict=True):
            if output.kind == "classes":
                same = two_sided(t).argmax(1) == two_sided(s).argmax(1)
                found.append(same.reshape(len(t), -1).double().mean(1))
            elif output.kind == "embedding":
                cosine = F.cosine_similarity(t.double(), s.double(), dim=1)
                found.append(cosine.reshape(len(t), -1).mean(1).clamp(min=0))
            else:
                found.append(_explained(t.double().reshape(len(t), -1), s.double().reshape(len(s), -1)))
        return torch.stack(found, dim=1)

    def agreement(self, teacher: Tensor, student: Tensor) -> Tensor:
        """Return the mean of `agreements`, a scalar in percent; for the log."""
        if not self.outputs:
            return (student.detach().argmax(1) == teacher.argmax(1)).float().mean() * 100
        return self.agreements(teacher, student.detach()).mean().float() * 100


def _explained(teacher: Tensor, student: Tensor) -> Tensor:
    """Return one minus each image's squared error over the batch's variance, [N], within [0, 1]."""
    variance = teacher.var(correction=0).clamp(min=SMALLEST)
    return (1 - (teacher - student).square().mean(1) / variance).clamp(0, 1)
