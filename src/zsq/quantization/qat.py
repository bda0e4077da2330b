"""Quantization-aware training by distillation from the float teacher (paper, section 2.3)."""

import copy
import logging
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from zsq.checked import Count, CountOrZero, Factor, Momentum, Positive, Share
from zsq.errors import InputError
from zsq.graph import edit
from zsq.graph.fold import fold
from zsq.graph.outputs import outputs_of
from zsq.quantization.bias_centring import centre_biases, plain_biases
from zsq.quantization.bias_correction import IMAGES, first_images
from zsq.quantization.prepare import Student, prepared_layers, quantized_weight
from zsq.quantization.ptq import PTQ
from zsq.quantization.quantizers import ActivationQuantizer, WeightQuantizer, constrain, quantizers
from zsq.quantization.training_view import merged
from zsq.runtime import distributed
from zsq.runtime.cuda_graphs import Replays
from zsq.training.answers import Answers
from zsq.training.loop import Run
from zsq.training.losses import distillation_loss, intermediate_loss
from zsq.training.optim import cosine, flatten_optimizer, learning_rates, rate_on, restore_optimizer, set_learning_rate
from zsq.training.state import part, under
from zsq.types import Batch, SampleSource, averaged

JUDGED, JUDGED_AT_ONCE = 100, 20
"""Samples on which a distilled student is compared with the one that it began as."""

START, NEAR = 1.0, 1e-4
"""Where outputs are not one vector of logits: sum of their weighted distances before the first step, and the least
distance that is weighed."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class QAT(PTQ):
    """Choose the grids, then train weights and grids to answer as the teacher does (DF-QAT)."""

    name: ClassVar[str] = "qat"

    num_samples: Count = 512
    """Calibration images before the first step."""
    steps: CountOrZero = 2000
    """Distillation steps; the batch is the method's."""
    learning_rate: Positive = 1e-3
    """Nesterov's step size, annealed by a cosine; the paper takes 1e-4 over 50,000 steps, and so do images from 96
    pixels on where nothing is chosen."""
    momentum: Momentum = 0.9
    """Nesterov momentum."""
    scales: Literal["learnable", "moving-average"] = "learnable"
    """Train the grids with the weights, or let them follow moving averages of the smallest and largest values."""
    scale_learning_rate: Positive = 1e-4
    """Step size of learnable grids."""
    kd_weight: Share | None = None
    """Lambda of eq. (3), the teacher's share against the labels'; unset: 0 with true labels, 1 with synthetic ones."""
    temperature: Positive = 1.0
    """Divides both logits before the softmax."""
    intermediate_weight: Factor = 0.0
    """Factor on the distance of student and teacher in each layer's output, added to the loss; 0 leaves it out."""

    @property
    def distill_steps(self) -> int:
        """Steps of distillation."""
        return self.steps

    @property
    def trains_scales(self) -> bool:
        """Whether distillation trains the grids; else they follow the values."""
        return self.scales == "learnable"

    def with_steps(self, steps: int) -> Self:
        """Return these settings with another number of distillation steps."""
        return replace(self, steps=steps)

    def resolved_kd_weight(self, source: SampleSource) -> float:
        """Return the weight of the teacher's answers that is used with this source."""
        if self.kd_weight is not None:
            return self.kd_weight
        return 0.0 if source.true_labels else 1.0

    def learner(self, student: Student, teacher: nn.Module, source: SampleSource, device: torch.device) -> "Distiller":
        """Return what takes the steps of distillation."""
        return Distiller(student, teacher, source, self, device)

    def train(self, student: Student, teacher: nn.Module, source: SampleSource, run: Run) -> None:
        """Train the student in place; see `distill`."""
        logger.info(f"distilling {self.steps} steps at learning rate {self.learning_rate:g}")
        distill(student, teacher, source, self, run)


def layer_views(student: Student, teacher: GraphModule) -> tuple[GraphModule, GraphModule]:
    """Return views of student and folded teacher that also give the outputs of all layers but the last, in pairs.

    The teacher is folded, so that a layer's output is the same value in both: what batch norm made of it, before the
    activation. The last layer makes the logits, which have a loss of their own.

    Raises:
        InputError: the network has one layer only.
    """
    folded, _ = fold(teacher)
    layers = prepared_layers(student.network)[:-1]
    if not layers:
        raise InputError("quantizer.intermediate_weight needs a network of at least 2 layers; 0 leaves the loss out.")
    named = {node.name: node for node in edit.layers(folded)}
    pairs = [named[layer.name] for layer in layers]
    return edit.view_of(student.network, layers), edit.view_of(folded, pairs)


