"""The report of a run's folder, made from what the folder holds alone; nothing here runs a network."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from zsq.errors import ExportError, InputError
from zsq.evaluation.accuracy import Evaluation
from zsq.export.verify import require
from zsq.reports.html import (
    REPORT,
    Block,
    Cell,
    Drawings,
    Gallery,
    Lines,
    Page,
    Section,
    Tile,
    curve,
    picture,
    table,
    tiles,
    write_page,
)
from zsq.runs.losses import Losses
from zsq.runs.recipe_file import read_toml
from zsq.runs.record import RECORD, Record
from zsq.runs.samples import SAMPLES, SampleGrid
from zsq.runs.settings_file import SETTINGS
from zsq.runs.stages import LOW_RECOGNITION
from zsq.runs.summary import difference_text, figure, profile_text, summary_rows
from zsq.targets import target_of
from zsq.training.checkpoints import METRICS

CLOSE = 1.0
"""Points below the float network up to which a file counts as as good."""
FAR = 5.0
"""Points below it from which a file counts as poor."""
GOOD_AGREEMENT, POOR_AGREEMENT = 98.0, 80.0
"""Percent of unlabelled images on which file and float network agree: ends between which a file counts as fair."""
NARROW = frozenset("23")
"""Widths at which samples agree more often than real images do."""

LITTLE = (
    "This tells little: on networks not seen before, agreement on samples was up to 30 points off where the float "
    "network did not recognise their labels, and too high at INT3. Real images of the kind that the network will see "
    "tell more, with labels or without: zsq evaluate --file RUN --data SET."
)


def write_report(folder: Path) -> Path:
    """Write `report.html` to a run's folder from its records, and return its path.

    A run that has not finished, or whose files are damaged, gets what is there, and is told what is missing.

    Raises:
        InputError: the folder holds no run.
    """
    if not any((folder / name).exists() for name in (RECORD, SETTINGS, METRICS, SAMPLES)):
        raise InputError(f"{folder} holds no run: neither {RECORD} nor {SETTINGS} is there.")
    path = folder / REPORT
    write_page(page_of(folder), path)
    return path


def page_of(folder: Path) -> Page:
    """Return the page of a run's folder."""
    missing: list[str] = []
    record = None
    try:
        record = Record.read(folder)
    except (InputError, OSError, UnicodeDecodeError) as error:
        missing.append(str(error))
    settings = _settings(folder, missing)
    sections = [
        *_warnings(record),
        *_of_record(record),
        *_samples(folder, missing),
        *_curves(folder, missing),
        *_layers(record),
    ]
    sections += [*_profile(record), *_floats(record), *_run(record), *_origin(folder, settings, record)]
    if missing:
        sections.insert(0, Section("What is missing", (Lines(tuple(missing)),)))
    name = record.model if record else str(settings.get("teacher", {}).get("model", folder.name))
    level, verdict, reasons = verdict_of(record) if record else ("weak", "No finished run.", tuple(missing[:1]))
    return Page(f"zsq: {name}", _subtitle(record, settings), level, verdict, reasons, tuple(sections))


def _settings(folder: Path, missing: list[str]) -> dict[str, Any]:
    try:
        return read_toml(folder / SETTINGS)
    except (InputError, OSError) as error:
        missing.append(str(error))
        return {}


def _subtitle(record: Record | None, settings: dict[str, Any]) -> str:
    if record is None:
        method, quantizer = (settings.get(name, {}) for name in ("method", "quantizer"))
        return f"method {method.get('name', 'unknown')}, {quantizer.get('name', 'unknown')}"
    free = "no training data used" if record.data_free else "real images used"
    return f"bits {record.bits}, {record.quantizer}, method {record.method} ({free}), for {record.target}"


Judged = tuple[str, str, tuple[str, ...]]


def verdict_of(record: Record) -> Judged:
    """Return level, verdict and reasons, as strong as what they rest on."""
    try:
        require(record.verification)
    except ExportError as error:
        return "poor", "Do not use this file.", (str(error),)
    found = record.evaluation.get("quantized")
    if found is None:
        return _on_samples(record)
    if found.top1 is not None and record.float_top1 is not None:
        return _on_labels(record, found)
    return _on_images(record, found)


