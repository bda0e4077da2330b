"""Samples of a BigGAN, which was trained on real images: the paper's comparison, not data-free (its table 2)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zsq.checked import Count, PositiveShare, Text
from zsq.errors import InputError, MissingExtraError
from zsq.methods.base import Method, Surrogate
from zsq.methods.noise_and_real import ImagePool
from zsq.methods.pool import Stateless
from zsq.models.teacher import Teacher
from zsq.models.weights import load_weights
from zsq.runtime import distributed
from zsq.runtime.random_streams import stream
from zsq.training.loop import Run
from zsq.types import Batch, ImageSpec

LIBRARY, INSTALL = "pytorch-pretrained-biggan", "pip install 'zsq[biggan]'"

CONFIG, WEIGHTS = "config.json", "pytorch_model.bin"
"""Files of a checkpoint, by the names that the library gives them."""

LIMIT = 2.0
"""Magnitude at which BigGAN's normal noise is cut off, before it is multiplied by the truncation."""

CHUNK = 16
"""Images made at once: at 128 pixels, one value of the last layers takes 8 MiB an image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BigGAN(Method):
    """Take images from a pretrained BigGAN: ready-made ones, or a checkpoint that makes them."""

    name: ClassVar[str] = "biggan"
    summary: ClassVar[str] = "samples of a BigGAN that was trained on real images; not data-free"
    paths: ClassVar[tuple[str, ...]] = ("data", "checkpoint")

    data: Text = ""
    """Ready-made labelled samples: an .npz file or a folder of images; else give `checkpoint`."""
    checkpoint: Text = ""
    """Folder with config.json and pytorch_model.bin of pytorch-pretrained-biggan; else give `data`."""
    truncation: PositiveShare = 1.0
    """Truncation of the checkpoint's noise, above 0 and at most 1: lower is cleaner and less diverse."""
    batch_size: Count = 64
    """Images a distillation step."""
    limit: Count = 20_000
    """Most images of `data` kept in memory, as bytes; drawn evenly from the set."""

    def check(self) -> None:
        """Check that the images come from one place."""
        if self.data and self.checkpoint:
            raise InputError(
                f"method.data is '{self.data}' and method.checkpoint '{self.checkpoint}'; give one of them."
            )

    @property
    def data_set(self) -> str | None:
        """Name or path of the labelled images, where they are given."""
        return self.data or None

    def fit(
        self, teacher: Teacher, run: Run, *, distill_steps: int = 0, fitted: dict[str, Tensor] | None = None
    ) -> Surrogate:
        """Read the images or the checkpoint; nothing is learnt.

        Raises:
            InputError: neither is named, or it does not fit the teacher.
            MissingExtraError: a checkpoint is named, and the library is not installed.
        """
        del distill_steps, fitted
        source: GivenSamples | BigGANSource
        if self.data:
            source = GivenSamples(self.data, self.limit, self.batch_size, teacher.spec, run)
            if not source.labelled:
                raise InputError(f"data set '{self.data}' has no labels; samples of a generator are of known classes.")
        elif self.checkpoint:
            source = BigGANSource(self, teacher, run)
        else:
            raise InputError(
                "method biggan needs samples or a generator: --set method.data=SET (an .npz or a folder), or "
                f"--set method.checkpoint=DIR ({CONFIG} and {WEIGHTS} of {LIBRARY})."
            )
        return Surrogate(source, teacher.network)


class GivenSamples(ImagePool):
    """Ready-made samples; their labels are what the generator was asked for."""

    true_labels = False


