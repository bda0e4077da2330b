"""Run a file and prove that it computes what was simulated."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from zsq.errors import ExportError, InputError
from zsq.export.classifier import FileClassifier
from zsq.export.files import ONNX, open_file
from zsq.export.onnx_runtime import OnnxClassifier
from zsq.export.openvino import OpenVinoClassifier
from zsq.export.saturation import saturating_layers
from zsq.export.tensorrt_rules import broken_rules
from zsq.runtime.gpu import full_float32
from zsq.targets import TARGETS, Target
from zsq.training.answers import Answers
from zsq.types import Output

MARGIN_STEPS = 2.0
"""Quantization steps between the two highest logits above which an image is decided, in a network without noise."""

MARGIN_NOISES = 6.0
"""The same in units of the network's own noise: the difference of two logits that each have it, four times over."""

MOST_VALUES = 2**24
"""Values of the network's answers that are compared; a map has as many after a few images."""

NOISE_IMAGES = 100
"""Images after which enough is known of the noise."""

LEAST_AGREEMENT = 99.0
"""Percent of the decided images on which a file and the simulation must name the same class."""

CHANCE = 0.01
"""Probability, at that rate, of as many disagreements as were seen, below which they are no chance."""

SAME_NOISES, SAME_STEPS = 2.0, 1.0
"""Distance from the simulation up to which a file computes the same: over the simulation's own noise, and in steps."""

RULES_OF: dict[str, Callable[[Path], tuple[str, ...]]] = {"tensorrt": broken_rules}
"""What finds the rules that a file breaks, for targets that do not run here."""

FAR_NOISES, FAR_STEPS = 6.0, 4.0
"""Distance beyond which a file computes something else, even where one class is so far ahead that it stays first."""


@dataclass(frozen=True)
class Verification:
    """How a file's logits compare with the simulation's on the same images."""

    num_images: int
    """Images compared."""
    num_decided: int
    """Images, or positions in them, whose two highest simulated logits are more than `margin_steps` apart."""
    decided_agreement: float
    """Percent of the decided images with the simulation's top-1 class, the runtime's optimisations off; 0 if none is
    decided. A file that is no ONNX file has one way to run, which stands for both."""
    agreement_literal: float
    """Percent of all images (or positions) with the simulation's top-1 class, the runtime's optimisations off; where no
    output is of classes, of the values within a step of the simulation's."""
    agreement_optimized: float
    """Percent of all images with the simulation's top-1 class, the runtime's optimisations on."""
    max_logit_difference_steps: float
    """Largest difference of any logit from the simulation's, in quantization steps, of both ways of running."""
    decided_agreement_optimized: float = 0.0
    """Percent of the decided images with the simulation's top-1 class, the runtime's optimisations on."""
    decided_self_agreement: float = 100.0
    """Percent of the decided images on which the file, run in both ways, agrees with itself."""
    margin_steps: float = MARGIN_STEPS
    """Distance of the two highest logits above which an image is decided, in quantization steps."""
    instability: float = 0.0
    """Percent of the first hundred images whose simulated class changes when only the order of additions does."""
    noise_steps: float = 0.0
    """How far that moves a logit, root mean square, in quantization steps; where it does not explain the file, how far
    the float's own roundings do."""
    distance_literal_steps: float = 0.0
    """Distance of the file's logits from the simulated ones, optimisations off, root mean square, in steps."""
    distance_optimized_steps: float = 0.0
    """The same, optimisations on."""
    saturating_layers: tuple[str, ...] = ()
    """Layers of the file that a processor whose products saturate in int16 would compute otherwise."""
    broken_rules: tuple[str, ...] = ()
    """What the file breaks of the rules that its target sets, where that target is not run here."""
    agreement_target: float | None = None
    """Percent of all images with the simulation's top-1 class in the target's own runtime; None where that is ONNX
    Runtime, or is not run here."""
    lowered_percent: float | None = None
    """Percent of the file's operators that the target's backend computes; None where it has none."""
    decided_agreement_target: float | None = None
    """The same, of the decided images."""
    by_distance: bool = False
    """Whether no output is of classes, so that the distance alone judges."""
    distance_target_steps: float | None = None
    """Distance of the logits of the target's own runtime from the simulated ones, root mean square, in steps."""


