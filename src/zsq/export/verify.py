"""Run an ONNX file and prove that it computes what was simulated."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as runtime_status
from torch import Tensor

from zsq.errors import ExportError, InputError
from zsq.export.image_spec import KEY, from_json
from zsq.runtime.gpu import full_float32
from zsq.types import ImageSpec

_RUNTIME_ERRORS = (
    UnicodeDecodeError,
    runtime_status.Fail,
    runtime_status.InvalidArgument,
    runtime_status.InvalidGraph,
    runtime_status.InvalidProtobuf,
    runtime_status.NotImplemented,
)


class OnnxClassifier:
    """An ONNX file in ONNX Runtime on the processor, called like a network.

    Args:
        path: the ``.onnx`` file.
        optimize: let the runtime fuse operations into integer kernels, as users do; off, it runs the file literally.
        threads: threads of one operation; None leaves the choice to the runtime.
    Raises:
        InputError: the file does not exist, or the runtime cannot load or run it.
    """

    def __init__(self, path: Path, optimize: bool = True, threads: int | None = None) -> None:
        if not Path(path).is_file():
            raise InputError(f"{path}: no such file; write one with write_onnx.")
        level = onnxruntime.GraphOptimizationLevel
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except _RUNTIME_ERRORS as error:
            raise InputError(f"{path}: ONNX Runtime cannot load it: {str(error).splitlines()[0]}") from error
        self._input, self._path = self._session.get_inputs()[0], path

    @property
    def spec(self) -> ImageSpec:
        """What the file takes and gives, as zsq has noted in it.

        Raises:
            InputError: it holds no such note.
        """
        stored = self._session.get_modelmeta().custom_metadata_map.get(KEY)
        if stored is None:
            raise InputError(f"{self._path} does not say how its images are normalised; zsq has not written it.")
        return from_json(stored)

    def __call__(self, images: Tensor | np.ndarray) -> Tensor:
        """Return the logits, float [N, classes], of normalised images, float [N, C, H, W].

        Raises:
            InputError: the images do not have the shape that the file takes.
        """
        images, wanted = torch.as_tensor(images), list(self._input.shape)
        if images.dim() != len(wanted) or list(images.shape[1:]) != wanted[1:]:
            raise InputError(f"images are {list(images.shape)}; the file takes {wanted}.")
        array = images.detach().to("cpu", torch.float32).contiguous().numpy()
        try:
            (logits,) = self._session.run(None, {self._input.name: array})
        except _RUNTIME_ERRORS as error:
            raise InputError(f"{self._path}: ONNX Runtime cannot run it: {str(error).splitlines()[0]}") from error
        return torch.from_numpy(logits)


@dataclass(frozen=True)
class Verification:
    """How a file's logits compare with the simulation's on the same images."""

    num_images: int
    """Images compared."""
    num_decided: int
    """Images whose two highest simulated logits are more than the margin apart, two quantization steps by default."""
    decided_agreement: float
    """Percent of the decided images with the simulation's top-1 class, the runtime's optimisations off; 0 if none is
    decided."""
    agreement_literal: float
    """Percent of all images with the simulation's top-1 class, the runtime's optimisations off."""
    agreement_optimized: float
    """Percent of all images with the simulation's top-1 class, the runtime's optimisations on."""
    max_logit_difference_steps: float
    """Largest difference of any logit from the simulation's, in quantization steps, of both ways of running."""
    decided_self_agreement: float = 100.0
    """Percent of the decided images on which the file, run in both ways, agrees with itself."""
    only_from_simulation: int = 0
    """Decided images on which the file, optimisations off, differs from the simulation and not from itself."""
    only_from_itself: int = 0
    """Decided images on which it differs from itself and not from the simulation."""


