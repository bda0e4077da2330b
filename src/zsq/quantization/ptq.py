"""Post-training quantization: choose every grid from calibration images (paper, section 3)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from zsq.checked import AtLeastOne, Checked, Count, Factor, Text, Width
from zsq.errors import InputError
from zsq.graph import edit
from zsq.graph.channel_scaling import REACH_SIGMAS, scale_channels
from zsq.graph.fold import fold
from zsq.quantization.bias_correction import correct_biases, correct_biases_by_means, first_images
from zsq.quantization.implied_statistics import ROWS, implied_statistics, pixels_of
from zsq.quantization.prepare import ENDS_BITS, Bits, Scheme, Student, prepare, prepared_layers, quantized_weight
from zsq.quantization.quantizers import ActivationQuantizer, set_mode
from zsq.quantization.range_rules import NEEDS_HISTOGRAM, RULES, minmax, weight_mse
from zsq.quantization.weight_rounding import round_weights
from zsq.targets import TARGETS, target_of
from zsq.training.learner import Learner
from zsq.training.loop import Run
from zsq.types import Batch, SampleSource, Statistics

PRIOR_SIGMAS = {8: 6.0, 7: 4.5, 6: 3.0, 5: 1.5, 4: 1.5}
"""Standard deviations of each channel that a range spans, by the width of activations: at 8 bits those of DFQ (Nagel et
al. 2019, section 4.2.2); a coarser grid has fewer steps to spare for values that are rare, and below 4 bits none."""

REFINED_BITS = 6
"""The width at which channels are scaled and weights rounded by GPTQ where nothing is chosen; the gain at other widths
has not been measured."""

LOGIT_AGREEMENT = 5 / 3
"""By how much the logits of clear images exceed what independent features would give, beside `logit_headroom`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PTQ(Checked):
    """Choose the grids from calibration images; nothing is trained (DF-PTQ)."""

    section: ClassVar[str] = "quantizer"
    name: ClassVar[str] = "ptq"

    bits: Text = "8"
    """Widths: 8, 6, 4 or any from 2 to 8; W4A8 for weights and activations apart."""
    num_samples: Count = 2000
    """Calibration images; the paper takes 10,000."""
    range_rule: Literal["auto", "minmax", "moving-average", "percentile", "mse"] = "auto"
    """How the range of an activation is chosen; auto is mse, the paper takes minmax."""
    range_sigmas: Factor | None = None
    """Standard deviations of each channel that a range spans at least, by what batch norm stores; 0: none. Unset, under
    the rule auto, 6 at 8 bits, 4.5 at 7, 3 at 6, 1.5 at 5 and 4, and 0 below; under another rule 0."""
    weight_range_rule: Literal["minmax", "mse"] = "minmax"
    """How the range of a weight is chosen."""
    logit_headroom: AtLeastOne = 1.5
    """Factor on the range of the logits, since synthetic images reach smaller ones than real ones; the paper: 1. Where
    ranges span deviations by batch norm, that of the logits spans six, times this and 5/3."""
    bias_correction: bool = True
    """Shift biases by what rounding adds to each layer's mean output, by batch norm's means where most layers have
    them, else by those of the images; the paper does not."""
    channel_scaling: bool | None = None
    """Scale channels by batch norm so that each fills its activation's range (`zsq.graph.channel_scaling`). Unset: at 6
    bits, without distillation."""
    weight_rounding: Literal["auto", "nearest", "gptq"] = "auto"
    """Round weights to the nearest, or so that errors of one layer cancel on calibration images (GPTQ). auto is gptq at
    6 bits without distillation."""
    weight_granularity: Literal["channel", "tensor"] = "channel"
    """One scale an output channel, or one a weight."""
    activation_scope: Literal["all", "layers"] = "all"
    """Round every activation between layers, or only the inputs of convolutions and linear layers."""
    first_last_bits: Width | None = None
    """Width of the first and last layer, where it differs."""
    target: Text = "onnxruntime"
    """Runtime that the file is for, such as openvino or litert: it decides the grids; `--target` sets it."""
    pixels: Literal["nchw", "nhwc"] | None = None
    """Let the file take uint8 pixels in this layout instead of normalized floats, mean and std folded in; `--pixels`
    sets it."""
    batch: Count | Literal["dynamic"] = "dynamic"
    """Images that the file takes at once, or dynamic for any number; `--batch` sets it."""
    packed: bool = False
    """Store weights of 4 bits or fewer two to a byte, where the target's file can hold them so: litert."""
    weight_bits: dict[str, Width] | None = None
    """Width of each weight by its name, before all other widths; `--bits FILE` reads it as `zsq allocate` wrote it."""

    def check(self) -> None:
        """Check that the widths can be read, and that the target's file can hold them."""
        target = target_of(self.target)
        target.check_bits(self.bits, Bits.parse(self.bits).activation)
        if self.first_last_bits is not None and self.first_last_bits not in target.activation_bits:
            widths = ", ".join(map(str, target.activation_bits))
            raise InputError(
                f"quantizer.first_last_bits is {self.first_last_bits}, and files for {target.title} hold activations "
                f"of {widths} bits."
            )
        if self.packed and not target.packs:
            able = ", ".join(name for name, each in TARGETS.items() if each.packs)
            raise InputError(
                f"quantizer.packed is true, and files for {target.title} hold one weight a byte; {able} can pack."
            )
        if target.all_activations and self.activation_scope != "all":
            raise InputError(
                f"quantizer.activation_scope is '{self.activation_scope}', and files for {target.title} quantize "
                "every activation; 'all' works."
            )

    @property
    def resolved_range_rule(self) -> str:
        """The rule that `auto` stands for."""
        return "mse" if self.range_rule == "auto" else self.range_rule

    @property
    def resolved_range_sigmas(self) -> float:
        """The standard deviations that a range spans at least; 0: none."""
        if self.range_sigmas is not None:
            return self.range_sigmas
        return PRIOR_SIGMAS.get(Bits.parse(self.bits).activation, 0.0) if self.range_rule == "auto" else 0.0

    @property
    def resolved_channel_scaling(self) -> bool:
        """Whether channels are scaled."""
        chosen = self.channel_scaling
        return not self.distill_steps and Bits.parse(self.bits).activation == REFINED_BITS if chosen is None else chosen

    @property
    def resolved_weight_rounding(self) -> str:
        """The rounding that `auto` stands for."""
        if self.weight_rounding != "auto":
            return self.weight_rounding
        return "gptq" if not self.distill_steps and Bits.parse(self.bits).weight == REFINED_BITS else "nearest"

    @property
    def distill_steps(self) -> int:
        """Steps of distillation: none."""
        return 0

    @property
    def trains_scales(self) -> bool:
        """Whether distillation trains the grids: nothing is trained."""
        return False

    def with_steps(self, steps: int) -> Self:
        """Return these settings with another number of distillation steps: the same, since there are none."""
        del steps
        return self

    def resolved_kd_weight(self, source: SampleSource) -> float | None:
        """Return the weight of the teacher's answers in the loss that is used with this source: there is no loss."""
        del source
        return None

    def learner(
        self, student: Student, teacher: nn.Module, source: SampleSource, device: torch.device
    ) -> Learner | None:
        """Return what takes the steps of distillation: nothing does."""
        del student, teacher, source, device
        return None

    def train(self, student: Student, teacher: nn.Module, source: SampleSource, run: Run) -> None:
        """Train the student in place: it stays as it is."""
        del student, teacher, source, run

    def scheme(self, *, learnable: bool = False) -> Scheme:
        """Return what is quantized, and how."""
        return Scheme(
            bits=Bits.parse(self.bits),
            per_channel=self.weight_granularity == "channel",
            all_activations=self.activation_scope == "all",
            first_last_bits=self.first_last_bits,
            learnable=learnable,
            weight_bits=self.weight_bits or {},
            target=target_of(self.target),
        )


