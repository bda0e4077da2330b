"""The training loop: steps, checkpoints, progress, and the check that losses stay finite."""

import logging
import math
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from zsq.errors import InputError, NumericsError
from zsq.runtime import distributed
from zsq.runtime.cuda_graphs import forgetting
from zsq.runtime.memory import kept_memory
from zsq.runtime.observer import Observer, Silent
from zsq.runtime.signals import held_signals
from zsq.training.checkpoints import Checkpoints
from zsq.training.learner import Learner
from zsq.training.log import Log, NoLog
from zsq.types import SampleSource

LOG_EVERY = 10
"""Steps between two reads of the losses: on a GPU, each read waits for the device."""

LOWER_RATE = "a lower learning rate (--set method.learning_rate, --set quantizer.learning_rate) may help"

Item = TypeVar("Item")

logger = logging.getLogger(__name__)


class Run:
    """One run: its seed, device and folder, and the loop that trains within it.

    Where several processes share the run, all train, and the first alone reads and writes the folder.

    Args:
        folder: where checkpoints and metrics go; None keeps neither.
        seed: of every random stream.
        device: where networks live.
        checkpoint_steps: steps between checkpoints; None saves every 30 seconds, or in 2 % of the time.
        observer: is told how far the work is; None: nobody is.
        log: is told losses and rates, and shown samples; None: nothing is.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        checkpoint_steps: int | None = None,
        observer: Observer | None = None,
        log: Log | None = None,
    ) -> None:
        if checkpoint_steps is not None and checkpoint_steps < 1:
            raise InputError(f"checkpoint-every is {checkpoint_steps}; it must be at least 1 step.")
        self.folder = folder
        self.seed = seed
        self.device = torch.device(device)
        self.checkpoint_steps = checkpoint_steps
        self.observer: Observer = observer or Silent()
        self.log: Log = log or NoLog()

    def train(
        self,
        phase: str,
        learner: Learner,
        steps: int,
        until: Callable[[int], bool] | None = None,
        shown: SampleSource | None = None,
    ) -> None:
        """Run steps 0 to `steps` of a phase, from its checkpoint where the folder holds one.

        An interrupt (SIGINT) or a request to end (SIGTERM) takes effect after the step, and its checkpoint.

        Args:
            phase: its name.
            learner: takes the steps.
            steps: most steps.
            until: told how many are done; true ends the phase. It depends on nothing but the learner's state.
            shown: the log gets pictures of its samples.

        Raises:
            NumericsError: a loss is not finite; names term and step.
        """
        checkpoints = Checkpoints(self.folder, phase, self.checkpoint_steps)
        log = _Losses(self, checkpoints, learner, steps)
        first = checkpoints.resume(learner)
        with forgetting(), kept_memory(), self._logged(phase, first, steps), held_signals() as received:
            for step in range(first, steps):
                try:
                    log.add(step, self.take(learner, step))
                except RuntimeError:
                    log.flush()  # an earlier loss that was not finite explains what this step choked on
                    raise
                full = log.is_full
                done = steps if until is not None and until(step + 1) else step + 1
                due = done == steps or checkpoints.due(done, full)
                if due or full:
                    log.flush()
                stop = self._stops(received, full)  # asked once: what comes later takes effect a step later
                if due or stop:
                    log.flush()
                    self._check_state(phase, learner, step, steps)
                    checkpoints.save(learner, done)
                if shown is not None and (due or full):
                    self.log.show(step + 1, shown)
                if stop or done == steps:
                    break

    @contextmanager
    def _logged(self, phase: str, first: int, steps: int) -> Iterator[None]:
        """Keep the log of a phase open within the block; of one that was finished before, nothing is told again."""
        if first >= steps:
            yield
            return
        self.log.begin(phase, first, steps)
        try:
            yield
        finally:
            self.log.end()

    def take(self, learner: Learner, step: int) -> dict[str, Tensor]:
        """Do a step; where its batch does not fit into the device's memory, again with the batch in halves.

        Raises:
            InputError: it does not fit in the smallest parts either.
        """
        while True:
            try:
                with distributed.together():
                    return learner.step(step)
            except torch.OutOfMemoryError as error:
                if distributed.processes() > 1 or not learner.halve():
                    raise InputError(
                        f"a step does not fit into the memory of {self.device}; --set method.batch_size=N below the "
                        "one of settings.toml may."
                    ) from error
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            logger.warning(
                "a batch does not fit into memory; it now goes through in halves. Gradients are those of the whole, "
                "batch statistics those of a part."
            )

    def each(self, phase: str, items: Iterable[Item], total: int, size: Callable[[Item], int]) -> Iterator[Item]:
        """Pass items on, showing how many of `total` are done."""
        done = 0
        self.observer.update(phase, done, total, {})
        for item in items:
            yield item
            done += size(item)
            self.observer.update(phase, done, total, {})

    def _check_state(self, phase: str, learner: Learner, step: int, steps: int) -> None:
        """Refuse to keep what a step has made of finite losses: its update may be none.

        Raises:
            NumericsError: a tensor holds what is not a number; nothing is written.
        """
        state = {name: value for name, value in learner.state_dict().items() if value.is_floating_point()}
        lost = [name for name, value in state.items() if bool(value.isnan().any())]
        if lost:
            raise NumericsError(
                f"{phase}: after step {step} of {steps}, {len(lost)} of {len(state)} tensors, such as {lost[0]}, are "
                f"not numbers any more; nothing of it is kept. {LOWER_RATE}."
            )

    def _stops(self, received: list[int], full: bool) -> bool:
        """Tell whether a signal ends the phase here; several processes end it after the same step."""
        if distributed.processes() == 1:
            return bool(received)
        stop = full and distributed.anywhere(bool(received), self.device)
        if stop and not received:
            received.append(signal.SIGINT)  # another process has got it
        return stop


class _Losses:
    """Losses of steps that nobody has read yet, and where they go."""

    def __init__(self, run: Run, checkpoints: Checkpoints, learner: Learner, steps: int) -> None:
        self.run, self.checkpoints, self.learner, self.steps = run, checkpoints, learner, steps
        self.pending: list[tuple[int, dict[str, Tensor]]] = []

    @property
    def is_full(self) -> bool:
        """Whether it is time to read them."""
        return len(self.pending) == LOG_EVERY

    def add(self, step: int, losses: dict[str, Tensor]) -> None:
        """Keep the losses of a step."""
        self.pending.append((step, losses))

    def flush(self) -> None:
        """Read, check, show and write them.

        Raises:
            NumericsError: one is not finite.
        """
        if not self.pending:
            return
        names = list(self.pending[0][1])
        read = [torch.stack([losses[name].float() for name in names]) for _, losses in self.pending]
        values = torch.stack(read).tolist()
        for (step, _), row in zip(self.pending, values, strict=True):
            self._check(step, dict(zip(names, row, strict=True)))
        latest = dict(zip(names, values[-1], strict=True))
        done = self.pending[-1][0] + 1
        self.run.observer.update(self.checkpoints.phase, done, self.steps, latest)
        latest |= self.learner.rates()
        self.checkpoints.log(done, latest)
        self.run.log.add(done, latest)
        self.pending = []

    def _check(self, step: int, losses: dict[str, float]) -> None:
        for name, value in losses.items():
            if not math.isfinite(value):
                cause = (
                    LOWER_RATE if step else "nothing was learnt before it, so that the network or its images cause it"
                )
                raise NumericsError(
                    f"{self.checkpoints.phase}: loss '{name}' is {value} at step {step} of {self.steps}; {cause}."
                )
