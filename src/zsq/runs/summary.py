"""What a user wants to know of a run, in a few lines."""

from collections.abc import Iterator

from zsq.evaluation.accuracy import Difference
from zsq.evaluation.measures import Measure
from zsq.export.profile import Kind, Profile
from zsq.quantization.coverage import Coverage, listed
from zsq.reports.text_tables import percent
from zsq.runs.record import Record
from zsq.targets import target_of

SHARES = ("same class", "pixel accuracy", "top-1", "verification accuracy")
"""Measures that are shown in percent."""


def summary_rows(record: Record) -> Iterator[tuple[str, str]]:
    """Yield name and text of each line."""
    yield "network", f"{record.model} (weights: {record.weights}, sha256 {record.weights_sha256[:12]})"
    kind = "data-free" if record.data_free else "uses real images"
    scheme = f"{record.quantizer}, bits {record.bits}, activation scope {record.activation_scope}"
    yield "method", f"{record.method} ({kind}), {scheme}"
    if record.target != "onnxruntime":
        yield "target", target_of(record.target).title
    yield from _accuracy_rows(record)
    if (covered := record.coverage) is not None:
        yield "in integers", _covered(covered)
    check, target = record.verification, target_of(record.target)
    optimized = f" ({percent(check.agreement_optimized)} % with the runtime's optimisations)"
    clear = f"{percent(check.decided_agreement)} % of {check.num_decided} clear images, "
    of_all = f"{percent(check.agreement_literal)} % of all {check.num_images}"
    if check.by_distance:
        clear, of_all = (
            "",
            f"{percent(check.agreement_literal)} % of the values of {check.num_images} images, to a step",
        )
    yield (
        "file against simulation",
        f"{clear}{of_all}{optimized if target.suffix == '.onnx' and target.keeps_pairs else ''}",
    )
    if check.lowered_percent is not None:
        yield "lowered to XNNPACK", f"{check.lowered_percent:.0f} % of the operators"
    if check.agreement_target is not None and target.suffix == ".onnx":
        yield (
            f"file in {target.title}",
            f"{percent(check.decided_agreement_target)} % of the clear images, "
            f"{percent(check.agreement_target)} % of all",
        )
    if record.profile is not None and record.profile.kernels:
        yield f"in {record.profile.runtime}", profile_text(record.profile)
    yield from _sample_rows(record)
    if record.distillation_undone:
        yield "distillation", "made it worse and is undone: the file is what calibration gave"
    if record.label_recognition is not None:
        yield "label recognition", f"{percent(record.label_recognition, 1)} % of the samples' labels"
    yield "file", f"{record.file}, {record.artifacts[record.file].bytes / 1024:.0f} KiB"
    if set(record.bits) & set("234567"):
        packed = record.settings.get("quantizer", {}).get("packed", False)
        whole, half = "widths below 8 bits are stored one value a byte", "weights of 4 bits or fewer lie two to a byte"
        yield "note", half if packed else whole
    yield "time", f"{record.seconds:.0f} s"


def _sample_rows(record: Record) -> Iterator[tuple[str, str]]:
    """Yield what samples say of the file, where the method makes any."""
    if (samples := record.samples) is not None and samples.measures:
        yield from measure_rows(samples.measures, f"{samples.num_images} samples")
    elif samples is not None:
        share, seen = samples.teacher_agreement, f"classes seen in them: {samples.num_classes}"
        known = "not known" if share is None else f"{share:.1f} %"
        yield "agreement on samples", f"{known} ({samples.num_images} samples; {seen})"


def measure_rows(measures: tuple[Measure, ...], of: str) -> Iterator[tuple[str, str]]:
    """Yield how near file and float network are in the measures of each output, `of` so many images."""
    for found in measures:
        yield f"{found.name}, {found.output}", f"{figure(found)}, against the float network on {of}"


def profile_text(profile: Profile) -> str:
    """Say how many kernels a runtime runs for the file, in what, and what share of the time."""
    kinds: list[tuple[Kind, str]] = [
        ("integers", "in integers"),
        ("float", "in float"),
        ("conversion", "conversions"),
        ("other", "other"),
    ]
    counts = [f"{count} {name}" for kind, name in kinds if (count := profile.num_kernels(kind))]
    if profile.num_operators is None:
        return f"by its rules, not run: operators {', '.join(counts)}"
    text = f"{profile.num_operators} operators run as {profile.num_kernels()} kernels: {', '.join(counts)}"
    share = profile.share("integers")
    return text if share is None else f"{text}; integers take {share:.0f} % of the time"


def difference_text(found: Difference) -> str:
    """Say how much more one network recognises than another."""
    return f"{found.mean:+.2f} points (95 % interval {found.low:+.2f} to {found.high:+.2f})"


def figure(found: Measure) -> str:
    """Return a figure with its interval: a share in percent, anything else as it is."""
    scale, digits, unit = (100, 2, " %") if found.name in SHARES else (1, 4, "")
    text = f"{scale * found.value:.{digits}f}{unit}"
    if found.low is None or found.high is None:
        return text
    return f"{text} (95 % interval {scale * found.low:.{digits}f} to {scale * found.high:.{digits}f})"


def _covered(found: Coverage) -> str:
    """Say how many weights and operations are quantized, and which are not."""
    operations, floats = found.quantized_operations, len(found.float_operations)
    text = f"{found.quantized_weights:,} of {found.quantized_weights + sum(found.float_weights.values()):,} weights, "
    text += f"{operations} of {operations + floats} operations"
    if found.float_weights:
        text += f"; float weights: {listed(found.float_weights)}"
    if found.float_operations:
        share = percent(found.float_operation_share)
        text += f"; float operations ({share} % of the arithmetic): {listed(found.float_operations)}"
    return text


def _accuracy_rows(record: Record) -> Iterator[tuple[str, str]]:
    """Yield what the data say, where there are any."""
    if not record.num_eval_images:
        return
    found = record.evaluation["quantized"]
    if found.measures:
        for name in ("float", "quantized"):
            for measure in record.evaluation[name].truths:
                yield f"{name} {measure.name}", f"{figure(measure)} on {record.num_eval_images} images of {record.data}"
        yield from measure_rows(found.measures, f"{record.num_eval_images} images of {record.data}")
        return
    if found.top1_interval is None:
        assert found.agreement_interval is not None
        low, high = found.agreement_interval
        yield (
            "agreement with teacher",
            f"{percent(record.teacher_agreement)} % of {record.num_eval_images} images without labels of {record.data} "
            f"(95 % interval {low:.2f} to {high:.2f}), {record.file}",
        )
        return
    low, high = found.top1_interval
    yield "float top-1", f"{percent(record.float_top1)} % of {record.num_eval_images} images of {record.data}"
    yield (
        "quantized top-1",
        f"{percent(record.quantized_top1)} % (95 % interval {low:.2f} to {high:.2f}), {record.file}",
    )
    if found.minus_float is not None:
        yield "quantized minus float", difference_text(found.minus_float)
    yield "simulated top-1", f"{percent(record.simulated_top1)} %"
    yield "agreement with teacher", f"{percent(record.teacher_agreement)} %"
