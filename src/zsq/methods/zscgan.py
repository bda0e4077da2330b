"""ZS-CGAN: a conditional generator learnt from nothing but the teacher (Choi, El-Khamy, Lee, section 2.2)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from zsq import graphs
from zsq.batchnorm import ObservedTeacher
from zsq.errors import InputError
from zsq.losses import bns_loss, label_cross_entropy
from zsq.methods.base import Surrogate
from zsq.networks import Generator, label_codes, make_generator
from zsq.teachers import Teacher
from zsq.training import Run, cosine, flatten_optimizer, part, restore_optimizer, set_learning_rate, stream, under
from zsq.types import Batch

SMALL_IMAGE, LARGE_IMAGE = 16, 96
"""Shorter side in pixels: `generator = auto` takes the U-Net from the first to below the second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ZSCGAN:
    """Train a conditional generator against the teacher's labels and batch-norm statistics."""

    name: ClassVar[str] = "zscgan"
    summary: ClassVar[str] = "conditional generator learnt from labels and batch-norm statistics (the paper's own)"
    quantizers: ClassVar[tuple[str, ...]] = ("ptq", "qat")

    steps: int = 4000
    """Generator updates before the first sample is taken."""
    batch_size: int | None = None
    """Images a step, in `fit` and in distillation; unset, 64, and 32 from 96 pixels on."""
    learning_rate: float = 1e-3
    """Adam's step size, annealed by a cosine over fit and distillation together."""
    beta1: float = 0.5
    """Adam's first momentum."""
    beta2: float = 0.999
    """Adam's second momentum."""
    ce_weight: float | None = None
    """Factor of the label cross-entropy, eq. (2); 0: none; unset: 1 up to 32 classes and classes / 32 above."""
    bns_weight: float = 1.0
    """Factor of the batch-norm statistics loss, eq. (2); 0 switches it off."""
    generator: Literal["auto", "unet", "light"] = "auto"
    """Network: the paper's U-Net or the light decoder; auto takes the U-Net from 16 to 95 pixels."""
    width: int = 24
    """Channels of the generator's layers."""
    levels: int = 5
    """Most levels of the U-Net."""
    skip: int = 4
    """Channels of the U-Net's skip connections."""
    noise_channels: int = 32
    """Channels of the U-Net's noise map, or length of the light decoder's latent vector."""
    style_size: int = 16
    """Length of the noise that every batch norm sees beside the label's code."""
    code_size: int = 128
    """Longest code of a label."""

    def __post_init__(self) -> None:
        for name in ("width", "levels", "skip", "noise_channels", "code_size"):
            if getattr(self, name) < 1:
                raise InputError(f"method.{name} is {getattr(self, name)}; it must be at least 1.")
        if self.steps < 0:
            raise InputError(f"method.steps is {self.steps}; it must be at least 0.")
        if self.batch_size is not None and self.batch_size < 2:
            raise InputError(f"method.batch_size is {self.batch_size}; batch statistics need at least 2 images.")
        if self.style_size < 0:
            raise InputError(f"method.style_size is {self.style_size}; it must be at least 0.")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"method.{name} is {getattr(self, name)}; it must lie in [0, 1).")
        if self.learning_rate <= 0:
            raise InputError(f"method.learning_rate is {self.learning_rate}; it must be above 0.")
        ce_weight = 1.0 if self.ce_weight is None else self.ce_weight
        if min(ce_weight, self.bns_weight) < 0 or ce_weight + self.bns_weight == 0:
            raise InputError(
                f"method.ce_weight is {ce_weight} and method.bns_weight {self.bns_weight}; "
                "neither may be negative and one must be above 0."
            )

    def build(self, teacher: Teacher, seed: int) -> Generator:
        """Make the untrained generator; a pure function of settings, teacher and seed."""
        spec = teacher.spec
        weight = graphs.classifier_weight(teacher.network, spec.classes)
        codes = label_codes(spec.classes, weight, self.code_size, stream(seed, "codes", 0))
        kind = self.generator
        if kind == "auto":
            kind = "unet" if SMALL_IMAGE <= min(spec.height, spec.width) < LARGE_IMAGE else "light"
        settings = {"width": self.width, "noise_channels": self.noise_channels, "style_size": self.style_size}
        if kind == "unet":
            settings |= {"levels": self.levels, "skip": self.skip}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream(seed, "generator", 0).initial_seed())
            return make_generator(kind, spec, codes, **settings)

    def fit(
        self, teacher: Teacher, run: Run, *, distill_steps: int = 0, fitted: dict[str, Tensor] | None = None
    ) -> Surrogate:
        """Train the generator by eq. (2).

        Raises:
            InputError: the teacher stores no batch-norm statistics.
            NumericsError: a loss is not finite.
        """
        source = GeneratorSource(self, teacher, run, distill_steps)
        if fitted is None:
            run.train("fit", source, self.steps)
        else:
            source.load_state_dict(fitted)
        return Surrogate(source, teacher.network)