def quantize_ptq(
    network: GraphModule,
    images: Callable[[], Iterator[Batch]],
    settings: PTQ,
    run: Run,
    *,
    learnable: bool = False,
    statistics: Statistics | None = None,
) -> Student:
    """Fold, place quantizers, and choose their grids.

    Args:
        network: the float graph.
        images: starts a stream of calibration batches; called once or twice, each time giving the same images.
        settings: scheme and range rules.
        run: device and progress.
        learnable: place quantizers that distillation can train.
        statistics: take the place of images, which are not asked for, and of the range rule.

    Returns:
        The student, its quantizers on, on the run's device.

    Raises:
        InputError: the stream holds no image.
    """
    folded, record = fold(network)
    pixels = _pixels(len(record), folded, images, settings, run) if statistics is None else None
    if pixels is not None and settings.resolved_channel_scaling:
        low, high = pixels[ROWS:].to(next(iter(record.values()))[0].device)
        scale_channels(folded, record, (low, high), REACH_SIGMAS)
    student = prepare(folded, settings.scheme(learnable=learnable)).to(run.device).eval()
    if run.device.type == "cuda":  # where convolutions are quickest in this order; the float network's stays as it is
        for layer in prepared_layers(student.network):
            _, weight = quantized_weight(student.network, layer)
            if weight.dim() == 4:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    if settings.weight_range_rule == "mse":
        for layer in prepared_layers(student.network):
            quantizer, weight = quantized_weight(student.network, layer)
            quantizer.set_scale(weight_mse(quantizer, weight.detach()))
            quantizer.keep_pairs(weight)
    known = statistics
    if statistics is None:
        folded.to(run.device)
        if pixels is not None:
            sigmas, ends = settings.resolved_range_sigmas, PRIOR_SIGMAS[ENDS_BITS]
            known = implied_statistics(folded, record, pixels, sigmas, run, output_sigmas=ends)
        calibrate(student, images, settings, run, known)
    else:
        take_ranges(student, statistics, settings)
    set_mode(student, "quantize")
    _correct(student, folded, images, settings, run, known)
    if settings.resolved_weight_rounding == "gptq" and statistics is None:
        round_weights(student, first_images(images(), run.device), known, run.seed)
    return student


