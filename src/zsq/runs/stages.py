"""The stages of a run, each a function of the job and of what the stages before it gave."""

import itertools
import logging
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zsq.data.datasets import DataSet, EvenSubset
from zsq.errors import InputError, NumericsError, ZsqError
from zsq.evaluation.accuracy import Evaluation, Predict, beside_float, evaluate_many
from zsq.export.converted import output_step
from zsq.export.files import float_operators, open_file, profile_file, require_runtime, write_file
from zsq.export.float_onnx import write_float_onnx
from zsq.export.onnx_runtime import OnnxClassifier
from zsq.export.openvino import OpenVinoClassifier
from zsq.export.profile import Profile
from zsq.export.pt2 import write_pt2
from zsq.export.verify import Verification, verify_file
from zsq.graph.trace import FOREIGN_FAULTS, described
from zsq.methods import Surrogate
from zsq.methods.labels import label_terms
from zsq.quantization import PTQ
from zsq.quantization.convert import convert
from zsq.quantization.coverage import Coverage, coverage
from zsq.quantization.layer_report import LayerReport, layer_reports
from zsq.quantization.prepare import Bits, Student, mean_weight_bits
from zsq.quantization.ptq import quantize_ptq
from zsq.quantization.quantizers import answered_shaken
from zsq.runs.fitted import GENERATOR
from zsq.runs.job import Job
from zsq.runs.record import Latency, SampleAgreement
from zsq.runs.samples import SAMPLES, keep_samples
from zsq.runtime import distributed
from zsq.runtime.files import load_tensors, replacing, save_tensors
from zsq.runtime.versions import versions
from zsq.targets import Target
from zsq.training.loop import LOWER_RATE
from zsq.types import Batch, ImageSpec, SampleSource

PROGRAM = "model.pt2"

PREDICTIONS = "predictions.npz"
"""File of the classes that file and float network name and of the true ones, int32 [N] each; of other outputs, of the
scores of both, float32 [N] each."""

FLOAT = "float "
"""There, in front of the name of a measure whose scores are the float network's."""

CHECK_IMAGES, ENOUGH_DECIDED = 500, 100
"""Samples on which the file is checked at most, and decided images after which the check ends if all agree."""

RECOGNITION_IMAGES = 1000
AGREEMENT_IMAGES = 500
LEAST_IMAGES = 100
"""Samples on which something is measured at most; as many as calibrate are enough, and no fewer than this."""

LAYER_IMAGES = 32
"""Samples on which layers are measured at most."""

LARGEST_FLOAT = 2**28
"""Bytes of weights above which no float file is written to compare with."""

LEAST_CALLS, MOST_CALLS, MOST_SECONDS = 3, 50, 0.3
"""Calls from which a latency is taken, and seconds after which no more are made."""

LOW_AGREEMENT = 80.0
"""Percent of fresh samples on which file and teacher agree, below which the file is not worth much as it is."""
MANY_CLASSES = 20
"""Samples of half as many classes, or of half of the network's where it has fewer, are enough to tell."""
LOW_RECOGNITION = 50.0
"""Percent of wanted labels recognised, below which samples carry statistics but no classes."""