def _on_labels(record: Record, found: Evaluation) -> Judged:
    assert found.top1 is not None
    assert record.float_top1 is not None
    assert found.top1_interval is not None
    low, high = found.top1_interval
    reasons: tuple[str, ...] = (
        f"On {found.num_images} labelled images the file recognises {found.top1:.2f} % (95 % interval {low:.2f} to "
        f"{high:.2f}), the float network {record.float_top1:.2f} %.",
    )
    lost, least, most = record.float_top1 - found.top1, record.float_top1 - high, record.float_top1 - low
    if (paired := found.minus_float) is not None:
        least, most = -paired.high, -paired.low
        reasons = (*reasons, f"Image by image, that is {difference_text(paired)}.")
    if least > CLOSE:
        return "poor" if least > FAR else "fair", f"Loses {lost:.1f} points of accuracy.", reasons
    unsure = (f"So few images leave open whether it loses more than {CLOSE:g} point in general.",)
    if lost > CLOSE:
        return "fair", f"Loses {lost:.1f} points on these images.", (*reasons, *unsure)
    headline = "Within one point of the float network on these images."
    if most > CLOSE:
        return "fair", headline, (*reasons, *unsure)
    return "good", headline, reasons


def _on_images(record: Record, found: Evaluation) -> Judged:
    agreement = found.teacher_agreement or 0.0
    interval = found.agreement_interval
    of = "" if interval is None else f" (95 % interval {interval[0]:.2f} to {interval[1]:.2f})"
    reasons = [f"On {found.num_images} images of {record.data}, file and float network agree to {agreement:.2f} %{of}."]
    reasons += [f"{name}, {m.name}: {figure(m)}." for name in record.evaluation for m in record.evaluation[name].truths]
    if not found.truths:
        reasons.append("The images have no labels, so this is agreement with the float network, not accuracy.")
    if agreement >= GOOD_AGREEMENT:
        return "good", "Answers as the float network does on these images.", tuple(reasons)
    if agreement >= POOR_AGREEMENT:
        return "fair", f"Agrees with the float network to {agreement:.1f} %.", tuple(reasons)
    return "poor", f"Agrees with the float network to only {agreement:.1f} %.", tuple(reasons)


def _on_samples(record: Record) -> Judged:
    samples, reasons = record.samples, []
    if samples is None:
        reasons.append("The method makes no images, so that nothing was measured but the file's arithmetic.")
    elif samples.teacher_agreement is None:
        reasons.append(
            f"The float network sees too few classes in the samples to tell anything ({samples.num_classes})."
        )
    else:
        reasons.append(
            f"File and float network agree to {samples.teacher_agreement:.1f} % on {samples.num_images} samples."
        )
    if record.label_recognition is not None:
        reasons.append(f"The float network recognises {record.label_recognition:.1f} % of the samples' labels.")
    if set(record.bits) & NARROW:
        reasons.append("At so few bits, samples agree more often than real images do.")
    return "weak", "Not measured on any real image.", (*reasons, LITTLE)


def _share(value: float | None, interval: tuple[float, float] | None = None) -> Cell:
    if value is None:
        return Cell("-")
    return Cell(f"{value:.2f} %" + ("" if interval is None else f" ({interval[0]:.2f} to {interval[1]:.2f})"), value)


def _of_record(record: Record | None) -> Iterator[Section]:
    """Yield float against file."""
    if record is None:
        return
    columns: dict[str, list[Cell]] = {
        "top-1 (95 % interval)": [_share(e.top1, e.top1_interval) for e in record.evaluation.values()],
        "top-5": [_share(e.top5) for e in record.evaluation.values()],
        "agreement with float (95 % interval)": [
            Cell("-") if name == "float" else _share(e.teacher_agreement, e.agreement_interval)
            for name, e in record.evaluation.items()
        ],
    }
    known = {head: cells for head, cells in columns.items() if any(cell.value is not None for cell in cells)}
    head, rows = ["network", *known], list(zip(record.evaluation, *known.values(), strict=True))
    measures = [
        [name, m.output, m.name, against, figure(m)]
        for name, e in record.evaluation.items()
        for against, found in (("what is true", e.truths), ("float", e.measures))
        for m in found
    ]
    blocks: list[Block] = [table(head, rows)] if known and not measures else []
    blocks += [table(["network", "output", "measure", "against", "value"], measures)] if measures else []
    blocks += _deployed(record)
    if blocks:
        yield Section("Float against file", tuple(blocks))


def _run(record: Record | None) -> Iterator[Section]:
    """Yield the run in words."""
    if record is not None:
        yield Section("The run", (table(["", "value"], list(map(list, summary_rows(record)))),))


