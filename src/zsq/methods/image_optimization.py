"""Images found by optimising their pixels: what the methods that do so share."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from zsq.checked import BatchSize, Count, CountOrZero, Positive
from zsq.methods.base import LearningMethod, Surrogate, restore
from zsq.methods.labels import draw_labels, map_shape
from zsq.methods.pool import PoolSource
from zsq.models.teacher import Teacher
from zsq.runtime import distributed
from zsq.runtime.cuda_graphs import Replays
from zsq.runtime.random_streams import stream
from zsq.training.loop import Run
from zsq.training.optim import flatten_optimizer, learning_rates, rate_on, restore_optimizer, set_learning_rate
from zsq.training.state import part, under


@dataclass(frozen=True, slots=True, kw_only=True)
class Inversion(LearningMethod, ABC):
    """Settings of every method that optimises pixels."""

    steps: CountOrZero = 4000
    """Optimisation steps in all; they are divided evenly among as many batches as `iterations` asks for."""
    iterations: Count = 500
    """Most steps of one batch of images: there are steps / iterations batches, rounded up."""
    batch_size: BatchSize | None = None
    """Images optimised together, and of a distillation step; unset, 64, and 32 from 96 pixels on."""
    learning_rate: Positive | None = None
    """Adam's step size, in units of the normalised image; unset, the method's own."""

    @property
    def batches(self) -> int:
        """Number of batches of images."""
        return max(1, -(-self.steps // self.iterations))

    @abstractmethod
    def source(self, teacher: Teacher, run: Run) -> "InversionSource":
        """Make the source, its first batch of images at the start."""

    def fit(
        self, teacher: Teacher, run: Run, *, distill_steps: int = 0, fitted: dict[str, Tensor] | None = None
    ) -> Surrogate:
        """Optimise the pixels, batch after batch.

        Raises:
            InputError: the teacher stores no batch-norm statistics, or `fitted` is of another source.
            NumericsError: a loss is not finite.
        """
        del distill_steps
        source = self.source(teacher, run)
        if fitted is None:
            run.train("fit", source, source.steps, shown=source)
        else:
            restore(source, fitted)
        return Surrogate(source, teacher.network)


class InversionSource(PoolSource, ABC):
    """A pool of images that grows by one batch at a time; the latest batch is the one that is optimised.

    Every process holds all pixels; where processes share a batch, each shows its share to the teacher.

    Args:
        settings: schedule and batch.
        teacher: whose logits and statistics the losses read.
        run: seed and device.
        learning_rate: Adam's step size before annealing.
        weights: factor of each loss by its name; 0 only logs it.

    Attributes:
        pool: images as the network takes them, float16 [N, C, H, W], on the CPU; those of `pixels` as they were when
            it was last read.
        pixels: what Adam changes, in float32: the pool's last `batch_size` images, or what `render` makes them of.
        changed: whether the pixels have changed since the pool was last read.
        wanted: labels of `pixels`, on their device.
        history: weighted sum of the losses at each iteration of this batch so far.
    """

    data_free = True
    true_labels = False
    asks_labels: bool
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)

    def __init__(
        self, settings: Inversion, teacher: Teacher, run: Run, *, learning_rate: float, weights: dict[str, float]
    ) -> None:
        super().__init__(run, settings.batch_size or (32 if teacher.spec.is_large else 64))
        self.spec, self.learning_rate, self.weights = teacher.spec, learning_rate, weights
        self.steps, self.batches = settings.steps, settings.batches
        self.iterations = -(-self.steps // self.batches) or settings.iterations
        self.teacher = settings.observed(teacher, self.device)
        self.pool = torch.empty(0, *self.spec.shape, dtype=torch.float16)
        self.changed = False
        self.replays = Replays(self.device)
        self._begin(0)

    @abstractmethod
    def losses(
        self, images: Tensor, logits: Tensor, moments: list[tuple[Tensor, Tensor]], labels: Tensor
    ) -> dict[str, Tensor]:
        """Return the scalars that `weights` names, for images [N, C, H, W] and what the teacher says of them.

        What else it returns is for the log.
        """

    def start(self, random: torch.Generator) -> Tensor:
        """Return a batch's first pixels: standard normal, as the network takes them."""
        return torch.randn(self.batch_size, *self.pool.shape[1:], generator=random)

    def encode(self, images: Tensor) -> Tensor:
        """Return what Adam is to change in place of these images [N, C, H, W]: the images themselves."""
        return images

    def render(self) -> Tensor:
        """Return the images [N, C, H, W] of what Adam changes."""
        return self.pixels

    def images_of(self, step: int) -> Tensor:
        """Return what the teacher is shown of the images at a step."""
        del step
        return self.render()

    def rate(self, iteration: int) -> float:
        """Return the learning rate of an iteration."""
        del iteration
        return self.learning_rate

    def constrain(self) -> None:
        """Bring the pixels back to where they may be; called after each step."""

    def step(self, step: int) -> dict[str, Tensor]:
        """Do one optimisation step of the batch whose turn it is; steps beyond the last go on with the last batch."""
        index = min(step // self.iterations, self.batches - 1)
        if (index + 1) * self.batch_size > len(self.pool):
            self._begin(index)
        iteration = step % self.iterations
        shown = self.images_of(step)
        (gradient,), losses = self.replays.call(shown.shape, self._gradient, shown, self.wanted)
        self.optimizer.zero_grad(set_to_none=True)
        shown.backward(gradient)
        distributed.reduce_gradients([self.pixels])
        set_learning_rate(self.optimizer, self.rate(iteration))
        self.optimizer.step()
        values = dict(losses)
        with torch.no_grad():
            self.constrain()
            self.history[iteration] = values.pop("total")
        self.changed = True
        return values

    def rates(self) -> dict[str, float]:
        """See `Learner.rates`."""
        return learning_rates(self.optimizer)

    def _gradient(self, images: Tensor, labels: Tensor) -> tuple[tuple[Tensor], dict[str, Tensor]]:
        """Return the loss's gradient to the images, and the losses with their weighted sum, `total`."""
        images = images.detach().requires_grad_()
        logits, moments = self.teacher(distributed.share(images))
        logits = distributed.whole(logits, len(images))
        losses = self.losses(images, logits, moments, labels)
        terms = [self.weights[name] * value for name, value in losses.items() if name in self.weights]
        total = torch.stack(terms).sum()
        (gradient,) = torch.autograd.grad(total, images)
        return (gradient,), {name: value.detach() for name, value in losses.items()} | {"total": total.detach()}

    def _begin(self, index: int) -> None:
        """Put the first pixels of a batch into the pool, behind the last ones of the batch before."""
        self._keep()
        self._optimise(self.encode(self.start(stream(self.seed, "initial", index))))
        self.history = torch.zeros(self.iterations, device=self.device)
        self._take(torch.cat([self.pool, self._rendered().half()]))

    def _keep(self) -> Tensor:
        """Return the pool with the pixels as they are now; reading them waits for the device, so no step does."""
        if self.changed:
            self.pool[-self.batch_size :] = self._rendered()
            self.changed = False
        return self.pool

    @torch.no_grad()
    def _rendered(self) -> Tensor:
        return self.render().detach().cpu()

    def _optimise(self, pixels: Tensor) -> None:
        """Make these pixels those that a fresh Adam changes; its rate is set at each step."""
        order = torch.channels_last if self.spec.is_image and pixels.dim() == 4 else torch.contiguous_format
        placed = pixels.to(self.device, memory_format=order, copy=True)
        self.pixels, self.changed = nn.Parameter(placed), False
        rate = rate_on(self.device, 1.0)
        self.optimizer = torch.optim.Adam([self.pixels], lr=rate, betas=self.betas, fused=True)

    def _take(self, pool: Tensor) -> None:
        """Set the pool; its wanted labels are permutations of all classes, one after the other, or drawn maps."""
        self.pool = pool
        classes = max(1, self.spec.classes)
        if map_shape(self.spec):
            self.labels = draw_labels(self.spec, len(pool), stream(self.seed, "labels", 0))
        else:
            rounds = range(-(-len(pool) // classes))
            orders = [torch.randperm(classes, generator=stream(self.seed, "labels", number)) for number in rounds]
            self.labels = torch.cat(orders)[: len(pool)]
        self.wanted = self.labels[-self.batch_size :].to(self.device)

    def images(self, rows: Tensor) -> Tensor:
        """See `PoolSource.images`."""
        return self._keep()[rows].float()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the pool, and pixels, losses and Adam's moments of the batch that is optimised."""
        own = {"pool": self._keep(), "pixels": self.pixels.detach(), "history": self.history}
        return own | under("optimizer", flatten_optimizer(self.optimizer))

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self._optimise(state["pixels"])
        self.history = state["history"].to(self.device, copy=True)
        self._take(state["pool"].to("cpu", copy=True))
        restore_optimizer(self.optimizer, part("optimizer", state))
