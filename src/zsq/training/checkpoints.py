"""What a training phase leaves in the run's folder: its checkpoint, and a line of metrics every few steps."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from zsq.errors import InputError
from zsq.runtime import distributed
from zsq.runtime.files import load_tensors, replacing, save_tensors, writing
from zsq.training.learner import Learner

CHECKPOINT_SECONDS = 30.0
"""Seconds between checkpoints, and more where writing them would take more than `CHECKPOINT_SHARE` of the time."""

CHECKPOINT_SHARE = 0.02

METRICS = "metrics.jsonl"


@dataclass(slots=True)
class Checkpoints:
    """Checkpoint and metrics of one phase; of several processes, the first alone reads and writes the folder."""

    folder: Path | None
    """The run's; None keeps nothing."""
    phase: str
    every: int | None
    """Steps between checkpoints; None saves every 30 seconds, or in 2 % of the time."""
    saved_at: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    """What the latest checkpoint took to write."""

    @property
    def path(self) -> Path | None:
        """Where the checkpoint is kept."""
        return self.folder / "checkpoints" / f"{self.phase}.safetensors" if self.folder else None

    def resume(self, learner: Learner) -> int:
        """Restore the learner where there is a checkpoint, so that all processes start alike; return the next step.

        Raises:
            InputError: the file is damaged, or is no checkpoint of this learner.
        """
        path, first = self.path, 0

        def stored() -> tuple[dict[str, Tensor], dict[str, str]] | None:
            if path is not None and path.exists():
                return load_tensors(path)
            if distributed.processes() == 1:
                return None
            return {name: value.detach().cpu() for name, value in learner.state_dict().items()}, {"step": "0"}

        found = distributed.on_main(stored)
        if found is not None:
            try:
                learner.load_state_dict(found[0])
                first = int(found[1]["step"])
            except (LookupError, RuntimeError, ValueError) as error:
                raise InputError(f"{path} is no checkpoint of this run; --overwrite starts anew.") from error
        if self.folder is not None and distributed.is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            _forget_metrics(self.folder / METRICS, self.phase, first)
        return first

    def due(self, done: int, logged: bool) -> bool:
        """Tell whether a checkpoint is due after `done` steps; one that takes long is written less often."""
        if self.every is not None:
            return done % self.every == 0
        if distributed.processes() > 1 and not logged:  # clocks differ, and all must read losses at the same steps
            return False
        return time.monotonic() - self.saved_at > max(CHECKPOINT_SECONDS, self.seconds / CHECKPOINT_SHARE)

    def save(self, learner: Learner, step: int) -> None:
        """Write the learner's state; `step` is the next one to take."""
        begin = time.monotonic()
        if self.path is not None and distributed.is_main():
            save_tensors(self.path, learner.state_dict(), {"step": str(step)})
        self.saved_at = time.monotonic()
        self.seconds = self.saved_at - begin

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append a line of metrics: losses and learning rates."""
        if self.folder is not None and distributed.is_main():
            line = json.dumps({"phase": self.phase, "step": step, **values})
            path = self.folder / METRICS
            with writing(path), path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def _forget_metrics(path: Path, phase: str, last_step: int) -> None:
    """Drop the lines of steps that a resumed run will take again, and a line that a kill cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            again = record["phase"] == phase and record["step"] > last_step
        except (json.JSONDecodeError, LookupError, TypeError):
            continue
        if not again:
            kept.append(line)
    with replacing(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
