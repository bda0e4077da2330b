"""DeepInversion: images of wanted classes with the stored batch-norm statistics (Yin et al. 2020)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from zsq.checked import CountOrZero, Factor, Text
from zsq.errors import InputError
from zsq.methods.generators import LINEAR
from zsq.methods.image_optimization import Inversion, InversionSource
from zsq.methods.labels import label_terms
from zsq.methods.noise_and_real import Noise, NoiseSource
from zsq.models.teacher import Teacher
from zsq.quantization.prepare import Bits, Student
from zsq.quantization.ptq import PTQ, quantize_ptq
from zsq.quantization.quantizers import straight_through
from zsq.runtime import distributed
from zsq.runtime.random_streams import stream
from zsq.training.answers import Answers, as_rows
from zsq.training.loop import Run
from zsq.training.losses import competition, feature_norm, image_norm, total_variation
from zsq.training.optim import cosine
from zsq.types import ImageSpec

SMALL = {"learning_rate": 0.05, "feature_weight": 1.0, "tv_weight": 2.5e-5, "l2_weight": 3e-8, "jitter": 2}
LARGE = {"learning_rate": 0.25, "feature_weight": 0.01, "tv_weight": 1e-4, "l2_weight": 1e-5, "jitter": 30}
"""What unset settings stand for, below 96 pixels and from there on; the docs say which are published."""

LOW_SHARE = 2 / 3
"""Share of a batch's iterations at half resolution."""

WARM_SHARE = 0.05
"""Share of a phase in which the learning rate rises."""

STUDENT_IMAGES = 512
"""Noise images that calibrate the competing student."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepInversion(Inversion):
    """Optimise pixels for random labels, stored batch-norm statistics and smoothness."""

    name: ClassVar[str] = "deepinversion"
    summary: ClassVar[str] = "pixels with wanted labels and stored statistics, (Adaptive) DeepInversion"

    feature_weight: Factor | None = None
    """Factor of the statistics loss; unset, 1, and 0.01 from 96 pixels on."""
    tv_weight: Factor | None = None
    """Factor of the total variation; unset, 2.5e-5, and 1e-4 from 96 pixels on."""
    l2_weight: Factor | None = None
    """Factor of the images' norm; unset, 3e-8, and 1e-5 from 96 pixels on."""
    jitter: CountOrZero | None = None
    """Most pixels by which the images are rolled at a step, each way; unset, 2, and 30 from 96 pixels on."""
    flip: bool = True
    """Mirror the whole batch at every other step, drawn at random; images only."""
    two_resolutions: bool | None = None
    """Optimise at half resolution for the first two thirds of the iterations; unset: from 96 pixels on."""
    competition_weight: Factor = 0.0
    """Factor of Adaptive DeepInversion's 1 - JS(teacher, student); 0: no student is made; published: 0.2."""
    student_bits: Text = "4"
    """Widths of that student, which is calibrated on noise."""

    def check(self) -> None:
        """Check that the student's widths can be read."""
        try:
            Bits.parse(self.student_bits)
        except InputError as error:
            raise InputError(f"method.student_bits: {error}") from error

    def chosen(self, name: str, spec: ImageSpec) -> float:
        """Return a setting, or what its absence stands for at this image size."""
        value = getattr(self, name)
        return (LARGE if spec.is_large else SMALL)[name] if value is None else value

    def source(self, teacher: Teacher, run: Run) -> "DeepInversionSource":
        """Make the source, its first batch of images clipped Gaussian noise."""
        return DeepInversionSource(self, teacher, run)


