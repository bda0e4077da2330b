"""The one loop: random streams, schedule, checkpoint and resume, progress, and the check that losses stay finite."""

import hashlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from zsq.errors import InputError, NumericsError
from zsq.runtime import distributed
from zsq.runtime.cuda_graphs import forgetting
from zsq.runtime.memory import kept_memory

CHECKPOINT_SECONDS = 30.0
"""Seconds between checkpoints, and more where writing them would take more than `CHECKPOINT_SHARE` of the time."""

CHECKPOINT_SHARE = 0.02

FLUSH_EVERY = 10
"""Steps between two reads of the losses: on a GPU, each read waits for the device."""


def stream(seed: int, name: str, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return the random generator that is a pure function of (seed, name, step), so that no state is ever stored."""
    digest = hashlib.sha256(f"{seed}/{name}/{step}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes its place only if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors, whole or not at all."""
    stored, storages = {}, set[int]()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != value.nbytes:  # safetensors takes no shared memory
            value = value.clone()
        storages.add(value.untyped_storage().data_ptr())
        stored[name] = value
    with replacing(path) as temporary:
        save_file(stored, temporary, metadata)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what `save_tensors` wrote: tensors and metadata.

    Raises:
        InputError: the file is damaged or missing.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a readable safetensors file: {error}.") from error


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put a prefix before each name."""
    return {f"{prefix}.{name}": value for name, value in tensors.items()}


def part(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Select what `under` named, without the prefix."""
    return {k.removeprefix(f"{prefix}."): v for k, v in tensors.items() if k.startswith(f"{prefix}.")}


@runtime_checkable
class Learner(Protocol):
    """What the loop drives: one step, and a state to save."""

    def step(self, step: int) -> dict[str, Tensor]:
        """Do step `step` and return its losses as scalars."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return all that later steps depend on, flat."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        ...


Say = Callable[[str], None]
"""Called with a line that the user should read."""


class Progress(Protocol):
    """Where progress is shown."""

    def update(self, phase: str, done: int, total: int, values: dict[str, float]) -> None:
        """Show that `done` of `total` steps of `phase` are finished, with the latest values."""
        ...


@contextmanager
def held_signals() -> Iterator[list[int]]:
    """Hold SIGINT and SIGTERM back until the block ends, so that a step can be finished and saved.

    Yields the signals received; the block is to look at them and end. A second one takes effect at once. Outside of the
    main thread, where Python delivers no signals, none are held.
    """
    received: list[int] = []
    before: dict[int, Any] = {}

    def restore() -> None:
        for number in list(before):
            signal.signal(number, before.pop(number))

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        if received:
            restore()
            signal.raise_signal(number)
        received.append(number)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if handler not in (None, signal.SIG_IGN):
                before[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        restore()
    if received:
        signal.raise_signal(received[0])


@contextmanager
def clear_memory_errors() -> Iterator[None]:
    """Turn a device that runs out of memory into an expected fault; also a decorator.

    Raises:
        InputError: it does.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(
            "the device has too little memory for this network; --device cpu, a smaller --set method.batch_size=N or "
            f"images of fewer pixels may fit. ({str(error).splitlines()[0]})"
        ) from error


class Silent:
    """Shows nothing."""

    def update(self, phase: str, done: int, total: int, values: dict[str, float]) -> None:
        """Do nothing."""
        del phase, done, total, values


class Run:
    """One run: its seed, device and folder, and the loop that trains within it.

    Where several processes share the run, all train, and the first alone reads and writes the folder.

    Args:
        folder: where checkpoints and metrics go; None keeps neither.
        seed: of every random stream.
        device: where networks live.
        checkpoint_steps: steps between checkpoints; None saves every 30 seconds, or in 2 % of the time.
        progress: where progress is shown.
        say: called with lines that the user should read.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        checkpoint_steps: int | None = None,
        progress: Progress | None = None,
        say: Say = lambda text: None,
    ) -> None:
        if checkpoint_steps is not None and checkpoint_steps < 1:
            raise InputError(f"checkpoint-every is {checkpoint_steps}; it must be at least 1 step.")
        self.folder = folder
        self.seed = seed
        self.device = torch.device(device)
        self.checkpoint_steps = checkpoint_steps
        self.progress: Progress = progress or Silent()
        self.say = say

    def train(self, phase: str, learner: Learner, steps: int) -> None:
        """Run steps 0 to `steps` of a phase, from its checkpoint where the folder holds one.

        An interrupt (SIGINT) or a request to end (SIGTERM) takes effect after the step, and its checkpoint.

        Raises:
            NumericsError: a loss is not finite; names term and step.
        """
        first = self._resume(phase, learner)
        pending: list[tuple[int, dict[str, Tensor]]] = []
        saved, cost = time.monotonic(), 0.0
        with forgetting(), kept_memory(), held_signals() as received:
            for step in range(first, steps):
                try:
                    pending.append((step, self.take(learner, step)))
                except RuntimeError:
                    if pending:  # an earlier loss that was not finite explains what this step choked on
                        self._flush(phase, pending, steps)
                    raise
                full = len(pending) == FLUSH_EVERY
                due = step + 1 == steps or self._due(step + 1, saved, full, cost)
                if due or full:
                    self._flush(phase, pending, steps)
                    pending = []
                stop = self._stops(received, full)  # asked once: what comes later takes effect a step later
                if due or stop:
                    if pending:
                        self._flush(phase, pending, steps)
                        pending = []
                    begin = time.monotonic()
                    self._save(phase, learner, step + 1)
                    saved = time.monotonic()
                    cost = saved - begin
                if stop:
                    break

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
                halve = getattr(learner, "halve", None)
                if distributed.processes() > 1 or halve is None or not halve():
                    raise InputError(
                        f"a step does not fit into the memory of {self.device}; --set method.batch_size=N below the "
                        "one of settings.toml may."
                    ) from error
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.say(
                "WARNING: a batch does not fit into memory; it now goes through in halves. Gradients are those of the "
                "whole, batch statistics those of a part."
            )

    def each(self, phase: str, items: Iterable[Any], total: int, size: Callable[[Any], int]) -> Iterator[Any]:
        """Pass items on, showing how many of `total` are done."""
        done = 0
        for item in items:
            yield item
            done += size(item)
            self.progress.update(phase, done, total, {})

    def _stops(self, received: list[int], full: bool) -> bool:
        """Tell whether a signal ends the phase here; several processes end it after the same step."""
        if distributed.processes() == 1:
            return bool(received)
        stop = full and distributed.anywhere(bool(received), self.device)
        if stop and not received:
            received.append(signal.SIGINT)  # another process has got it
        return stop

    def _due(self, done: int, saved: float, full: bool, cost: float) -> bool:
        """Tell whether a checkpoint is due; one that takes long is written less often."""
        if self.checkpoint_steps is not None:
            return done % self.checkpoint_steps == 0
        if distributed.processes() > 1 and not full:  # clocks differ, and all must read their losses at the same steps
            return False
        return time.monotonic() - saved > max(CHECKPOINT_SECONDS, cost / CHECKPOINT_SHARE)

    def _path(self, phase: str) -> Path | None:
        return self.folder / "checkpoints" / f"{phase}.safetensors" if self.folder else None

    def _resume(self, phase: str, learner: Learner) -> int:
        path = self._path(phase)

        def stored() -> tuple[dict[str, Tensor], dict[str, str]] | None:
            if path is not None and path.exists():
                return load_tensors(path)
            if distributed.processes() == 1:
                return None
            return {name: value.detach().cpu() for name, value in learner.state_dict().items()}, {"step": "0"}

        first, found = 0, distributed.on_main(stored)  # so that all processes start alike
        if found is not None:
            try:
                learner.load_state_dict(found[0])
                first = int(found[1]["step"])
            except (LookupError, RuntimeError, ValueError) as error:
                raise InputError(f"{path} is no checkpoint of this run; --overwrite starts anew.") from error
        if path is not None and distributed.is_main():
            path.parents[1].mkdir(parents=True, exist_ok=True)
            _forget_metrics(path.parents[1] / "metrics.jsonl", phase, first)
        return first

    def _save(self, phase: str, learner: Learner, step: int) -> None:
        path = self._path(phase)
        if path is not None and distributed.is_main():
            save_tensors(path, learner.state_dict(), {"step": str(step)})

    def _flush(self, phase: str, pending: list[tuple[int, dict[str, Tensor]]], steps: int) -> None:
        names = list(pending[0][1])
        values = torch.stack([torch.stack([losses[name].float() for name in names]) for _, losses in pending]).tolist()
        for (step, _), row in zip(pending, values, strict=True):
            for name, value in zip(names, row, strict=True):
                if not math.isfinite(value):
                    raise NumericsError(
                        f"{phase}: loss '{name}' is {value} at step {step} of {steps}; "
                        "a lower learning rate (--set method.learning_rate, --set quantizer.learning_rate) may help."
                    )
        latest = dict(zip(names, values[-1], strict=True))
        self.progress.update(phase, pending[-1][0] + 1, steps, latest)
        if self.folder is not None and distributed.is_main():
            line = json.dumps({"phase": phase, "step": pending[-1][0] + 1, **latest})
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(line + "\n")


def _forget_metrics(path: Path, phase: str, last_step: int) -> None:
    """Drop the lines of steps that a resumed run will take again, and a line that a kill cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
            again = record["phase"] == phase and record["step"] > last_step
        except (json.JSONDecodeError, LookupError, TypeError):
            continue
        if not again:
            kept.append(line)
    with replacing(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in kept))
