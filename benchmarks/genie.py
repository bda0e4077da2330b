"""GENIE's image synthesis (Jeon, Lee, Cho, Ro 2023), after its published equations, to compare with.

Each batch of images has latent vectors and a small generator of its own, both learnt from nothing but the distance of
batch-norm statistics; the teacher's strided convolutions become swing convolutions, whose windows start at random.

Uncertain, for want of the authors' settings in the paper's text: the learning rates and how they fall (here 0.1 for
latents and 0.01 for the generator, both times 0.95 every 100 iterations), the generator's exact layers, and whether
deviations or variances are matched (here deviations, each layer's channels summed). Departures: above 64 pixels the
first map is smaller, so that the generator's linear layer fits into memory; images are stored in float16. The
teacher's shortcuts that subsample by slicing have no convolution and do not swing.
"""

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional

from zsq.graph import edit
from zsq.methods.image_optimization import Inversion, InversionSource
from zsq.models.teacher import Teacher
from zsq.runtime.random_streams import stream
from zsq.training.loop import Run
from zsq.training.losses import squared_bns_distance
from zsq.types import ImageSpec

LATENT_RATE = 0.1
DECAY, DECAY_EVERY = 0.95, 100
LEAST_LEVELS, LARGEST_MAP = 2, 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Genie(Inversion):
    """Learn latent vectors and a generator for each batch of images; labels play no part."""

    name: ClassVar[str] = "genie"
    summary: ClassVar[str] = "latent vectors and a generator a batch, swing convolutions, no labels"

    iterations: int = 4000
    """Most steps of one batch of images."""
    latent_size: int = 256
    """Length of an image's latent vector."""
    width: int = 128
    """Channels of the generator's first maps; the last have half as many."""
    generator_rate: float = 0.01
    """Adam's step size for the generator; `learning_rate` is the latent vectors'."""
    swing: bool = True
    """Shift the input of strided convolutions at random."""

    def source(self, teacher: Teacher, run: Run) -> "GenieSource":
        """Make the source, its first generator untrained."""
        return GenieSource(self, teacher, run)