def _deployed(record: Record) -> Iterator[Block]:
    """Yield size and latency of the file and of the float network."""
    if (took := record.latency) is None or record.file not in record.artifacts:
        return
    size = record.artifacts[record.file].bytes
    own = target_of(record.target).runs_in
    rows: list[list[Cell | str]] = [[f"{record.file} in {own}", *_deployment(size, took.file), Cell("-")]]
    if took.float_file is not None and took.float_bytes is not None:
        times = took.float_file / max(took.file, 1e-9)
        rows[0][3] = Cell(f"{times:.2f} times as fast, {took.float_bytes / size:.2f} times smaller")
        own = took.float_runtime
        rows.append([f"float in {own}", *_deployment(took.float_bytes, took.float_file), Cell("")])
    yield table(["one image, one thread", "size", "latency", "against float"], rows)
    note = ("Measured once and briefly on the machine of the run.", *([f"{took.note}."] if took.note else []))
    yield Lines(note)


def _deployment(size: int, milliseconds: float) -> tuple[Cell, Cell]:
    return Cell(f"{size / 1024:,.0f} KiB", size), Cell(f"{milliseconds:.3g} ms", milliseconds)


def _samples(folder: Path, missing: list[str]) -> Iterator[Section]:
    path = folder / SAMPLES
    if not path.exists():
        return
    grid = None
    try:
        grid = SampleGrid.read(folder)
    except InputError as error:
        missing.append(str(error))
    title = "Images that stood in for the training data"
    try:
        if grid is None or not (grid.labels or grid.seen):
            with Image.open(path) as image:
                image.verify()
            yield Section("Samples", (picture(path, "synthetic images"),), f"{title}.")
            return
        shown = len(grid.seen[0]) if grid.seen else grid.columns
        found = tiles(path, grid.rows, grid.columns, shown)
    except (OSError, SyntaxError, ValueError) as error:
        missing.append(f"{SAMPLES} cannot be read: {error}.")
        return
    if not grid.labels:
        of_rows = map(_tiles, itertools.repeat(grid), found, grid.seen)
        note = f"{title}; they were made for no class in particular. Below each, the class that the float network sees."
        yield Section("Samples", (Gallery((("", "", tuple(itertools.chain(*of_rows))),)),), note)
        return
    rows = tuple(_sample_row(grid, row, sources) for row, sources in enumerate(found))
    spread = "" if grid.labels == tuple(range(len(rows))) else "; of all classes, ten spread evenly"
    note = f"{title}, a row a class{spread}."
    if grid.seen:
        note += " Below each, the class that the float network sees, with a cross where it is another one."
    yield Section("Samples", (Gallery(rows),), note)


def _sample_row(grid: SampleGrid, row: int, sources: list[str]) -> tuple[str, str, tuple[Tile, ...]]:
    """Return a class, how many of its images the network recognises, and the images."""
    wanted = grid.labels[row]
    name = _class_name(grid, wanted)
    if not grid.seen:
        return name, "", tuple(Tile(source) for source in sources)
    found = _tiles(grid, sources, grid.seen[row], wanted)
    if not found:
        return name, "no such image was drawn", ()
    return name, f"{sum(not tile.marked for tile in found)} of {len(found)} recognised", found


def _tiles(
    grid: SampleGrid, sources: list[str], seen: tuple[int | None, ...], wanted: int | None = None
) -> tuple[Tile, ...]:
    """Return images with what the network sees in them, marked where it is another class than the wanted one."""
    found = []
    for source, label in zip(sources, seen, strict=True):
        if label is not None:
            wrong = wanted is not None and label != wanted
            found.append(Tile(source, "✗ " * wrong + _class_name(grid, label), marked=wrong))
    return tuple(found)


def _class_name(grid: SampleGrid, label: int) -> str:
    return grid.names.get(label, f"class {label}")


def _curves(folder: Path, missing: list[str]) -> Iterator[Section]:
    """Yield the losses of each phase; lines that are damaged are left out."""
    losses = Losses(folder)
    if losses.damaged:
        missing.append(f"{losses.damaged} lines of {METRICS} cannot be read.")
    for phase, terms in losses.items():
        drawn = tuple(curve(name, *zip(*points, strict=True)) for name, points in terms.items())
        gaps = [name for name, points in terms.items() if any(not math.isfinite(y) for _, y in points)]
        note = f"Not finite at some steps: {', '.join(gaps)}. A lower learning rate may help." if gaps else ""
        yield Section(f"Losses: {phase}", (Drawings(drawn),), note)


def _warnings(record: Record | None) -> Iterator[Section]:
    """Yield what the record gives reason to warn of, and what to do."""
    if record is None:
        return
    found = []
    if (covered := record.coverage) is not None and (text := covered.warning()):
        found.append(f"{text[0].upper()}{text[1:]} The section 'What stayed in float' lists it all.")
    if (share := record.label_recognition) is not None and share < LOW_RECOGNITION:
        found.append(
            f"The float network recognises {share:.1f} % of the samples' labels: the samples do not show its classes. "
            "A longer --budget, another --method or real images without labels (--method real) may help."
        )
    if record.distillation_undone:
        found.append("Distillation made it worse and is undone; try --quantizer ptq, more samples or more bits.")
    found += [f"The target's rules are broken: {rule}" for rule in record.verification.broken_rules]
    if found:
        yield Section("Warnings", (Lines(tuple(found)),))


