"""The Knowledge Within: four ways to samples without data (Haroush, Hubara, Hoffer, Soudry 2020, section 3)."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from zsq.checked import Factor
from zsq.methods.image_optimization import Inversion, InversionSource
from zsq.methods.labels import label_terms
from zsq.models.teacher import Teacher
from zsq.training.loop import Run
from zsq.training.losses import reversed_bns_loss, smoothness

LEARNING_RATE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class KnowledgeWithin(Inversion):
    """Optimise pixels for stored batch-norm statistics, wanted labels, both, or not at all."""

    name: ClassVar[str] = "knowledge-within"
    summary: ClassVar[str] = "pixels by reversed KL of statistics, by labels, or by both"

    scheme: Literal["gaussian", "inception", "bns", "bns+inception"] = "bns+inception"
    """Plain noise; images of wanted labels; images with the stored statistics; both."""
    bns_weight: Factor = 1.0
    """Factor of the statistics loss."""
    ce_weight: Factor = 1.0
    """Factor of the label cross-entropy."""
    smoothness_weight: Factor = 1.0
    """Factor of the smoothness prior that goes with the labels."""

    def source(self, teacher: Teacher, run: Run) -> "KnowledgeWithinSource":
        """Make the source; with scheme `gaussian`, one step makes one batch."""
        still = replace(self, steps=self.batches, iterations=1) if self.scheme == "gaussian" else self
        return KnowledgeWithinSource(still, teacher, run)


class KnowledgeWithinSource(InversionSource):
    """Images of one of the schemes; without `inception` in it, labels are drawn and mean nothing."""

    def __init__(self, settings: KnowledgeWithin, teacher: Teacher, run: Run) -> None:
        self.asks_labels = "inception" in settings.scheme and teacher.spec.classes > 0
        weights = {"bns": settings.bns_weight if "bns" in settings.scheme else 0.0}
        if self.asks_labels:
            weights |= {"ce": settings.ce_weight, "smoothness": settings.smoothness_weight}
        super().__init__(settings, teacher, run, learning_rate=settings.learning_rate or LEARNING_RATE, weights=weights)

    def losses(
        self, images: Tensor, logits: Tensor, moments: list[tuple[Tensor, Tensor]], labels: Tensor
    ) -> dict[str, Tensor]:
        """Return the statistics loss, which every scheme logs, and where labels are wanted theirs and the prior."""
        teacher = self.teacher
        found = {"bns": reversed_bns_loss(moments, teacher.target_mean, teacher.target_var, teacher.eps)}
        if self.asks_labels:
            found |= label_terms(self.spec, logits, labels) | {"smoothness": smoothness(images)}
        return found