class GenieSource(InversionSource):
    """A pool that grows by one batch at a time; the latest has latent vectors and a generator that learn."""

    asks_labels = False

    def __init__(self, settings: Genie, teacher: Teacher, run: Run) -> None:
        self.settings = settings
        super().__init__(
            settings,
            teacher,
            run,
            learning_rate=1.0,  # a factor on the two groups' own
            weights={"bns": 1.0},
        )
        self.swings = swing_convolutions(self.teacher.network) if settings.swing else []

    def start(self, random: torch.Generator) -> Tensor:
        """Return a batch's first latent vectors, standard normal."""
        return torch.randn(self.batch_size, self.settings.latent_size, generator=random)

    def images_of(self, step: int) -> Tensor:
        """Return what the generator makes of the latent vectors, and set where this step's windows start."""
        for index, swing in enumerate(self.swings):
            swing.random = stream(self.seed, f"swing {index}", step)
        images: Tensor = self.generator(self.latents)
        self.pixels = images.detach()  # type: ignore[assignment]  # what the pool takes over
        return images

    def losses(
        self, images: Tensor, logits: Tensor, moments: list[tuple[Tensor, Tensor]], labels: Tensor
    ) -> dict[str, Tensor]:
        """Return the distance of means and deviations from the stored ones."""
        del images, logits, labels
        teacher = self.teacher
        return {"bns": squared_bns_distance(moments, teacher.target_mean, teacher.target_var, teacher.eps)}

    def rate(self, iteration: int) -> float:
        """Return the factor on both learning rates."""
        return DECAY ** (iteration // DECAY_EVERY)

    def _optimise(self, pixels: Tensor) -> None:
        """Make these latent vectors, and a new generator, what a fresh Adam changes."""
        number = len(self.pool) // self.batch_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream(self.seed, "generator", number).initial_seed())
            generator = Decoder(self.spec, self.settings.latent_size, self.settings.width)
        self.generator = generator.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.latents = nn.Parameter(pixels.to(self.device, copy=True))
        latent_rate = self.settings.learning_rate or LATENT_RATE
        groups = [
            {"params": [self.latents], "lr": latent_rate},
            {"params": list(self.generator.parameters()), "lr": self.settings.generator_rate},
        ]
        self.optimizer = torch.optim.Adam(groups, fused=True)
        with torch.no_grad():
            self.pixels = self.generator(self.latents)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the pool: what is left of finished batches."""
        return {"pool": self.pool}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the pool over, to draw from it; a batch is not learnt on."""
        self._take(state["pool"].to("cpu", copy=True))


class Decoder(nn.Module):
    """Maps a latent vector to a small map, doubles it several times, and normalises the images' channels.

    Args:
        spec: size of the images.
        latent_size: length of the vectors.
        width: channels of all maps but the last, which have half.
    """

    def __init__(self, spec: ImageSpec, latent_size: int, width: int) -> None:
        super().__init__()
        levels = max(LEAST_LEVELS, math.ceil(math.log2(max(spec.height, spec.width) / LARGEST_MAP)))
        self.size = spec.height, spec.width
        self.first = width, math.ceil(spec.height / 2**levels), math.ceil(spec.width / 2**levels)
        self.linear = nn.Linear(latent_size, math.prod(self.first))
        self.norm = nn.BatchNorm2d(width)
        channels = [width] * levels + [width // 2]
        self.levels = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, 1, 1), nn.BatchNorm2d(after), nn.LeakyReLU(0.2))
            for before, after in itertools.pairwise(channels)
        )
        self.last = nn.Conv2d(channels[-1], spec.channels, 3, 1, 1)
        self.last_norm = nn.BatchNorm2d(spec.channels, affine=False)

    def forward(self, latents: Tensor) -> Tensor:
        """Map [N, latent_size] to images as the network takes them, [N, C, H, W]."""
        x: Tensor = self.norm(self.linear(latents).view(-1, *self.first))
        for level in self.levels:
            x = level(functional.interpolate(x, scale_factor=2.0))
        x = self.last_norm(torch.tanh(self.last(x)))
        return x[:, :, : self.size[0], : self.size[1]]


class Swing(nn.Module):
    """Pads by reflection, less than a stride on each side, and crops to the old size at a random place.

    Args:
        reach: pixels of padding, rows and columns.

    Attributes:
        random: generator of the next call's place.
    """

    random: torch.Generator

    def __init__(self, reach: tuple[int, int]) -> None:
        super().__init__()
        self.reach = reach
        self.random = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        """Shift [N, C, H, W] by up to `reach` pixels, the same for the whole batch."""
        rows, columns = self.reach
        top, left = (int(torch.randint(0, 2 * n + 1, (1,), generator=self.random)) for n in self.reach)
        padded = functional.pad(x, (columns, columns, rows, rows), mode="reflect")
        return padded[:, :, top : top + x.shape[2], left : left + x.shape[3]]


def swing_convolutions(network: GraphModule) -> list[Swing]:
    """Put a `Swing` in front of every convolution with a stride, in place; return them in order."""
    swings: list[Swing] = []
    for node in list(network.graph.nodes):
        stride = edit.argument(node, 3, 1) if node.target in edit.CONVOLUTIONS else 1
        stride = (stride, stride) if isinstance(stride, int) else tuple(stride)
        stride = stride * 2 if len(stride) == 1 else stride
        if len(stride) != 2 or max(stride) < 2:
            continue
        swings.append(Swing((stride[0] - 1, stride[1] - 1)))
        name = f"swing_{len(swings)}"
        network.add_submodule(name, swings[-1])
        with network.graph.inserting_before(node):
            shifted = network.graph.call_module(name, (node.args[0],))
        node.args = (shifted, *node.args[1:])
    edit.finish(network)
    return swings
