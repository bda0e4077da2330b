"""Choose a width for each weight: sensitivities on synthetic images, their frontier, and one point of it."""

import csv
import importlib.util
import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zsq.errors import InputError
from zsq.methods import Surrogate
from zsq.models.teacher import Teacher
from zsq.quantization.sensitivity import Allocation, Frontier, pareto_frontier, sensitivities, weight_sizes
from zsq.runs.job import Job
from zsq.runs.origin import completed
from zsq.runs.request import AllocateRequest, takes
from zsq.runs.settings import Settings
from zsq.runs.stages import fit
from zsq.runs.start import started
from zsq.runtime import distributed
from zsq.runtime.files import replacing
from zsq.runtime.memory import clear_memory_errors
from zsq.runtime.versions import versions
from zsq.targets import target_of

logger = logging.getLogger(__name__)

MOST_ROWS = 1000
"""Points of the frontier that are written, evenly spaced; a frontier can have a hundred thousand."""

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "kib": 2**10, "mib": 2**20}


@dataclass(frozen=True, slots=True)
class Allocated:
    """What was measured and chosen."""

    frontier: Frontier
    chosen: int
    """Index of the chosen point."""
    sensitivities: dict[str, dict[int, float]]
    """KL in nats by weight and width."""
    files: tuple[Path, ...]
    """What was written: `bits.toml`, `frontier.csv`, and `frontier.png` where matplotlib is installed."""

    @property
    def allocation(self) -> Allocation:
        """The chosen point."""
        return self.frontier.allocation(self.chosen)


@clear_memory_errors()
def allocate_request(request: AllocateRequest) -> Allocated:
    """Choose the widths of least summed sensitivity that fit a size, and write them as a file that `--bits` takes.

    The folder gets `bits.toml`, `frontier.csv` and `frontier.png` (with matplotlib, the extra `plots`), and holds the
    generator, too. Of the quantizer's settings, those of weights' grids are heeded.

    Raises:
        InputError: an argument does not fit, no allocation is small enough, or the folder holds a run already.
    """
    request = completed(request)
    tried = _checked_widths(request.widths, request.activation)
    if request.num_images < 1:
        raise InputError(f"images is {request.num_images}; at least 1 is needed.")
    _check_limits(request)

    def most_bits(teacher: Teacher, settings: Settings) -> float:
        sizes = weight_sizes(teacher.network, target_of(settings.quantizer.target))
        return _most_bits(request, sum(sizes.values()), min(tried))

    with started(request, quantizer="ptq", needs_images=True, check=most_bits) as job:
        surrogate = fit(job)
        return distributed.on_main(
            lambda: _allocate(job, request, surrogate, tried, most_bits(job.teacher, job.settings))
        )


allocate = takes(AllocateRequest)(allocate_request)


def _allocate(
    job: Job, request: AllocateRequest, surrogate: Surrogate, tried: list[int], most_bits: float
) -> Allocated:
    """Do it in the folder that the job has taken."""
    run, teacher, settings = job.run, job.teacher, job.settings
    files = tuple(job.folder / name for name in ("bits.toml", "frontier.csv", "frontier.png"))
    samples = surrogate.source.sample(request.num_images, teacher.spec.images_at_once)
    images = torch.cat([batch.images.to(run.device) for batch in samples])
    found = sensitivities(
        surrogate.network,
        images,
        tried,
        per_channel=settings.quantizer.weight_granularity == "channel",
        range_rule=settings.quantizer.weight_range_rule,
        activation_bits=request.activation,
        target=job.target,
        run=run,
    )
    frontier = pareto_frontier(found, weight_sizes(teacher.network, job.target))
    if not frontier.exact:
        logger.info(
            "the frontier has too many points; its size axis is cut into steps, so a better point may be left out"
        )
    result = Allocated(frontier, frontier.within(most_bits), found, files if can_draw() else files[:2])
    facts = {
        "network": f"{teacher.name}, weights sha256 {teacher.weights_sha256[:12]}",
        "images": f"{len(images)} of method {settings.method.name}, seed {run.seed}",
        "versions": f"zsq {versions()['zsq']}, torch {torch.__version__}",
    }
    write_bits(files[0], result, request.activation, facts)
    for path, write in zip(result.files[1:], (write_frontier, draw_frontier), strict=False):
        write(path, frontier, result.chosen)
    return result


def can_draw() -> bool:
    """Return whether matplotlib is installed, and say what brings it where it is not."""
    installed = importlib.util.find_spec("matplotlib") is not None
    if not installed:
        logger.info("frontier.png needs matplotlib: pip install 'zsq[plots]'")
    return installed


