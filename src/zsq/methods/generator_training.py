"""What the methods that train a generator share: its settings, its updates and its state."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor, nn

from zsq.checked import BatchSize, Count, CountOrZero, Momentum, Positive
from zsq.methods.base import LearningMethod, Surrogate, in_channels_last, restore, takes_size
from zsq.methods.generators import Generator, make_generator
from zsq.models.teacher import Teacher
from zsq.quantization.ptq import PTQ, activation_quantizers, quantize_ptq
from zsq.runtime import distributed
from zsq.runtime.cuda_graphs import Replays
from zsq.runtime.random_streams import stream
from zsq.training.loop import Run
from zsq.training.losses import bns_loss
from zsq.training.optim import cosine, flatten_optimizer, learning_rates, rate_on, restore_optimizer, set_learning_rate
from zsq.training.state import part, under
from zsq.types import Batch, ImageSpec, joined

SMALL_WIDTH, LARGE_WIDTH = 32, 16
SMALL_RATE, LARGE_RATE = 1e-3, 3e-3

SETTLING_PARTS = (32, 16, 8, 4, 2)
"""A fit looks whether its ranges have settled after the steps divided by these."""

SETTLING_IMAGES = 64
"""Samples that it looks at."""

SETTLED = 0.06
"""Mean relative change of the ranges since the last look, half as many steps ago, below which they have settled: a grid
so much too wide adds half a decibel of noise."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorSettings(LearningMethod, ABC):
    """Settings of a generator and of its training."""

    steps: CountOrZero = 4000
    """Generator updates before the first sample is taken."""
    batch_size: BatchSize | None = None
    """Images a step, in `fit` and in distillation; unset, 64, and 32 from 96 pixels on."""
    learning_rate: Positive | None = None
    """Adam's step size, annealed by a cosine over fit and distillation together; unset, 1e-3, and 3e-3 from 96 pixels
    on."""
    beta1: Momentum = 0.5
    """Adam's first momentum."""
    beta2: Momentum = 0.999
    """Adam's second momentum."""
    generator: Literal["unet", "light"] = "light"
    """Network: the paper's U-Net or the light decoder, which costs a fraction of it."""
    width: Count | None = None
    """Channels of the generator's layers; unset, 32, and 16 from 96 pixels on, where steps are few."""
    levels: Count = 5
    """Most levels of the U-Net."""
    skip: Count = 4
    """Channels of the U-Net's skip connections."""
    noise_channels: Count = 32
    """Channels of the noise map: of the image's size for the U-Net, of the smallest map's for the light decoder."""
    style_size: CountOrZero = 16
    """Length of the noise that every batch norm sees beside the label's code."""
    bound_contrast: bool = True
    """Keep brightness and contrast of each image near those learnt for all images."""
    whole_every: Count = 4
    """Of images from 96 pixels on, the light decoder makes whole ones in one step of so many, and in the others
    windows, which cost a third; 1: whole ones in every step."""
    settle: bool = False
    """End the fit before `steps` where its samples no longer change the ranges of an INT8 calibration; chosen by
    itself where a run is told neither steps nor budget and calibrates at 8 bits."""

    def until_settled(self) -> Self:
        """See `Method.until_settled`."""
        return replace(self, settle=True)

    @property
    def needs_statistics(self) -> bool:
        """Whether the method learns from batch norm; not where it can do with labels alone."""
        return True

    def build(self, spec: ImageSpec, codes: Tensor, seed: int, number: int = 0) -> Generator:
        """Make generator `number`, untrained; a pure function of settings and arguments."""
        width = self.width or (LARGE_WIDTH if spec.is_large else SMALL_WIDTH)
        settings = {"width": width, "noise_channels": self.noise_channels, "style_size": self.style_size}
        settings["bound_contrast"] = self.bound_contrast
        if self.generator == "unet":
            settings |= {"levels": self.levels, "skip": self.skip}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream(seed, "generator", number).initial_seed())
            return make_generator(self.generator, spec, codes, **settings)

    @abstractmethod
    def source(self, teacher: Teacher, run: Run, distill_steps: int) -> "GeneratorSource":
        """Make the source, its generator untrained."""

    def fit(
        self, teacher: Teacher, run: Run, *, distill_steps: int = 0, fitted: dict[str, Tensor] | None = None
    ) -> Surrogate:
        """Train the generator.

        Raises:
            InputError: the teacher stores no batch-norm statistics, or `fitted` is of another generator.
            NumericsError: a loss is not finite.
        """
        source = self.source(teacher, run, distill_steps)
        if fitted is None:
            until = Settling(teacher, source, self.steps) if self.settle else None
            run.train("fit", source, self.steps, until=until, shown=source)
        else:
            restore(source, fitted)
        return Surrogate(source, teacher.network)


