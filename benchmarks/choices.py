"""Choices in how a ZS-CGAN step runs, each timed against the step without it in turn, and whether it pays."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from parts import counted, random_teacher, source_of
from timing import interleaved, milliseconds, ratio

from zsq.methods.zscgan import ConditionalSource
from zsq.models.teacher import Teacher

PAYS = 1.03
"""Least quotient of the times without and with a choice at which it is said to pay."""

FAULTS = (RuntimeError, OSError)
"""What a choice may end in where it does not work: those of torch.compile are RuntimeErrors."""

Step = Callable[[int], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Setup:
    """What the choices are tried on."""

    teacher: Teacher
    network: str
    """Its name in `NETWORKS`."""
    batch: int
    device: torch.device
    rounds: int
    compile_seconds: int
    """Longest time for compiling and timing together; 0 leaves it out."""

    def source(self, **settings: object) -> ConditionalSource:
        """Return an untrained source; all start alike."""
        return source_of(self.teacher, self.batch, self.device, **settings)


def channels_last(setup: Setup) -> tuple[Step, Step]:
    """Return the steps without and with channels-last weights; the second is how zsq runs."""
    other = setup.source()
    for network in (other.generator, other.teacher):
        network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return other.step, setup.source().step


def fused_adam(setup: Setup) -> tuple[Step, Step]:
    """Return the steps without and with fused Adam; the second is how zsq runs."""
    other = setup.source()
    group = other.optimizer.param_groups[0]
    capturable = setup.device.type == "cuda"
    other.optimizer = torch.optim.Adam(group["params"], lr=group["lr"], betas=group["betas"], capturable=capturable)
    return other.step, setup.source().step


def replay(setup: Setup) -> tuple[Step, Step]:
    """Return the steps without and with a CUDA graph; the second is how zsq runs."""
    if setup.device.type != "cuda":
        raise RuntimeError("only GPUs have CUDA graphs")
    other = setup.source()
    other.replays.on = False
    return other.step, setup.source().step


def bfloat16(setup: Setup) -> tuple[Step, Step]:
    """Return the steps without and with generator and teacher under bfloat16 autocast."""
    return setup.source().step, setup.source(precision="bfloat16").step


def compiled(setup: Setup) -> tuple[Step, Step]:
    """Return the steps without and with generator and teacher compiled."""
    other: Any = setup.source()
    other.generator, other.teacher = torch.compile(other.generator), torch.compile(other.teacher)
    return setup.source().step, other.step


CHOICES = {
    "channels_last": channels_last,
    "fused_adam": fused_adam,
    "replay": replay,
    "bfloat16": bfloat16,
    "compile": compiled,
}


def try_choices(setup: Setup) -> dict[str, dict[str, Any]]:
    """Time each choice; one that does not work here says why instead."""
    return {name: compile_apart(setup) if name == "compile" else _try(name, setup) for name in CHOICES}


def _try(name: str, setup: Setup) -> dict[str, Any]:
    try:
        without, with_it = CHOICES[name](setup)
        losses = without(0)
        start = time.perf_counter()
        others = with_it(0)
        ready = time.perf_counter() - start
        times = interleaved({"without": counted(without), "with": counted(with_it)}, setup.rounds, setup.device)
    except FAULTS as error:
        return {"skipped": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"}
    gain = ratio(times, "without", ["with"])
    bns = float(losses["bns"])
    return {
        "milliseconds": milliseconds(times),
        "gain": gain,
        "pays": gain >= PAYS,
        "bns_change": round((float(others["bns"]) - bns) / max(abs(bns), 1e-9), 6),
        "first_step_seconds": round(ready, 2),
    }


def compile_apart(setup: Setup) -> dict[str, Any]:
    """Try compiling in a process of its own, with an empty cache, which is ended when its time is over."""
    if not setup.compile_seconds:
        return {"skipped": "left out; --compile-seconds 300 tries it"}
    if not hasattr(os, "killpg"):
        return {"skipped": "this system cannot end a compiler that takes too long"}
    task = {
        "network": setup.network,
        "batch": setup.batch,
        "device": setup.device.type,
        "rounds": setup.rounds,
        "threads": torch.get_num_threads(),
    }
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        child = subprocess.Popen(
            [sys.executable, __file__, json.dumps(task)],
            env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            output, faults = child.communicate(timeout=setup.compile_seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # the child and its compilers
            child.communicate()
            return {"skipped": f"not done after {setup.compile_seconds} s"}
    if child.returncode:
        return {"skipped": (faults.strip().splitlines() or [f"ended with {child.returncode}"])[-1][:200]}
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def main() -> None:
    """Compile and time as the first argument says, and print what was found."""
    task = json.loads(sys.argv[1])
    torch.set_num_threads(task["threads"])
    device = torch.device(task["device"])
    setup = Setup(random_teacher(task["network"], device), task["network"], task["batch"], device, task["rounds"], 0)
    print(json.dumps(_try("compile", setup)))


def describe(choices: dict[str, dict[str, Any]]) -> str:
    """Say of each choice what it costs and whether it pays."""
    lines = []
    for name, found in choices.items():
        if "skipped" in found:
            lines.append(f"  {name:14s} skipped: {found['skipped']}")
            continue
        times = found["milliseconds"]
        compiling = f", ready after {found['first_step_seconds']} s" if name == "compile" else ""
        lines.append(
            f"  {name:14s} {times['without']:9.2f} ms without, {times['with']:9.2f} ms with: {found['gain']:.2f}x, "
            f"{'pays' if found['pays'] else 'does not pay'}; BN loss {100 * found['bns_change']:+.2f} %{compiling}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
