"""ZS-CGAN: a conditional generator learnt from nothing but the teacher (Choi, El-Khamy, Lee, section 2.2)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from zsq.checked import Count, Factor
from zsq.errors import InputError
from zsq.graph import edit
from zsq.methods.generator_training import GeneratorSettings, GeneratorSource
from zsq.methods.generators import label_codes
from zsq.methods.labels import draw_labels, label_terms, maps_of
from zsq.models.teacher import Teacher
from zsq.runtime import distributed
from zsq.runtime.random_streams import stream
from zsq.training.answers import Answers
from zsq.training.loop import Run
from zsq.types import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class ZSCGAN(GeneratorSettings):
    """Train a conditional generator against the teacher's labels and batch-norm statistics."""

    name: ClassVar[str] = "zscgan"
    summary: ClassVar[str] = "conditional generator learnt from labels and batch-norm statistics (the paper's own)"

    ce_weight: Factor | None = None
    """Factor of the label cross-entropy, eq. (2); 0: none; unset: 2 up to 64 classes and classes / 32 above. A network
    that names a class at each place gets maps of labels."""
    spread_weight: Factor = 10.0
    """Factor of the loss that lets embeddings and values differ between images; without effect on classes."""
    bns_weight: Factor = 1.0
    """Factor of the batch-norm statistics loss, eq. (2); 0 switches it off."""
    code_size: Count = 128
    """Longest code of a label."""

    def check(self) -> None:
        """Check that the generator has something to learn from."""
        if self.ce_weight == self.bns_weight == 0:
            raise InputError("method.ce_weight and method.bns_weight are both 0; one must be above 0.")

    @property
    def needs_statistics(self) -> bool:
        """Whether the loss has its term."""
        return self.bns_weight > 0

    def source(self, teacher: Teacher, run: Run, distill_steps: int) -> "ConditionalSource":
        """Make the source, its generator untrained."""
        return ConditionalSource(self, teacher, run, distill_steps)


class ConditionalSource(GeneratorSource):
    """Samples of a conditional generator, learnt by eq. (2)."""

    def __init__(self, settings: ZSCGAN, teacher: Teacher, run: Run, distill_steps: int) -> None:
        spec = teacher.spec
        self.asks_labels, self.answers = spec.classes > 0, Answers(spec.outputs)
        weight = edit.classifier_weight(teacher.network, spec.classes) if spec.classes else None
        codes = label_codes(max(1, spec.classes), weight, settings.code_size, stream(run.seed, "codes", 0))
        generator = settings.build(spec, codes, run.seed)
        super().__init__(settings, generator, teacher, run, distill_steps)
        self.noise_size = generator.noise_size
        ce_weight = max(2.0, spec.classes / 32) if settings.ce_weight is None else settings.ce_weight
        self.weights = {"ce": ce_weight, "bns": settings.bns_weight, "sameness": settings.spread_weight}

    def inputs(self, step: int) -> tuple[Tensor, ...]:
        """Return labels and noise."""
        return self._inputs("fit", step, self.batch_size)

    def learnt_from(self, turn: int, student: nn.Module | None, *inputs: Tensor) -> Batch:
        """Return images of these labels and this noise with the losses of eq. (2)."""
        del turn, student
        labels, noise = inputs
        self.generator.train()
        images = self.generator(distributed.share(noise), distributed.share(labels))
        logits, moments = self.teacher(images)
        logits = distributed.whole(logits, len(labels))
        losses = label_terms(self.spec, logits, labels)
        if moments:
            losses["bns"] = self.bns(moments)
        if "label_recognition" in losses:
            losses["label_recognition"] = losses.pop("label_recognition")  # told last
        if (sameness := self.answers.sameness(logits)) is not None:
            losses["sameness"] = sameness
        return Batch(images, labels, logits.detach(), losses)

    def draw(self, name: str, index: int, count: int) -> Batch:
        """Return `count` images, labels drawn by `draw_labels`."""
        labels, noise = self._inputs(name, index, count)
        return Batch(self.render(noise, labels), labels)

    @torch.no_grad()
    def sample_labels(self, labels: Tensor) -> Tensor:
        """Return one image for each label [N]: [N, C, H, W]."""
        _, noise = self._inputs("grid", 0, len(labels))
        parts = (each.split(self.spec.images_at_once) for each in (noise, maps_of(labels.to(self.device), self.spec)))
        return torch.cat([self.render(*part) for part in zip(*parts, strict=True)])

    def render(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Map noise and labels to images as when sampling."""
        self.generator.eval()
        images: Tensor = self.generator(noise, labels)
        return images

    def _inputs(self, name: str, step: int, count: int) -> tuple[Tensor, Tensor]:
        random = stream(self.seed, name, step, self.device)
        labels = draw_labels(self.spec, count, random, self.device)
        noise = torch.randn(count, self.noise_size, generator=random, device=self.device)
        return labels, noise
