"""What `-v` says beside the lines that everybody reads: what a run starts from, and where it lost time and accuracy."""

from collections.abc import Iterator

import torch

from zsq.runs.job import Job
from zsq.runs.record import Record
from zsq.runs.settings import to_tables
from zsq.runtime.versions import version_line

WORST = 5
"""Layers that are named."""


def start_details(job: Job) -> Iterator[str]:
    """Yield versions, machine, network and all settings, chosen or default."""
    teacher, spec = job.teacher, job.teacher.spec
    yield version_line()
    yield f"{job.run.device.type}, {torch.get_num_threads()} threads, seed {job.run.seed}, folder {job.folder}"
    weights = sum(value.numel() for value in teacher.network.parameters())
    yield f"{teacher.name}: {weights:,} parameters; takes {spec}; weights {teacher.weights_source}"
    for section, values in to_tables(job.settings).items():
        yield f"{section}: " + ", ".join(f"{name}={value}" for name, value in values.items())


def end_details(record: Record) -> Iterator[str]:
    """Yield the seconds of each phase, how the check compared, and the layers whose rounding moves the answers most."""
    yield "seconds: " + ", ".join(f"{name} {seconds:g}" for name, seconds in record.seconds_by_phase.items())
    check = record.verification
    yield (
        f"check: the file's answers lie {check.distance_literal_steps:.3g} quantization steps from the simulation's, "
        f"the order of additions alone moves them {check.noise_steps:.3g}; clear images are {check.margin_steps:.3g} "
        "steps from another class"
    )
    for layer in sorted(record.layers, key=lambda layer: -layer.damage)[:WORST]:
        noise = "" if layer.sqnr is None else f", {layer.sqnr:.1f} dB above its noise"
        gap = "" if layer.batch_norm_gap is None else f", batch norm {layer.batch_norm_gap:.2g} nats away"
        yield f"layer {layer.name}: {layer.damage:.0f} % of what rounding moves{noise}{gap}"