def verify_onnx(
    path: Path,
    simulate: Callable[[Tensor], Tensor],
    images: Iterable[Tensor],
    output_step: float,
    *,
    threads: int | None = None,
    margin_steps: float = 2.0,
) -> Verification:
    """Run the file, literally and optimised, beside the simulation, one batch at a time.

    Args:
        path: the ``.onnx`` file.
        simulate: the simulation: float [N, C, H, W] -> logits [N, classes], two classes or more.
        images: batches of normalised images, float [N, C, H, W].
        output_step: quantization step of the logits (see `output_step`), above 0.
        threads: threads of the runtime; None leaves the choice to it.
        margin_steps: an image is decided where its two highest simulated logits are further apart than this many steps.
            Rounding ties break differently in each runtime, and below 8 bits a deep network amplifies one such flip.
    Raises:
        InputError: there is no image, or the file cannot be loaded.
    """
    runners = (OnnxClassifier(path, optimize=False, threads=threads), OnnxClassifier(path, threads=threads))
    num_images = num_decided = 0
    agreed, agreed_decided, agreed_itself, largest = [0, 0], 0, 0, 0.0
    only_from_simulation = only_from_itself = 0
    for batch in images:
        with torch.no_grad(), full_float32():
            expected = simulate(batch).detach().to("cpu", torch.float32)
        top_two = expected.topk(2, dim=1).values
        decided = top_two[:, 0] - top_two[:, 1] > margin_steps * output_step
        num_images += len(expected)
        num_decided += int(decided.sum())
        answers = [runner(batch) for runner in runners]
        literal = answers[0].argmax(1)
        as_simulated, as_itself = literal == expected.argmax(1), literal == answers[1].argmax(1)
        agreed_itself += int((as_itself & decided).sum())
        only_from_simulation += int((as_itself & ~as_simulated & decided).sum())
        only_from_itself += int((as_simulated & ~as_itself & decided).sum())
        for index, logits in enumerate(answers):
            same = logits.argmax(1) == expected.argmax(1)
            agreed[index] += int(same.sum())
            agreed_decided += int((same & decided).sum()) if index == 0 else 0
            largest = max(largest, float((logits - expected).abs().max()) / output_step)
    if num_images == 0:
        raise InputError("verification needs at least one image.")
    return Verification(
        num_images=num_images,
        num_decided=num_decided,
        decided_agreement=100 * agreed_decided / max(num_decided, 1),
        agreement_literal=100 * agreed[0] / num_images,
        agreement_optimized=100 * agreed[1] / num_images,
        max_logit_difference_steps=largest,
        decided_self_agreement=100 * agreed_itself / max(num_decided, 1),
        only_from_simulation=only_from_simulation,
        only_from_itself=only_from_itself,
    )


LEAST_AGREEMENT = 95.0
"""Percent of the decided images on which a file agrees with the simulation, and with itself, in any case."""


def require(verification: Verification, minimum: float = 99.0) -> None:
    """Return if the file agrees with the simulation on at least ``minimum`` percent of the decided images.

    Fewer are accepted where the file, run literally and optimised, differs from itself as often, and chance explains
    the rest (`exceeds`): in a deep network of few bits, the runtime's own roundings change that many answers, and no
    simulation can follow both ways. But on less than 95 % neither may agree. A file that computes something else
    agrees with itself.

    Raises:
        ExportError: it does not, or no image was decided.
    """
    if verification.num_decided == 0:
        raise ExportError(
            f"the file is not verified: on none of {verification.num_images} images are the two highest logits more "
            "than the margin apart. Verify with images that the network tells apart."
        )
    agreement, itself = verification.decided_agreement, verification.decided_self_agreement
    alone, itself_alone = verification.only_from_simulation, verification.only_from_itself
    chance = agreement >= LEAST_AGREEMENT and itself < 100 and not exceeds(alone, itself_alone)
    if itself < LEAST_AGREEMENT:
        raise ExportError(
            f"the file, run literally and optimised, gives the same class on {itself:.2f} % of "
            f"{verification.num_decided} decided images, where {LEAST_AGREEMENT:.4g} % is required; more bits may help."
        )
    if agreement >= minimum or chance:
        return
    raise ExportError(
        f"the file disagrees with the simulation: the same class on {agreement:.2f} % of {verification.num_decided} "
        f"decided images, where {minimum:.4g} % is required; run in both ways, it agrees with itself on {itself:.2f}. "
        f"Over all {verification.num_images} images: {verification.agreement_literal:.2f} % run literally, "
        f"{verification.agreement_optimized:.2f} % optimised; logits differ by up to "
        f"{verification.max_logit_difference_steps:.1f} quantization steps."
    )


def exceeds(count: int, other: int) -> bool:
    """Tell whether `count` is above what equal rates allow beside `other`: the one-sided sign test at 5 %.

    Each of all these events is of either kind with probability 1/2, if the rates are equal; True where as many as
    `count` of the first are less probable than 1 in 20.
    """
    if count <= other:
        return False
    total = count + other
    ways = term = math.comb(total, count)
    for k in range(count, total):
        term = term * (total - k) // (k + 1)
        ways += term
    return bool(20 * ways < 2**total)