class Distiller:
    """Trains a student on a source's batches, and keeps the source learning."""

    def __init__(
        self, student: Student, teacher: nn.Module, source: SampleSource, settings: QAT, device: torch.device
    ) -> None:
        self.student, self.teacher, self.source, self.settings = student, teacher, source, settings
        self.device, self.parts = device, 1
        self.batch: Batch | None = None
        self.kinds = Answers(outputs_of(teacher))
        self.kd_weight = settings.resolved_kd_weight(source) if not self.kinds.outputs else settings.kd_weight or 1.0
        images = first_images(source.sample(IMAGES), device)
        centre_biases(student, images)
        self.weights = self._output_weights(images) if self.kinds.outputs else torch.ones(1, device=device)
        self.folded: GraphModule | None = None
        self.merged = self.trained = merged(student.network)
        if settings.intermediate_weight:
            assert isinstance(teacher, GraphModule)
            view, self.folded = layer_views(student, teacher)
            self.trained = merged(view)
        grids = {
            id(tensor)
            for q in quantizers(student)
            if isinstance(q, (ActivationQuantizer, WeightQuantizer))
            for tensor in q.parameters()
        }
        trainable = [p for p in student.parameters() if p.requires_grad]
        weights = [p for p in trainable if id(p) not in grids]
        self.optimizer = torch.optim.SGD(
            [
                {"params": weights, "lr": rate_on(device, settings.learning_rate)},
                {
                    "params": [p for p in trainable if id(p) in grids],
                    "lr": rate_on(device, settings.scale_learning_rate),
                    "title": "scale_learning_rate",
                },
            ],
            momentum=settings.momentum,
            nesterov=settings.momentum > 0,
            fused=device.type == "cuda" or None,
        )
        self.replays = Replays(device, self.optimizer)
        every = [quantized_weight(student.network, layer) for layer in prepared_layers(student.network)]
        self.paired = [(q, weight) for q, weight in every if q.learnable and q.pair_limit is not None]

    def step(self, step: int) -> dict[str, Tensor]:
        """Do one distillation step by eq. (3) and return its losses."""
        if self.batch is None:  # else the step is taken again, in smaller parts
            self.batch = self.source.batch(step, self.merged)
        batch = self.batch
        set_learning_rate(self.optimizer, cosine(1.0, step, self.settings.steps))
        images, labels = batch.images.to(self.device), batch.labels.to(self.device)
        _, losses = self.replays.call("learn", self._learn, images, labels, batch.teacher_logits)
        self.batch = None
        return losses | batch.losses

    def rates(self) -> dict[str, float]:
        """See `Learner.rates`."""
        return learning_rates(self.optimizer)

    def _learn(self, images: Tensor, labels: Tensor, logits: Tensor | None) -> tuple[tuple[()], dict[str, Tensor]]:
        """Update the student once and return nothing but the losses; the batch goes through in `parts`."""
        self.student.train()
        self.optimizer.zero_grad(set_to_none=True)
        parts = Batch(images, labels, logits).split(self.parts)
        losses = [self._add_gradient(part, len(labels)) for part in parts]
        distributed.reduce_gradients(self.student.parameters())
        self.optimizer.step()
        constrain(self.student)
        for quantizer, weight in self.paired:
            quantizer.keep_pairs(weight)
        return (), averaged(losses, [len(part.labels) for part in parts])

    def _add_gradient(self, batch: Batch, whole: int) -> dict[str, Tensor]:
        """Add the gradient of a part of a batch of `whole` images; return its losses."""
        images, labels = batch.images, batch.labels
        answers, logits, distances = self._answers(images, batch.teacher_logits, len(labels))
        loss = self._loss(answers, logits, labels)
        total = loss + self.settings.intermediate_weight * distances["intermediate"] if distances else loss
        (total * (len(labels) / whole)).backward()
        agreement = self.kinds.agreement(logits, answers)
        terms = {name: term.detach() for name, term in {"kd": loss, **distances}.items()}
        return terms | {"agreement": agreement}

    def _loss(self, answers: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of eq. (3); of outputs that are not one vector of logits, the weighted sum of their own."""
        kd_weight, temperature = self.kd_weight, self.settings.temperature
        if not self.kinds.outputs:
            return distillation_loss(answers, logits, labels, kd_weight=kd_weight, temperature=temperature)
        soft = (self.weights * self.kinds.losses(logits, answers, temperature)).sum()
        return soft if kd_weight == 1 else kd_weight * soft + (1 - kd_weight) * self.kinds.label_loss(answers, labels)

    @torch.no_grad()
    def _output_weights(self, images: Tensor) -> Tensor:
        """Return the factor of each output's loss, such that all are equally far from the teacher at the start.

        Together they are as far as `START` says, whatever their units.
        """
        distances = self.kinds.distances(self.teacher(images), self.student(images)).clamp(min=NEAR)
        return (START / len(distances) / distances).float()

    def halve(self) -> bool:
        """Let the batch go through what cannot hold it in twice as many parts, where it has as many images."""
        if self.batch is None:  # it is the source
            return self.source.halve()
        if 2 * self.parts > len(self.batch.labels):
            return False
        self.parts *= 2
        self.replays.forget()
        return True

    def _answers(self, images: Tensor, known: Tensor | None, count: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the student's logits, the teacher's, and the distance between their layers where that is a loss.

        Args:
            images: [n, C, H, W] on the device, this process's share of the batch.
            known: the teacher's logits where the source has computed them; its layers' outputs need another forward.
            count: images of the whole batch, for which logits are returned.
        """
        if self.folded is None:
            with torch.no_grad():
                logits = distributed.whole(self.teacher(images), count) if known is None else known
            return distributed.whole(self.trained(images), count), logits, {}
        with torch.no_grad():
            logits, wanted = self.folded(images)
        answers, found = self.trained(images)
        distances = {"intermediate": intermediate_loss(found, wanted)}
        return (
            distributed.whole(answers, count),
            distributed.whole(logits, count) if known is None else known,
            distances,
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Return student, momentum and source."""
        return (
            under("student", self.student.state_dict())
            | under("optimizer", flatten_optimizer(self.optimizer))
            | under("source", self.source.state_dict())
        )

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self.student.load_state_dict(part("student", state))
        restore_optimizer(self.optimizer, part("optimizer", state))
        self.replays.forget()
        self.source.load_state_dict(part("source", state))


def distill(student: Student, teacher: nn.Module, source: SampleSource, settings: QAT, run: Run) -> None:
    """Train the student in place, from the run's checkpoint where there is one.

    Args:
        student: calibrated, its quantizers on.
        teacher: gives logits for images [N, C, H, W].
        source: of the batches.
        settings: of the distillation.
        run: device, folder, progress.

    Raises:
        NumericsError: the loss is not finite.
    """
    judged = settings.steps > 0 and not source.true_labels
    calibrated = copy.deepcopy(student.network) if judged else student.network
    run.train("distill", Distiller(student, teacher, source, settings, run.device), settings.steps, shown=source)
    student.eval()
    for layer in prepared_layers(student.network):  # scales that followed weights, or that an older version stored
        quantizer, weight = quantized_weight(student.network, layer)
        quantizer.keep_pairs(weight)
    plain_biases(student)
    if judged:
        _keep_the_better(student, calibrated, teacher, source, run)


@torch.no_grad()
def _keep_the_better(
    student: Student, calibrated: GraphModule, teacher: nn.Module, source: SampleSource, run: Run
) -> None:
    """Undo a distillation whose student answers fresh samples less like the teacher than the calibrated one did."""
    networks, kinds = (calibrated.eval(), student.network.eval()), Answers(outputs_of(teacher))
    found, count = torch.zeros(2, dtype=torch.float64), 0
    for batch in source.sample(JUDGED, JUDGED_AT_ONCE, "judged"):
        images = batch.images.to(run.device)
        wanted = teacher(images)
        found += len(images) * torch.stack([kinds.distance(wanted, network(images)).cpu() for network in networks])
        count += len(images)
    before, after = (found / count).tolist()
    student.undone = not after <= before
    if student.undone:
        student.network = calibrated
        logger.warning(
            f"distillation took the student away from the teacher: a divergence of {after:.3g} on {count} samples, "
            f"{before:.3g} before. It is undone; a lower --set quantizer.learning_rate or more steps may help."
        )