def _checked_widths(widths: Iterable[int], activation: int) -> list[int]:
    tried = sorted(set(widths))
    for width in (*tried, activation):
        if not 2 <= width <= 8:
            raise InputError(f"a width is {width}; widths from 2 to 8 work.")
    if not tried:
        raise InputError("no width is given; name those to choose from, such as 2,4,8.")
    return tried


def _check_limits(request: AllocateRequest) -> None:
    """Check that exactly one limit is given, and that it can be read."""
    if (request.average is None) == (request.size is None):
        raise InputError("an allocation needs one limit: --average BITS or --size BYTES such as 100KB.")
    if request.size is not None:
        parse_size(request.size)


def _most_bits(request: AllocateRequest, num_weights: int, narrowest: int) -> float:
    """Return how many bits all weights may take.

    Raises:
        InputError: the narrowest width does not fit.
    """
    average, size = request.average, request.size
    most_bits = average * num_weights if average is not None else 8 * parse_size(size or 0)
    if most_bits < narrowest * num_weights:
        asked = f"--average is {average:g}" if average is not None else f"--size is {size}"
        least = f"{narrowest * num_weights / 8000:.1f} KB"
        raise InputError(f"{asked}; at {narrowest} bits each, the {num_weights} weights take {least}.")
    return most_bits


def parse_size(text: str | int) -> float:
    """Read `100KB`, `64KiB`, `1.5MB` or a number as bytes.

    Raises:
        InputError: it is none of these.

    >>> parse_size("1.5KB")
    1500.0
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(text).lower())
    if not match or match[2] not in UNITS:
        raise InputError(f"--size is '{text}'; give bytes such as 100KB, 64KiB or 1.5MB.")
    return float(match[1]) * UNITS[match[2]]


def write_bits(path: Path, result: Allocated, activation: int, facts: dict[str, Any]) -> None:
    """Write the chosen widths as TOML; comments say what each weight's widths would have cost."""
    chosen, sizes = result.allocation, result.frontier.sizes
    lines = [
        "# Width of each weight in bits, for zsq quantize --bits.",
        *(f"# {name}: {value}" for name, value in facts.items()),
        f"# {chosen.bits / result.frontier.num_weights:.3f} bits a weight, {chosen.bits / 8000:.1f} KB packed, "
        f"summed sensitivity {chosen.sensitivity:.4g} nats",
        "",
        f"activation = {activation}",
        "",
        "[weights]  # values; sensitivity at each width: KL in nats with this weight alone rounded",
    ]
    for name, width in chosen.widths.items():
        costs = ", ".join(f"{bits}: {cost:.3g}" for bits, cost in result.sensitivities[name].items())
        lines.append(f"{json.dumps(name, ensure_ascii=False)} = {width}  # {sizes[name]} values; {costs}")
    with replacing(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n")


def spread(count: int, most: int, *kept: int) -> list[int]:
    """Return at most `most` indices of `count`, evenly spaced with both ends, and those in `kept` as well."""
    steps = min(count, most) - 1
    return sorted({*(round(i * (count - 1) / steps) for i in range(steps + 1) if steps), 0, *kept})


def write_frontier(path: Path, frontier: Frontier, chosen: int) -> None:
    """Write points of the frontier as CSV, one a row, with the width of each weight."""
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["bytes", "average_bits", "sensitivity", "chosen", *frontier.sizes])
        for index in spread(len(frontier), MOST_ROWS, chosen):
            point = frontier.allocation(index)
            average = f"{point.bits / frontier.num_weights:.4f}"
            sensitivity = f"{point.sensitivity:.6g}"
            rows.writerow([point.bits / 8, average, sensitivity, int(index == chosen), *point.widths.values()])


def draw_frontier(path: Path, frontier: Frontier, chosen: int) -> None:
    """Draw the frontier as a PNG, summed sensitivity against average width, the chosen point marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    panel = figure.subplots()
    indices = spread(len(frontier), MOST_ROWS, chosen)
    averages = frontier.bits[indices] / frontier.num_weights
    panel.plot(averages, frontier.sensitivity[indices], "-")
    panel.plot(frontier.bits[chosen] / frontier.num_weights, frontier.sensitivity[chosen], "o", label="chosen")
    panel.set_yscale("log")
    panel.set_xlabel("bits a weight, on average")
    panel.set_ylabel("summed sensitivity, nats")
    panel.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