class DeepInversionSource(InversionSource):
    """Images that are valid pixels at every step."""

    betas: ClassVar[tuple[float, float]] = (0.5, 0.9)

    def __init__(self, settings: DeepInversion, teacher: Teacher, run: Run) -> None:
        spec = teacher.spec
        self.asks_labels, self.answers = spec.classes > 0, Answers(spec.outputs)
        if settings.competition_weight and not self.asks_labels:
            raise InputError("method.competition_weight compares classes, and this network names none; set it to 0.")
        self.low, self.high = spec.ends.view(2, spec.channels, *[1] * spec.axes).to(run.device).split(1)
        self.jitter, self.flip = int(settings.chosen("jitter", spec)), settings.flip and spec.is_image
        self.student = None
        weights = {
            "ce": 1.0,
            "feature": settings.chosen("feature_weight", spec),
            "tv": settings.chosen("tv_weight", spec),
            "l2": settings.chosen("l2_weight", spec),
        }
        if settings.competition_weight:
            weights["competition"] = settings.competition_weight
            self.student = noise_student(teacher, run, settings.student_bits)
        super().__init__(settings, teacher, run, learning_rate=settings.chosen("learning_rate", spec), weights=weights)
        two = spec.is_large if settings.two_resolutions is None else settings.two_resolutions
        self.low_iterations = round(LOW_SHARE * self.iterations) if two else 0

    def start(self, random: torch.Generator) -> Tensor:
        """Return Gaussian noise, clipped to valid pixels."""
        return super().start(random).clamp(self.low.cpu(), self.high.cpu())

    def images_of(self, step: int) -> Tensor:
        """Return the pixels rolled and mirrored at random; in the first phase at half resolution, enlarged again."""
        images: Tensor = self.pixels
        if step % self.iterations < self.low_iterations:
            small = F.interpolate(images, [max(1, side // 2) for side in images.shape[2:]], mode="area")
            images = F.interpolate(small, images.shape[2:], mode=LINEAR[self.spec.axes], align_corners=False)
        random = stream(self.seed, "jitter", step)
        axes = self.spec.axes
        shifts = torch.randint(-self.jitter, self.jitter + 1, (axes,), generator=random).tolist()
        mirrored = bool(torch.randint(0, 2, (1,), generator=random)) and self.flip
        images = torch.roll(images, shifts, tuple(range(2, 2 + axes)))
        return images.flip(-1) if mirrored else images

    def losses(
        self, images: Tensor, logits: Tensor, moments: list[tuple[Tensor, Tensor]], labels: Tensor
    ) -> dict[str, Tensor]:
        """Return the label term, R_feature, R_TV, R_l2 and, with a student, R_compete."""
        found = {
            "feature": feature_norm(moments, self.teacher.target_mean, self.teacher.target_var),
            "tv": total_variation(images),
            "l2": image_norm(images),
        } | label_terms(self.spec, logits, labels)
        if self.student is not None:
            with straight_through(self.student):
                answers = distributed.whole(self.student(distributed.share(images)), len(images))
            pairs = zip(self.answers.class_logits(logits), self.answers.class_logits(answers), strict=True)
            found["competition"] = torch.stack([competition(as_rows(t), as_rows(s)) for t, s in pairs]).sum()
        return found

    def rate(self, iteration: int) -> float:
        """Return the learning rate: in each phase a short linear rise and a cosine to 0."""
        first = iteration < self.low_iterations
        length = self.low_iterations if first else self.iterations - self.low_iterations
        done = iteration if first else iteration - self.low_iterations
        warm = int(WARM_SHARE * length)
        if done < warm:
            return self.learning_rate * (done + 1) / warm
        return cosine(self.learning_rate, done - warm, length - warm)

    def constrain(self) -> None:
        """Clip to valid pixels."""
        self.pixels.clamp_(self.low, self.high)


def noise_student(teacher: Teacher, run: Run, bits: str) -> Student:
    """Return the teacher quantized with ranges taken from noise, frozen."""
    noise = NoiseSource(Noise(), teacher.spec, run)
    settings = PTQ(bits=bits, num_samples=STUDENT_IMAGES)
    student = quantize_ptq(teacher.network, lambda: noise.sample(STUDENT_IMAGES), settings, run)
    return student.requires_grad_(False)