def verify_file(
    path: Path,
    simulate: Callable[[Tensor], Tensor],
    images: Iterable[Tensor],
    output_step: float | Tensor,
    *,
    outputs: Sequence[Output] = (),
    threads: int | None = None,
    margin_steps: float = MARGIN_STEPS,
    enough: int | None = None,
    target: Target = TARGETS["onnxruntime"],
    shaken: Callable[[Tensor], Tensor] | None = None,
) -> Verification:
    """Run the file, literally and optimised where it is an ONNX file, beside the simulation, one batch at a time.

    A value close to the middle of two integers goes either way with the order in which a runtime adds, and a deep
    network makes a step of that. How far this alone takes the logits is measured: the simulation runs twice, its
    images in either memory order. Only images whose classes are further apart than that can tell a wrong file.

    Args:
        path: the file.
        simulate: the simulation: float [N, C, H, W] -> what the network gives, [N, K].
        images: batches of normalised images, float [N, C, H, W].
        output_step: quantization step of these values (see `output_step`), above 0, or of each of them, [K].
        threads: threads of the runtime; None leaves the choice to it.
        outputs: what the network gives; empty for one vector of logits.
        margin_steps: an image is decided where its two highest simulated logits are further apart than this many steps,
            and than six times the noise.
        enough: stop after so many decided images if all agree; None takes all images.
        target: the runtime that the file is for; where it is another, the file is run in that one as well.
        shaken: the simulation with every activation moved by as little as a float32 is rounded. Where the order of
            additions does not explain a file, as in a network that makes much of single steps in sums, this is asked
            for the noise instead.

    Raises:
        InputError: there is no image, or the file cannot be loaded.
    """
    literal, optimized, own = _ways(path, target, threads)
    seen: list[tuple[Tensor, ...]] = []
    first_batches: list[Tensor] = []
    found = None
    for batch in map(literal.seen, images):
        with torch.no_grad(), full_float32():
            expected = simulate(batch).detach().to("cpu", torch.float32)
            other = expected[:0]
            if batch.dim() == 4 and sum(len(logits) for logits, *_ in seen) < NOISE_IMAGES:
                first_batches.append(batch)
                other = simulate(_reordered(batch)).detach().to("cpu", torch.float32)
        first = literal(batch)
        second, third = (first if way is literal else way(batch) if way else expected[:0] for way in (optimized, own))
        seen.append((expected, other, first, second, third))
        if enough is not None:
            found = _compared(seen, output_step, margin_steps, outputs)
            ways = (found.decided_agreement, found.decided_agreement_optimized, found.decided_agreement_target)
            agreed = all(way in (100, None) for way in ways)
            if (found.num_images if found.by_distance else found.num_decided) >= enough and agreed:
                break
        if sum(rows.numel() for rows, *_ in seen) >= MOST_VALUES:
            break
    if not seen:
        raise InputError("verification needs at least one image.")
    found = found or _compared(seen, output_step, margin_steps, outputs)
    if shaken is not None and not _explained(found):
        with torch.no_grad(), full_float32():
            others = [shaken(_reordered(batch)).detach().to("cpu", torch.float32) for batch in first_batches]
        pairs = itertools.zip_longest(seen, others)
        seen = [(parts[0], parts[1] if other is None else other, *parts[2:]) for parts, other in pairs]
        found = _compared(seen, output_step, margin_steps, outputs)
    return replace(
        found,
        saturating_layers=saturating_layers(path) if target.keeps_pairs and target.suffix == ONNX else (),
        broken_rules=RULES_OF[target.name](path) if target.name in RULES_OF else (),
    )