GOOD_GAP, WIDE_GAP = 0.5, 0.9
"""Gap at the first batch norm, in nats a channel, that a fit reaches, and from which mean and std are in doubt."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FreshSamples:
    """Samples from random streams of their own, as a set to evaluate on; a pool has no others than it has."""

    source: SampleSource
    num_images: int
    labelled: bool = False

    def batches(self, batch_size: int = 100) -> Iterator[Batch]:
        """Yield them; a source that holds fewer gives what it has."""
        yield from self.source.sample(self.num_images, batch_size, "fresh")


def fit(job: Job) -> Surrogate:
    """Fit the method, or take over what is fitted; keep generator and picture where the folder has none."""
    require_runtime(job.target)
    settings, state = job.settings, job.fitted.state if job.fitted else None
    surrogate: Surrogate = settings.method.fit(job.teacher, job.run, distill_steps=settings.distill_steps, fitted=state)
    if distributed.is_main():
        _keep_generator(job, surrogate)
        if surrogate.statistics is None and not (job.folder / SAMPLES).exists():
            keep_samples(surrogate.source, job.teacher, job.folder)
    return surrogate


def _keep_generator(job: Job, surrogate: Surrogate) -> None:
    """Write the generator where the folder has none, or a damaged one."""
    state, path = surrogate.source.state_dict(), job.folder / GENERATOR
    if not state:
        return
    if path.exists():
        try:
            load_tensors(path)
        except InputError as error:
            logger.warning(f"{error} It is written anew.")
        else:
            return
    lost = [name for name, value in state.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if lost:
        raise NumericsError(
            f"the generator diverged: {len(lost)} of its {len(state)} tensors, such as {lost[0]}, are not finite; "
            f"it is not stored. {LOWER_RATE}."
        )
    save_tensors(path, state, {"method": job.settings.method.name, "weights_sha256": job.teacher.weights_sha256})


def measured_on(most: int, quantizer: PTQ) -> int:
    """Return on how many samples something is measured: as many as calibrate, within limits."""
    return min(most, max(LEAST_IMAGES, quantizer.num_samples))


@torch.no_grad()
def measure_recognition(job: Job, surrogate: Surrogate) -> float | None:
    """Return how often the teacher's top-1 class is the wanted one, in percent, and warn where it is low.

    None where no label is asked for.
    """
    if not surrogate.source.asks_labels:
        return None
    hits, seen = 0.0, 0
    count = measured_on(RECOGNITION_IMAGES, job.settings.quantizer)
    images = surrogate.source.sample(count, job.teacher.spec.images_at_once)
    for batch in job.run.each("recognise", images, count, lambda batch: len(batch.labels)):
        terms = label_terms(job.teacher.spec, job.teacher.network(batch.images), batch.labels)
        hits += float(terms["label_recognition"]) * len(batch.labels)
        seen += len(batch.labels)
    recognition = round(hits / seen, 4)
    if recognition < LOW_RECOGNITION:
        logger.warning(
            f"the teacher recognises {recognition:.1f} % of the labels that the samples were asked for; "
            "they do not show its classes."
        )
    return recognition


def quantize_network(job: Job, surrogate: Surrogate) -> Student:
    """Calibrate, and distil where the quantizer says so; all processes take part."""
    quantizer = job.settings.quantizer
    student = quantize_ptq(
        surrogate.network,
        lambda: surrogate.source.sample(quantizer.num_samples, job.teacher.spec.images_at_once),
        quantizer,
        job.run,
        learnable=quantizer.trains_scales,
        statistics=surrogate.statistics,
    )
    quantizer.train(student, job.teacher.network, surrogate.source, job.run)
    return student


def file_notes(bits: str, target: Target, weights_sha256: str) -> dict[str, str]:
    """Return what stands in a file's metadata beside its image spec."""
    return {"bits": bits, "target": target.name, "weights_sha256": weights_sha256, "zsq_version": versions()["zsq"]}


def write_and_check(job: Job, student: Student, surrogate: Surrogate) -> tuple[Verification, Coverage]:
    """Write the files and run the target's beside the simulation, on samples and images of the data in turn.

    Returns:
        How they compare, and what of the network is quantized.
    """
    logger.info(f"writing and checking {job.file.name}{f' and {PROGRAM}' if job.outputs.pt2 else ''}")
    converted, spec = convert(student), job.teacher.spec
    notes = file_notes(described_bits(job, student), job.target, job.teacher.weights_sha256)
    told, files = job.run.observer, 1 + job.outputs.pt2
    told.update("write", 0, files, {})
    lowered = write_file(converted, spec, job.file, job.target, job.file_options, notes)
    told.update("write", 1, files, {})
    if job.outputs.pt2:
        write_pt2(converted, spec, job.folder / PROGRAM)
        told.update("write", files, files, {})

    def simulate(images: Tensor) -> Tensor:
        logits: Tensor = student(images.to(job.run.device))
        return logits

    most = measured_on(CHECK_IMAGES, job.settings.quantizer)
    samples = surrogate.source.sample(most, spec.images_at_once)
    data = job.data.batches(spec.images_at_once) if job.data else iter(())
    mixed = (batch for pair in itertools.zip_longest(samples, data) for batch in pair if batch is not None)
    total = most + (job.data.num_images if job.data else 0)
    batches = job.run.each("check", mixed, total, lambda batch: len(batch.images))
    found = verify_file(
        job.file,
        simulate,
        (batch.images.cpu() for batch in batches),
        output_step(converted, spec.outputs),
        outputs=spec.outputs,
        threads=torch.get_num_threads(),
        enough=ENOUGH_DECIDED,
        target=job.target,
        shaken=lambda images: answered_shaken(student, images.to(job.run.device)),
    )
    if found.num_images < total:  # enough was known
        told.update("check", found.num_images, found.num_images, {})
    else:
        next(batches, None)  # the last of them is done
    return replace(found, lowered_percent=lowered), coverage(converted, spec, float_operators(job.target))