class BigGANSource(Stateless):
    """Makes images of uniform labels with a pretrained generator."""

    data_free = False
    true_labels = False
    asks_labels = True

    def __init__(self, settings: BigGAN, teacher: Teacher, run: Run) -> None:
        self.spec, self.seed, self.device = teacher.spec, run.seed, run.device
        self.truncation, self.batch_size = settings.truncation, settings.batch_size
        network = load_biggan(Path(settings.checkpoint), teacher.spec, teacher.name)
        self.network = network.to(self.device)

    def sample(self, count: int, batch_size: int = 100, name: str = "sample") -> Iterator[Batch]:
        """Stream `count` images."""
        for index, start in enumerate(range(0, count, batch_size)):
            yield self._draw(name, index, min(batch_size, count - start))

    def batch(self, step: int, student: nn.Module | None) -> Batch:
        """Return the batch of a distillation step."""
        del student
        return self._draw("distill", step, self.batch_size)

    @torch.no_grad()
    def sample_labels(self, labels: Tensor) -> Tensor:
        """Return one image for each label [N]: [N, C, H, W]."""
        return self._make(labels.to(self.device), stream(self.seed, "grid", 0, self.device))

    @torch.no_grad()
    def _draw(self, name: str, step: int, count: int) -> Batch:
        random = stream(self.seed, name, step, self.device)
        labels = torch.randint(0, self.spec.classes, (count,), generator=random, device=self.device)
        return Batch(self._make(labels, random), labels)

    def _make(self, labels: Tensor, random: torch.Generator) -> Tensor:
        noise = distributed.share(truncated_normal((len(labels), self.network.config.z_dim), self.truncation, random))
        classes = F.one_hot(distributed.share(labels), self.spec.classes).float()
        parts = zip(noise.split(CHUNK), classes.split(CHUNK), strict=True)
        return torch.cat([fit_images(self.network(z, y, self.truncation), self.spec) for z, y in parts])


def truncated_normal(shape: tuple[int, ...], truncation: float, random: torch.Generator) -> Tensor:
    """Return `truncation` times values of the standard normal distribution restricted to [-2, 2].

    Source: Brock, Donahue, Simonyan 2019, section 3.1, as the library draws them; by the inverse of the distribution.
    """
    edge = math.erf(LIMIT / math.sqrt(2))
    uniform = torch.rand(shape, generator=random, device=random.device, dtype=torch.float64)
    normal = math.sqrt(2) * torch.erfinv((2 * uniform - 1) * edge)
    return truncation * normal.float().clamp(-LIMIT, LIMIT)


def fit_images(images: Tensor, spec: ImageSpec) -> Tensor:
    """Map images in [-1, 1], [N, 3, h, w], to what the network takes, [N, 3, H, W], resized with antialiasing."""
    pixels = (images + 1) / 2
    size = (spec.height, spec.width)
    if tuple(pixels.shape[2:]) != size:
        pixels = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=True)
    return spec.normalize(pixels.clamp(0, 1))


def load_biggan(folder: Path, spec: ImageSpec, teacher: str) -> Any:
    """Return the generator of a checkpoint of pytorch-pretrained-biggan, frozen.

    Raises:
        InputError: the folder lacks a file, a file does not fit, or the generator does not fit the teacher.
        MissingExtraError: the library is not installed.
    """
    if spec.channels != 3 or not spec.is_image:
        raise InputError(f"BigGAN makes images of 3 channels; teacher '{teacher}' takes {spec.shape_text}.")
    lacking = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if lacking:
        raise InputError(f"{folder} lacks {' and '.join(lacking)}; {LIBRARY} makes checkpoints of both.")
    library = _library()
    try:
        config = library.BigGANConfig.from_json_file(str(folder / CONFIG))
        with torch.random.fork_rng(devices=[]):
            network = library.BigGAN(config)
    except (ValueError, TypeError, LookupError, RuntimeError, AttributeError) as error:
        raise InputError(f"{folder / CONFIG} does not describe a BigGAN: {error}") from error
    if spec.outputs:
        raise InputError(f"biggan makes images of classes; teacher '{teacher}' does not give one vector of logits.")
    if config.num_classes != spec.classes:
        raise InputError(
            f"{folder} makes images of {config.num_classes} classes; teacher '{teacher}' knows {spec.classes}."
        )
    load_weights(network, folder / WEIGHTS, spec, {})
    return network.requires_grad_(False).eval()


def _library() -> Any:
    try:
        import pytorch_pretrained_biggan
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"{LIBRARY} is not installed: {INSTALL}") from error
    return pytorch_pretrained_biggan
