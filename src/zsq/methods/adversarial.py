"""Generators that are not told a label and look for what the student gets wrong (Choi, Choi, El-Khamy, Lee 2020)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from zsq.checked import Count, Factor
from zsq.errors import InputError
from zsq.methods.generator_training import GeneratorSettings, GeneratorSource
from zsq.models.teacher import Teacher
from zsq.quantization.quantizers import straight_through
from zsq.runtime import distributed
from zsq.runtime.random_streams import stream
from zsq.training.answers import Answers, as_rows
from zsq.training.loop import Run
from zsq.training.losses import batch_entropy, instance_entropy
from zsq.types import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Adversarial(GeneratorSettings):
    """Train generators against batch-norm statistics and entropies, and while they teach, against the student."""

    name: ClassVar[str] = "adversarial"
    summary: ClassVar[str] = "generators without labels that look for images on which the student errs"

    generators: Count = 1
    """Number of generators, updated in turn; a sample comes from any of them."""
    bns_weight: Factor = 1.0
    """Factor of the batch-norm statistics loss."""
    instance_entropy_weight: Factor | None = None
    """Factor of the teacher's entropy on each image, lowered; unset: 1 up to 32 classes and classes / 32 above."""
    batch_entropy_weight: Factor | None = None
    """Factor of the entropy of the batch's mean answer, raised; unset: as the other entropy."""
    adversarial_weight: Factor = 1.0
    """Factor of the student's KL divergence from the teacher, raised during distillation."""

    def check(self) -> None:
        """Check that the generator has something to learn from before there is a student."""
        if self.bns_weight == self.instance_entropy_weight == self.batch_entropy_weight == 0:
            raise InputError(
                "method.bns_weight, method.instance_entropy_weight, method.batch_entropy_weight are all 0; "
                "the generator would learn nothing."
            )

    def source(self, teacher: Teacher, run: Run, distill_steps: int) -> "AdversarialSource":
        """Make the source, its generators untrained."""
        return AdversarialSource(self, teacher, run, distill_steps)


class AdversarialSource(GeneratorSource):
    """Samples of one or several generators; their labels are the teacher's answers."""

    asks_labels = False

    def __init__(self, settings: Adversarial, teacher: Teacher, run: Run, distill_steps: int) -> None:
        no_code = torch.zeros(1, 1)  # one label for all images, whose code says nothing
        networks = [settings.build(teacher.spec, no_code, run.seed, number) for number in range(settings.generators)]
        self.generators = nn.ModuleList(networks)
        super().__init__(settings, self.generators, teacher, run, distill_steps)
        self.noise_size, self.turns = networks[0].noise_size, len(networks)
        default, self.answers = max(1.0, teacher.spec.classes / 32), Answers(teacher.spec.outputs)
        instance, batch = settings.instance_entropy_weight, settings.batch_entropy_weight
        self.weights = {
            "bns": settings.bns_weight,
            "instance_entropy": default if instance is None else instance,
            "batch_entropy": -(default if batch is None else batch),
            "student_kl": -settings.adversarial_weight,
        }

    def inputs(self, step: int) -> tuple[Tensor, ...]:
        """Return noise."""
        return (self._noise(stream(self.seed, "fit", step, self.device), self.batch_size),)

    def learnt_from(self, turn: int, student: nn.Module | None, *inputs: Tensor) -> Batch:
        """Return images of the generator whose turn it is, with its losses, against the student if there is one."""
        (noise,) = inputs
        generator = self.generators[turn]
        generator.train()
        images = self._make(generator, distributed.share(noise))
        logits, moments = self.teacher(images)
        logits = distributed.whole(logits, len(noise))
        losses = {"bns": self.bns(moments)}
        for named in self.answers.class_logits(logits)[:1]:
            rows = as_rows(named)
            losses |= {"instance_entropy": instance_entropy(rows), "batch_entropy": batch_entropy(rows)}
        if student is not None:
            with straight_through(student):
                answers = distributed.whole(student(images), len(noise))
                losses["student_kl"] = self.answers.distance(logits, answers)
        return Batch(images, self.answers.named_classes(logits.detach()), logits.detach(), losses)

    def draw(self, name: str, index: int, count: int) -> Batch:
        """Return `count` images, each by a generator drawn at random, with the teacher's answers as labels."""
        random = stream(self.seed, name, index, self.device)
        noise = self._noise(random, count)
        author = torch.randint(0, len(self.generators), (count,), generator=random, device=self.device)
        images = torch.empty(count, *self.spec.shape, device=self.device)
        for number, generator in enumerate(self.generators.eval()):
            rows = author == number
            if rows.any():
                images[rows] = self._make(generator, noise[rows])
        logits, _ = self.teacher(images)
        return Batch(images, self.answers.named_classes(logits), logits)

    def _noise(self, random: torch.Generator, count: int) -> Tensor:
        return torch.randn(count, self.noise_size, generator=random, device=self.device)

    @staticmethod
    def _make(generator: nn.Module, noise: Tensor) -> Tensor:
        images: Tensor = generator(noise, torch.zeros(len(noise), dtype=torch.int64, device=noise.device))
        return images