def _layers(record: Record | None) -> Iterator[Section]:
    """Yield what rounding does to each layer."""
    if record is None or not record.layers:
        return
    most = max([layer.damage for layer in record.layers] + [1e-9])
    rows: list[list[Cell | str]] = [
        [
            Cell(f"{index}", index),
            layer.name,
            Cell(f"{layer.damage:.1f} %", layer.damage, layer.damage / most),
            _number(layer.sqnr, " dB", 1),
            _number(layer.batch_norm_gap, "", 3),
            _number(layer.weight_use, " %", 0),
            _number(layer.activation_use, " %", 0),
            Cell(str(layer.weight_bits), layer.weight_bits),
            Cell(f"{layer.values:,}", layer.values),
        ]
        for index, layer in enumerate(record.layers, 1)
    ]
    header = [
        "",
        "layer",
        "share of damage",
        "SQNR",
        "batch-norm gap",
        "weight use",
        "activation use",
        "bits",
        "weights",
    ]
    note = (
        "On a few samples. Share of damage: how far the answers move when this layer alone is rounded. SQNR: signal "
        "over quantization noise behind the layer, noise of earlier layers included. Batch-norm gap: KL divergence of "
        "the samples' statistics from the stored ones, nats a channel. Use: share of the reach that weights fill, "
        "and how many of the activation's integers occur. A click on a heading sorts."
    )
    yield Section("Layers", (table(header, rows),), note)


def _number(value: float | None, unit: str, digits: int) -> Cell:
    return Cell("-") if value is None else Cell(f"{value:.{digits}f}{unit}", value)


def _profile(record: Record | None) -> Iterator[Section]:
    """Yield what the runtime does with the file."""
    if record is None or (found := record.profile) is None:
        return
    title, source = f"What {found.runtime} does with the file", f"{found.source[:1].upper()}{found.source[1:]}."
    if not found.kernels:
        yield Section(title, (), source)
        return
    whole = found.milliseconds
    header = ["operator", "computes in", "kernels", "implementation"]
    rows: list[list[Cell | str]] = [
        [kernels.name, kernels.computes, Cell(f"{kernels.count}", kernels.count), kernels.implementation or "-"]
        for kernels in found.kernels
    ]
    if whole:
        header.append("share of the time")
        for row, kernels in zip(rows, found.kernels, strict=True):
            share = (kernels.milliseconds or 0.0) / whole
            row.append(Cell(f"{100 * share:.1f} %", share, share))
    yield Section(title, (table(header, rows),), f"{profile_text(found)}. {source}")


def _floats(record: Record | None) -> Iterator[Section]:
    """Yield what stayed in float."""
    if record is None or (found := record.coverage) is None:
        return
    rows: list[list[Cell | str]] = [
        ["weight", name, Cell(f"{size:,} values", size)] for name, size in found.float_weights.items()
    ]
    most = max([*found.float_operations.values(), 0.01])
    rows += [
        ["operation", name, Cell(f"{share:.3f} % of the arithmetic", share, share / most)]
        for name, share in found.float_operations.items()
    ]
    block: Block = table(["", "name", "how much"], rows) if rows else Lines(("Nothing.",))
    yield Section("What stayed in float", (block,))


def _origin(folder: Path, settings: dict[str, Any], record: Record | None) -> Iterator[Section]:
    """Yield the command, settings, versions and hashes."""
    lines = (f"zsq quantize --recipe {SETTINGS} --out AGAIN",)
    yield Section("Repeat it", (Lines(lines, verbatim=True),), f"In {folder.name}, where {SETTINGS} lies.")
    rows = [
        [section, name, "" if value is None else str(value)]
        for section, values in settings.items()
        if isinstance(values, dict)
        for name, value in values.items()
    ]
    if rows:
        yield Section("Settings and versions", (table(["table", "name", "value"], rows),))
    if record and record.artifacts:
        files: list[list[Cell | str]] = [
            [n, Cell(f"{a.bytes:,}", a.bytes), a.sha256] for n, a in record.artifacts.items()
        ]
        yield Section("Files", (table(["file", "bytes", "sha256 of the content"], files),))
    if record:
        checks = [[name, str(value)] for name, value in asdict(record.verification).items()]
        yield Section("Check of the file against the simulation", (table(["", "value"], checks),))