def evaluate_file(job: Job, student: Student) -> dict[str, Evaluation]:
    """Measure the teacher, the file and the simulation on the data, where there is any."""
    if job.data is None:
        return {}
    known = job.outputs.float_results
    outputs, at_once = job.teacher.spec.outputs, job.teacher.spec.images_at_once
    asked = job.teacher.network
    networks: dict[str, Predict] = {"float": asked} if known is None else {}
    networks["quantized"] = opened_file(job)
    if job.outputs.simulation:
        networks |= {"simulated": student}

    def show(done: int, total: int) -> None:
        job.run.observer.update("evaluate", done, total, {})

    found = evaluate_many(
        networks,
        job.data,
        teacher=asked if outputs or known is None else known,
        outputs=outputs,
        decoder=job.decoder,
        batch_size=at_once,
        progress=show,
    )
    if known is None:
        warn_of_chance(found["float"], job.teacher.spec, job.data)
    found = found if known is None else {"float": known, **found}
    floats = found["float"]
    if job.outputs.predictions:
        _keep_predictions(job.folder / PREDICTIONS, found["quantized"], floats)
    return {name: value if name == "float" else beside_float(value, floats) for name, value in found.items()}


def warn_of_chance(
    found: Evaluation, spec: ImageSpec, data: DataSet | EvenSubset, who: str = "the float network"
) -> None:
    """Warn loudly where a network recognises no more of labelled images than guessing would."""
    if found.top1 is None or found.top1_interval is None:
        return
    chance = 100 / spec.classes
    if found.top1_interval[0] > chance:
        return
    mapping = f" ({data.mapping}; --class-names says otherwise)" if data.mapping else ""
    logger.warning(
        f"{who} recognises {found.top1:.2f} % of {found.num_images} images of {data.name}, no more than "
        f"guessing would ({chance:.3g} %). Do its classes and those of the labels stand in one order{mapping}? Were "
        f"mean {_listed(spec.mean)} and std {_listed(spec.std)} those of its training (--mean, --std)?"
    )


def warn_of_gap(job: Job, layers: Sequence[LayerReport]) -> None:
    """Warn where a fit to the statistics of batch norm has not reached those of the first one.

    Pixels are in [0, 1]: with another mean and std than those of training, no image may have the stored statistics. See
    `benchmarks/reports/2026-11-batch-norm-gap.md`.
    """
    gap = next((layer.batch_norm_gap for layer in layers if layer.batch_norm_gap is not None), None)
    if gap is None or gap < WIDE_GAP or not getattr(job.settings.method, "bns_weight", 0):
        return
    spec = job.teacher.spec
    logger.warning(
        f"the samples' statistics are {gap:.2g} nats a channel away from those stored in the first batch norm; below "
        f"{GOOD_GAP:g} is good. Are mean {_listed(spec.mean)} and std {_listed(spec.std)} those of training (--mean, "
        "--std)? If so, a longer --budget closes the gap."
    )