class GeneratorSource:
    """Samples of a generator that goes on learning while it teaches."""

    data_free = True
    true_labels = False

    def __init__(self, settings: ZSCGAN, teacher: Teacher, run: Run, distill_steps: int) -> None:
        self.settings, self.seed, self.device, self.spec = settings, run.seed, run.device, teacher.spec
        large = min(teacher.spec.height, teacher.spec.width) >= LARGE_IMAGE
        self.batch_size = settings.batch_size or (32 if large else 64)
        self.horizon = settings.steps + distill_steps
        ce_weight = max(1.0, teacher.spec.classes / 32) if settings.ce_weight is None else settings.ce_weight
        self.weights = {"ce": ce_weight, "bns": settings.bns_weight}
        observed = ObservedTeacher(teacher.network, teacher.name)
        self.teacher = observed.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        generator = settings.build(teacher, run.seed)
        self.generator = generator.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.Adam(
            self.generator.parameters(),
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            fused=True,
        )

    def step(self, step: int) -> dict[str, Tensor]:
        """Update the generator once by eq. (2) and return its losses."""
        return self._update(step).losses

    def batch(self, step: int, student: nn.Module | None) -> Batch:
        """Return a fresh batch and learn from it: one forward pass of generator and teacher serves both losses."""
        del student
        return self._update(self.settings.steps + step)

    def _update(self, step: int) -> Batch:
        labels, noise = self._draw("fit", step, self.batch_size)
        self.generator.train()
        images = self.generator(noise, labels)
        logits, moments = self.teacher(images)
        losses = {
            "ce": label_cross_entropy(logits, labels),
            "bns": bns_loss(moments, self.teacher.target_mean, self.teacher.target_var, self.teacher.eps),
        }
        loss = torch.stack([factor * losses[name] for name, factor in self.weights.items() if factor]).sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        set_learning_rate(self.optimizer, cosine(1.0, step, self.horizon))
        self.optimizer.step()
        losses = {name: value.detach() for name, value in losses.items()}
        losses["label_recognition"] = (logits.detach().argmax(1) == labels).float().mean() * 100
        return Batch(images.detach(), labels, logits.detach(), losses)

    @torch.no_grad()
    def sample(self, count: int, batch_size: int = 100) -> Iterator[Batch]:
        """Stream `count` images, batch norm at its running statistics, labels uniform."""
        for index, start in enumerate(range(0, count, batch_size)):
            labels, noise = self._draw("sample", index, min(batch_size, count - start))
            yield Batch(self.render(noise, labels), labels)

    @torch.no_grad()
    def sample_labels(self, labels: Tensor) -> Tensor:
        """Return one image for each label [N]: [N, C, H, W]."""
        _, noise = self._draw("grid", 0, len(labels))
        return self.render(noise, labels.to(self.device))

    def render(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Map noise and labels to images as when sampling."""
        self.generator.eval()
        return self.generator(noise, labels)

    def _draw(self, name: str, step: int, count: int) -> tuple[Tensor, Tensor]:
        random = stream(self.seed, name, step, self.device)
        labels = torch.randint(0, self.spec.classes, (count,), generator=random, device=self.device)
        noise = torch.randn(count, self.generator.noise_size, generator=random, device=self.device)
        return labels, noise

    def state_dict(self) -> dict[str, Tensor]:
        """Return the generator's weights and Adam's moments."""
        moments = flatten_optimizer(self.optimizer)
        return under("generator", self.generator.state_dict()) | under("optimizer", moments)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self.generator.load_state_dict(part("generator", state))
        restore_optimizer(self.optimizer, part("optimizer", state))