def _pixels(
    norms: int, folded: GraphModule, images: Callable[[], Iterator[Batch]], settings: PTQ, run: Run
) -> Tensor | None:
    """Return draws of pixels where batch norm is asked for a network's values; None where most layers have no norm."""
    asked = settings.resolved_range_sigmas or settings.bias_correction or settings.resolved_channel_scaling
    if not asked or 2 * norms < len(list(edit.layers(folded))) or (first := next(images(), None)) is None:
        return None
    return pixels_of(first.images.to(run.device))


def _correct(
    student: Student,
    folded: GraphModule,
    images: Callable[[], Iterator[Batch]],
    settings: PTQ,
    run: Run,
    known: Statistics | None,
) -> None:
    """Correct the student's biases where the settings ask for it."""
    if settings.bias_correction and known is not None:
        correct_biases_by_means(student, known.input_means)
    elif settings.bias_correction:
        correct_biases(student, folded.to(run.device), first_images(images(), run.device))


def calibration_passes(settings: PTQ) -> list[str]:
    """Return how each pass over the calibration images is shown: the first sees ranges, a second one histograms."""
    count = 2 if settings.resolved_range_rule in NEEDS_HISTOGRAM else 1
    return [f"calibrate {number}/{count}" for number in range(1, count + 1)]


@torch.no_grad()
def calibrate(
    student: Student,
    images: Callable[[], Iterator[Batch]],
    settings: PTQ,
    run: Run,
    prior: Statistics | None = None,
) -> None:
    """Set the range of every activation quantizer; images stream, so memory does not grow with their number.

    Args:
        student: prepared; its quantizers are left in observing mode.
        images: starts a stream of calibration batches.
        settings: range rule and headroom.
        run: device and progress.
        prior: ranges that are spanned at least, whatever the images show, where the settings ask for it.

    Raises:
        InputError: the stream holds no image, or values that are not finite.
    """
    rule = settings.resolved_range_rule
    activations = activation_quantizers(student)
    for quantizer in activations.values():
        quantizer.average_ranges = rule == "moving-average"
    for title, mode in zip(calibration_passes(settings), ("observe", "histogram"), strict=False):
        set_mode(student, mode)  # type: ignore[arg-type]
        seen = 0
        for batch in run.each(title, images(), settings.num_samples, lambda batch: len(batch.images)):
            student(batch.images.to(run.device))
            seen += len(batch.images)
        if not seen:
            raise InputError("calibration was given no image.")
        student.num_calibration_images = seen
    for node, quantizer in activations.items():
        end = student.ends.get(str(node.target))  # the largest logit decides the class, so none may be cut off
        is_logits = end == "classes"
        low, high = minmax(quantizer) if end else RULES[rule](quantizer)
        if not bool(torch.isfinite(torch.cat([low.view(1), high.view(1)])).all()):
            raise InputError(
                f"calibration saw the range [{float(low)}, {float(high)}]; the images are not finite. Where a method "
                "learns them, a lower learning rate (--set method.learning_rate) may help."
            )
        if is_logits:
            low, high = low * settings.logit_headroom, high * settings.logit_headroom
        if prior is not None and settings.resolved_range_sigmas:
            least = _implied_range(prior, node, settings, is_logits=is_logits)
            low, high = torch.minimum(low, least[0]), torch.maximum(high, least[1])
        quantizer.choose_range(low, high)


def activation_quantizers(student: Student) -> dict[Node, ActivationQuantizer]:
    """Return the quantizers of activations, by the nodes that call them."""
    nodes = [node for node in student.network.graph.nodes if node.op == "call_module"]
    found = {node: student.network.get_submodule(str(node.target)) for node in nodes}
    return {node: module for node, module in found.items() if isinstance(module, ActivationQuantizer)}


def _implied_range(
    statistics: Statistics, node: Node, settings: PTQ, *, is_logits: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the range of the value that a quantizer's node rounds, each [1]; logits get their headroom."""
    value = node.args[0]
    assert isinstance(value, Node)
    low, high = statistics.ranges[value.name]
    headroom = LOGIT_AGREEMENT * settings.logit_headroom if is_logits else 1.0
    return low * headroom, high * headroom


def take_ranges(student: Student, statistics: Statistics, settings: PTQ) -> None:
    """Set the range of every activation quantizer to that of the value it rounds."""
    for node, quantizer in activation_quantizers(student).items():
        is_logits = student.ends.get(str(node.target)) == "classes"
        quantizer.set_range(*_implied_range(statistics, node, settings, is_logits=is_logits))