def _ways(
    path: Path, target: Target, threads: int | None
) -> tuple[FileClassifier, FileClassifier, FileClassifier | None]:
    """Open a file in each way in which it is run: literally, optimised, and in its target's own runtime beside those.

    A file that is no ONNX file runs in its own runtime alone, which stands for all three.
    """
    if target.suffix != ONNX:
        file = open_file(path, threads)
        return file, file, file
    literal = OnnxClassifier(path, optimize=False, threads=threads)
    optimized = OnnxClassifier(path, threads=threads) if target.keeps_pairs else literal
    own = OpenVinoClassifier(path, threads=threads) if target.runs_in == "openvino" else None
    return literal, optimized, own


def _reordered(batch: Tensor) -> Tensor:
    """Return images in the other memory order: the same values, which a convolution adds in another order.

    Signals and volumes have one order.
    """
    if batch.dim() != 4:
        return batch
    if batch.is_contiguous(memory_format=torch.channels_last):
        return batch.contiguous()
    return batch.contiguous(memory_format=torch.channels_last)


def _compared(
    batches: list[tuple[Tensor, ...]], step: float | Tensor, least_margin: float, outputs: Sequence[Output]
) -> Verification:
    """Compare answers [N, K]: simulated, of reordered images, and the file's: literal, optimised, the target's."""
    expected, other, literal, optimized, own = (torch.cat(parts) for parts in zip(*batches, strict=True))

    def distance(answers: Tensor) -> float:
        difference = (answers - expected[: len(answers)]) / step
        return float(difference.square().mean().sqrt()) if len(answers) else 0.0

    noise = distance(other)
    margin = max(least_margin, MARGIN_NOISES * noise)
    places = _Places(expected, step, margin, outputs)

    return Verification(
        num_images=len(expected),
        num_decided=int(places.decided.sum()),
        decided_agreement=places.agreement(literal, decided=True),
        agreement_literal=places.agreement(literal),
        agreement_optimized=places.agreement(optimized),
        max_logit_difference_steps=max(float(((run - expected) / step).abs().max()) for run in (literal, optimized)),
        decided_agreement_optimized=places.agreement(optimized, decided=True),
        decided_self_agreement=places.agreement(literal, optimized, decided=True),
        margin_steps=margin,
        instability=100 - places.agreement(other) if len(other) else 0.0,
        noise_steps=noise,
        distance_literal_steps=distance(literal),
        distance_optimized_steps=distance(optimized),
        agreement_target=places.agreement(own) if len(own) else None,
        decided_agreement_target=places.agreement(own, decided=True) if len(own) else None,
        distance_target_steps=distance(own) if len(own) else None,
        by_distance=places.by_distance,
    )


class _Places:
    """Where answers name a class: images, or positions in them; where none do, their values.

    Args:
        expected: the simulation's answers, [N, K].
        step: of quantization, or of each of the K values.
        margin: steps between the two highest logits above which a place is decided.
        outputs: what the answers are; empty for one vector of logits.
    """

    def __init__(self, expected: Tensor, step: float | Tensor, margin: float, outputs: Sequence[Output]) -> None:
        self.expected, self.step, self.answers = expected, step, Answers(outputs)
        named = self.answers.class_columns()
        self.by_distance = not named
        decided = []
        for logits, column in zip(self.answers.class_logits(expected), named, strict=True):
            top_two = logits.topk(2, dim=1).values
            own_step = step[column] if isinstance(step, Tensor) else step
            decided.append((top_two[:, 0] - top_two[:, 1] > margin * own_step).reshape(len(expected), -1))
        self.decided = torch.cat(decided, dim=1) if decided else torch.zeros(len(expected), 0, dtype=torch.bool)

    def agreement(self, one: Tensor, other: Tensor | None = None, *, decided: bool = False) -> float:
        """Return the percentage of the places with the same class in two answers, the second being the expected one.

        Without classes it is that of the values that lie within a step of each other.
        """
        wanted = self.expected[: len(one)] if other is None else other
        if self.by_distance:
            return 100 * float((((one - wanted) / self.step).abs() <= 1).double().mean())
        same = self._classes(one) == self._classes(wanted)
        where = self.decided[: len(one)] if decided else torch.ones_like(same)
        return 100 * int((same & where).sum()) / max(1, int(where.sum()))

    def _classes(self, answers: Tensor) -> Tensor:
        named = [logits.argmax(1).reshape(len(answers), -1) for logits in self.answers.class_logits(answers)]
        return torch.cat(named, dim=1)