def _listed(values: Iterable[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


def _keep_predictions(path: Path, found: Evaluation, floats: Evaluation) -> None:
    """Write the class or the scores of each image, and the float network's, so that results can be compared image by
    image."""
    kept: dict[str, Any] = found.scores | {
        FLOAT + name: floats.scores[name] for name in found.scores if name in floats.scores
    }
    if found.predictions is not None and found.labels is not None:
        arrays = {"predictions": found.predictions, "float_predictions": floats.predictions, "labels": found.labels}
        kept = {name: values for name, values in arrays.items() if values is not None}
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **kept)


def described_bits(job: Job, student: Student) -> str:
    """Return the widths as they were asked for, or the mean width where each weight has its own."""
    quantizer = job.settings.quantizer
    if not quantizer.weight_bits:
        return quantizer.bits
    return f"mixed W{mean_weight_bits(student):.2f}A{Bits.parse(quantizer.bits).activation}"


def opened_file(job: Job) -> Predict:
    """Return a run's file in its runtime, on as many threads as PyTorch has here."""
    return open_file(job.file, threads=torch.get_num_threads())


def measure_agreement(job: Job, surrogate: Surrogate) -> SampleAgreement | None:
    """Return how often the file and the teacher name the same class for samples that calibrated nothing.

    It says how good a file is where no real image does, and a warning is given where it is low. None where the method
    makes no images; a method that holds few images has no fresh ones.
    """
    if surrogate.statistics is not None:
        return None
    teacher = job.teacher.network
    networks: dict[str, Predict] = {"file": opened_file(job), "teacher": teacher}
    fresh = FreshSamples(surrogate.source, measured_on(AGREEMENT_IMAGES, job.settings.quantizer))

    def show(done: int, total: int) -> None:
        job.run.observer.update("compare samples", done, total, {})

    at_once = job.teacher.spec.images_at_once
    outputs = job.teacher.spec.outputs
    found = evaluate_many(networks, fresh, teacher=teacher, outputs=outputs, batch_size=at_once, progress=show)
    named, agreement = found["teacher"].predictions, found["file"].teacher_agreement
    assert agreement is not None
    if outputs:
        _warn_of_agreement(job, agreement, 0, meaningful=True)
        counted = found["file"]
        return SampleAgreement(
            num_images=counted.num_images, num_classes=0, teacher_agreement=agreement, measures=counted.measures
        )
    assert named is not None
    classes = len(np.unique(named))
    meaningful = classes >= min(job.teacher.spec.classes, MANY_CLASSES) / 2
    if job.data is None:
        _warn_of_agreement(job, agreement, classes, meaningful=meaningful)
    return SampleAgreement(
        num_images=found["file"].num_images,
        num_classes=classes,
        teacher_agreement=agreement if meaningful else None,
    )


def _warn_of_agreement(job: Job, agreement: float, classes: int, *, meaningful: bool) -> None:
    """Warn where agreement on samples is low, or tells nothing."""
    if not meaningful:
        logger.warning(
            f"the float network sees {classes} of {job.teacher.spec.classes} classes in the samples, too few to tell "
            f"how good {job.file.name} is; a longer --budget may help, and labelled images (--data) tell the accuracy."
        )
    elif agreement < LOW_AGREEMENT:
        hint = "" if job.settings.quantizer.name == "qat" else "--quantizer qat or "
        logger.warning(
            f"{job.file.name} and the float network name the same class for only {agreement:.1f} % of the "
            f"samples; {hint}more bits may help, and labelled images (--data) tell the accuracy."
        )


def measure_layers(job: Job, surrogate: Surrogate, student: Student) -> tuple[LayerReport, ...]:
    """Return what rounding does to each layer on a few samples."""
    if not job.outputs.layers:
        return ()
    count = min(LAYER_IMAGES, job.teacher.spec.images_at_once)
    images = torch.cat([batch.images for batch in surrogate.source.sample(count, count)])[:count].to(job.run.device)
    return layer_reports(student, job.teacher.network, images)


def measure_latency(job: Job) -> Latency | None:
    """Return how long the file and the float network as a file take for one image, on one thread."""
    if not job.outputs.layers:
        return None
    image = _image(job)
    known = Latency(file=_milliseconds(open_file(job.file, threads=1), image))
    teacher = job.teacher.to("cpu")
    size = sum(value.numel() * value.element_size() for value in teacher.network.state_dict().values())
    if size > LARGEST_FLOAT:
        return replace(known, note=f"a float file of {size // 2**20} MiB takes long to write")
    runtime = "openvino" if job.target.runs_in == "openvino" else "onnxruntime"
    open_float = OpenVinoClassifier if runtime == "openvino" else OnnxClassifier
    try:
        with tempfile.TemporaryDirectory(prefix="zsq-") as folder:
            path = Path(folder) / "float.onnx"
            write_float_onnx(teacher.network, teacher.spec, path)
            took = _milliseconds(open_float(path, threads=1), image)
            return replace(known, float_file=took, float_bytes=path.stat().st_size, float_runtime=runtime)
    except (ZsqError, *FOREIGN_FAULTS) as error:
        logger.debug("the float network was not timed", exc_info=True)
        return replace(known, note=f"the float network has no file to compare with: {described(error)}")


def measure_profile(job: Job) -> Profile | None:
    """Return what the target's runtime does with the file."""
    if not job.outputs.layers:
        return None
    try:
        return profile_file(job.file, job.target, _image(job))
    except (ZsqError, *FOREIGN_FAULTS) as error:
        logger.debug("the file was not profiled", exc_info=True)
        return Profile(runtime=job.target.title, source=f"it was not profiled: {described(error)}")


def _image(job: Job) -> Tensor:
    """Return what is fed where only the time counts."""
    return torch.randn(1, *job.teacher.spec.shape, generator=torch.Generator().manual_seed(job.run.seed))


@torch.no_grad()
def _milliseconds(predict: Predict, image: Tensor) -> float:
    """Return the median of some calls after a first one."""
    predict(image).cpu()
    times: list[float] = []
    while len(times) < LEAST_CALLS or (sum(times) < MOST_SECONDS and len(times) < MOST_CALLS):
        begin = time.perf_counter()
        predict(image).cpu()
        times.append(time.perf_counter() - begin)
    return round(1000 * float(np.median(times)), 4)
