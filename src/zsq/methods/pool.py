"""Sources that draw from a finished set of images, and what sources of all kinds share."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from zsq.runtime import distributed
from zsq.runtime.random_streams import stream
from zsq.training.loop import Run
from zsq.types import Batch


class WholeBatches:
    """A source whose batches do not go through a network in parts, and which cannot be asked for a label."""

    def sample_labels(self, labels: Tensor) -> Tensor | None:
        """Return None: images come with labels as they are drawn."""
        del labels
        return None

    def halve(self) -> bool:
        """Return False: there are no parts."""
        return False


class Stateless(WholeBatches):
    """A source that does not learn: its batches are pure functions of seed and step."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return nothing, since nothing is learnt."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore nothing."""
        del state


class PoolSource(WholeBatches, ABC):
    """Draws from a set of images that is held in memory.

    Attributes:
        labels: class of each image, int64 [N].
    """

    labels: Tensor
    asks_labels = True

    def __init__(self, run: Run, batch_size: int) -> None:
        self.seed, self.device, self.batch_size = run.seed, run.device, batch_size

    @abstractmethod
    def images(self, rows: Tensor) -> Tensor:
        """Return the images of these rows, int64 [n], as the network takes them: float [n, C, H, W]."""

    def _pick(self, rows: Tensor) -> Batch:
        return Batch(self.images(distributed.share(rows)).to(self.device), self.labels[rows].to(self.device))

    def sample(self, count: int, batch_size: int = 100, name: str = "sample") -> Iterator[Batch]:
        """Stream `count` images in random order, each at most once; fewer where the set is smaller."""
        order = torch.randperm(len(self.labels), generator=stream(self.seed, name, 0))[:count]
        for rows in order.split(batch_size) if len(order) else ():
            yield self._pick(rows)

    def batch(self, step: int, student: nn.Module | None) -> Batch:
        """Return the batch of a distillation step, drawn with replacement."""
        del student
        random = stream(self.seed, "distill", step)
        return self._pick(torch.randint(0, len(self.labels), (self.batch_size,), generator=random))