def require(verification: Verification, minimum: float = LEAST_AGREEMENT) -> None:
    """Return if the file, run in both ways, names the simulation's class on ``minimum`` percent of the decided images.

    A file with layers that saturate on some processors is refused whatever it computes here.

    The logits may be no further from the simulated ones than `FAR_STEPS`, or than six times the order of additions
    takes those. A few more disagreements are accepted where chance explains them and the distance is at most twice that
    of the order, or a step. Where no image is decided, because that order changes more than their logits differ by, the
    distance alone counts; where no output is of classes, only what lies beyond `FAR_STEPS` is refused.

    Raises:
        ExportError: it does not, or nothing shows that it does.
    """
    found = verification
    if found.saturating_layers:
        raise ExportError(
            "on a processor without VNNI the file computes something else: the weights of "
            f"{', '.join(found.saturating_layers)} let the products of two neighbours leave int16."
        )
    if found.broken_rules:
        raise ExportError(f"its target takes no such file: {'; '.join(found.broken_rules)}.")
    if found.num_decided == 0 and found.noise_steps == 0 and not found.by_distance:
        raise ExportError(
            f"the file is not verified: on none of {found.num_images} images are the two highest logits more "
            "than the margin apart. Verify with images that the network tells apart."
        )
    runs = [
        ("literally", found.decided_agreement, found.distance_literal_steps),
        ("optimised", found.decided_agreement_optimized, found.distance_optimized_steps),
    ]
    if found.decided_agreement_target is not None and found.distance_target_steps is not None:
        runs.insert(0, ("by its target", found.decided_agreement_target, found.distance_target_steps))
    for way, agreement, distance in runs:
        near = found.by_distance or distance <= max(SAME_STEPS, SAME_NOISES * found.noise_steps)
        wrong = round(found.num_decided * (100 - agreement) / 100)
        chance = at_least(wrong, found.num_decided, 1 - minimum / 100) >= CHANCE
        far = distance > max(FAR_STEPS, FAR_NOISES * found.noise_steps)
        if found.num_decided and agreement < minimum and not (near and chance):
            raise ExportError(
                f"the file, run {way}, disagrees with the simulation: the same class on {agreement:.2f} % of "
                f"{found.num_decided} decided images, where {minimum:.4g} % is required. Over all {found.num_images} "
                f"images: {found.agreement_literal:.2f} % run literally, {found.agreement_optimized:.2f} % optimised; "
                f"logits differ by {distance:.1f} quantization steps, and by {found.noise_steps:.1f} where only the "
                "order of additions differs."
            )
        if far or (found.num_decided == 0 and not near):
            raise ExportError(
                f"the file, run {way}, is {distance:.1f} quantization steps from the simulation, which the order "
                f"of additions moves by {found.noise_steps:.1f}; it computes something else."
            )


def _explained(found: Verification) -> bool:
    """Whether what a file computes passes."""
    try:
        require(found)
    except ExportError:
        return False
    return True


def at_least(count: int, trials: int, rate: float) -> float:
    """Return the probability of `count` events or more in so many independent trials, each with this rate."""
    if rate <= 0 or count == 0:
        return float(count == 0)

    def log_probability(k: int) -> float:
        ways = math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
        return ways + k * math.log(rate) + (trials - k) * math.log1p(-rate)

    return max(0.0, 1.0 - math.fsum(math.exp(log_probability(k)) for k in range(count)))