class Settling:
    """Tells when what samples are for has settled: the ranges of a calibration at 8 bits.

    Asked after each step, it looks after 1/32, 1/16, 1/8, 1/4 and 1/2 of the steps. What it saw last is part of the
    source's state, so that a run that is resumed ends where it would have ended.

    Args:
        teacher: the float network.
        source: whose samples calibrate.
        steps: of the whole fit.
    """

    def __init__(self, teacher: Teacher, source: "GeneratorSource", steps: int) -> None:
        self.teacher, self.source = teacher, source
        self.looks = {steps // part for part in SETTLING_PARTS} - {0}

    def __call__(self, done: int) -> bool:
        """Tell whether the ranges have changed little since the last look."""
        if done not in self.looks:
            return False
        source, settings = self.source, PTQ(num_samples=SETTLING_IMAGES, bias_correction=False)
        at_once = self.teacher.spec.images_at_once
        student = quantize_ptq(
            self.teacher.network,
            lambda: source.sample(SETTLING_IMAGES, at_once, "settling"),
            settings,
            Run(seed=source.seed, device=source.device),
        )
        before = source.scales
        source.scales = torch.cat([quantizer.scale.detach() for quantizer in activation_quantizers(student).values()])
        if before is None:
            return False
        change = float((source.scales / before).log().abs().mean())
        settled = change < SETTLED
        logger.info(f"after {done} steps, ranges have moved by {100 * change:.1f} %{': enough' if settled else ''}")
        return settled


class GeneratorSource(ABC):
    """Samples of a generator that goes on learning while it teaches.

    Args:
        settings: of the generator and its training.
        generator: the untrained network, or several in a ModuleList.
        teacher: the float network.
        run: seed and device.
        distill_steps: steps of distillation that will follow; the learning rate's cosine spans them, too.
    """

    data_free = True
    true_labels = False
    asks_labels: bool
    weights: dict[str, float]
    """Factor of each loss; what `losses` returns beside them is for the log."""
    turns = 1
    """Kinds of steps that follow each other in turn."""

    def __init__(
        self, settings: GeneratorSettings, generator: nn.Module, teacher: Teacher, run: Run, distill_steps: int
    ) -> None:
        self.scales: Tensor | None = None
        self.first_distill_step, self.seed, self.device, self.spec = settings.steps, run.seed, run.device, teacher.spec
        self.batch_size = settings.batch_size or (32 if teacher.spec.is_large else 64)
        self.horizon = settings.steps + distill_steps
        self.parts = 1
        self.whole_every = settings.whole_every
        self.teacher = settings.observed(teacher, self.device, required=settings.needs_statistics)
        self.generator = in_channels_last(generator.to(self.device))
        self.networks = [network for network in self.generator.modules() if isinstance(network, Generator)]
        for network in self.networks:
            network.low_precision = settings.precision == "bfloat16"
        if not self._takes_windows(teacher):
            self.whole_every = 1
        self.optimizer = torch.optim.Adam(
            self.generator.parameters(),
            lr=rate_on(self.device, settings.learning_rate or (LARGE_RATE if teacher.spec.is_large else SMALL_RATE)),
            betas=(settings.beta1, settings.beta2),
            fused=True,
            capturable=self.device.type == "cuda",
        )
        self.replays = Replays(self.device, self.optimizer)

    @abstractmethod
    def inputs(self, step: int) -> tuple[Tensor, ...]:
        """Return what step `step` of fit and distillation together draws for its images, each [N, ...]."""

    @abstractmethod
    def learnt_from(self, turn: int, student: nn.Module | None, *inputs: Tensor) -> Batch:
        """Return images made of the inputs, with the losses of the generator, through which gradients reach it.

        Whatever the inputs, the same is computed in the same turn: a GPU replays it.
        """

    @abstractmethod
    def draw(self, name: str, index: int, count: int) -> Batch:
        """Return `count` images as when sampling; a pure function of the generator and of (seed, name, index)."""

    def _takes_windows(self, teacher: Teacher) -> bool:
        """Whether the generators can make windows, and the teacher takes images of their size."""
        window = self.networks[0].window
        return self.whole_every > 1 and window is not None and takes_size(teacher, window, self.device)

    def update(self, step: int, student: nn.Module | None) -> Batch:
        """Update the generator once and return its images and losses; the batch goes through in `parts`."""
        turn = step % self.turns
        windowed = student is None and (step // self.turns + 1) % self.whole_every > 0
        for network in self.networks:
            network.windowed = windowed
        set_learning_rate(self.optimizer, cosine(1.0, step, self.horizon))

        def learn(*drawn: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor | None], dict[str, Tensor]]:
            self.optimizer.zero_grad(set_to_none=True)
            made = []
            for inputs in zip(*(values.tensor_split(self.parts) for values in drawn), strict=True):
                batch = self.learnt_from(turn, student, *inputs)
                terms = [self.weights[name] * value for name, value in batch.losses.items() if self.weights.get(name)]
                (torch.stack(terms).sum() * (len(inputs[0]) / self.batch_size)).backward()
                losses = {name: value.detach() for name, value in batch.losses.items()}
                made.append(Batch(batch.images.detach(), batch.labels, batch.teacher_logits, losses))
            distributed.reduce_gradients(self.generator.parameters())
            self.optimizer.step()
            whole = joined(made)
            return (whole.images, whole.labels, whole.teacher_logits), whole.losses

        batch, losses = self.replays.call((turn, windowed, student), learn, *self.inputs(step))
        return Batch(*batch, losses)

    def halve(self) -> bool:
        """Let the batch go through the networks in twice as many parts, where that leaves two images each."""
        if self.batch_size < 4 * self.parts:
            return False
        self.parts *= 2
        self.replays.forget()
        return True

    def step(self, step: int) -> dict[str, Tensor]:
        """Update the generator once and return its losses."""
        return self.update(step, None).losses

    def rates(self) -> dict[str, float]:
        """See `Learner.rates`."""
        return learning_rates(self.optimizer)

    def batch(self, step: int, student: nn.Module | None) -> Batch:
        """Return a fresh batch and learn from it: one forward pass of generator and teacher serves both losses."""
        return self.update(self.first_distill_step + step, student)

    @torch.no_grad()
    def sample(self, count: int, batch_size: int = 100, name: str = "sample") -> Iterator[Batch]:
        """Stream `count` images, the generator's batch norms at their running statistics."""
        for index, start in enumerate(range(0, count, batch_size)):
            yield self.draw(name, index, min(batch_size, count - start))

    def sample_labels(self, labels: Tensor) -> Tensor | None:
        """Return one image for each label [N], [N, C, H, W]; None where the generator is not told a label."""
        del labels
        return None

    def bns(self, moments: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Return the batch-norm statistics loss of what the teacher observed."""
        return bns_loss(moments, self.teacher.target_mean, self.teacher.target_var, self.teacher.eps)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the generator's weights and Adam's moments."""
        moments = flatten_optimizer(self.optimizer)
        state = under("generator", self.generator.state_dict()) | under("optimizer", moments)
        return state if self.scales is None else state | {"scales": self.scales}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self.generator.load_state_dict(part("generator", state))
        restore_optimizer(self.optimizer, part("optimizer", state))
        self.scales = state["scales"].to(self.device) if "scales" in state else None
        self.replays.forget()
