"""Steps of zsq as they run, and the work in them that cannot be left out, each part on tensors made beforehand."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule

from zsq.graph import edit
from zsq.graph.batchnorm import batch_norms
from zsq.graph.fold import fold
from zsq.graph.moments import moments
from zsq.methods.pool import Stateless
from zsq.methods.zscgan import ZSCGAN, ConditionalSource
from zsq.models.teacher import Teacher, load_teacher
from zsq.quantization.ptq import quantize_ptq
from zsq.quantization.qat import QAT, Distiller
from zsq.quantization.quantizers import quantizers
from zsq.training.loop import Run
from zsq.training.losses import distillation_loss
from zsq.types import Batch

EXAMPLES = Path(__file__).parents[1] / "examples"
NETWORKS = {
    "cifar10_resnet20": f"{EXAMPLES}/cifar10.py:cifar10_resnet20",
    "mobilenet_v1_025": f"{EXAMPLES}/mobilenet_v1.py:mobilenet_v1_025",
    "mobilenet_v1_075": f"{EXAMPLES}/mobilenet_v1.py:mobilenet_v1_075",
    "digits": "digits",
}

Actions = dict[str, Callable[[], object]]


def random_teacher(network: str, device: torch.device) -> Teacher:
    """Return a network of `NETWORKS` with seeded random weights."""
    return load_teacher(NETWORKS[network], weights="random").to(device)


def source_of(teacher: Teacher, batch: int, device: torch.device, **settings: object) -> ConditionalSource:
    """Return an untrained ZS-CGAN source; two calls give equal ones."""
    return ZSCGAN(batch_size=batch, **settings).source(teacher, Run(device=device), 0)  # type: ignore[arg-type]


def counted(step: Callable[[int], object]) -> Callable[[], object]:
    """Return an action that does the next step at each call."""
    done = iter(range(1_000_000))
    return lambda: step(next(done))


def one_batch(source: ConditionalSource) -> Batch:
    """Return what distillation gets from a source, and train it by one step."""
    return source.batch(0, None)


class Feed(Stateless):
    """Gives one batch again and again, or the fresh batches of a source that goes on learning."""

    data_free, true_labels, asks_labels = True, False, True

    def __init__(self, fixed: Batch, source: ConditionalSource | None = None) -> None:
        self.fixed, self.source = fixed, source

    def sample(self, count: int, batch_size: int = 100, name: str = "sample") -> Iterator[Batch]:
        """Give the fixed batch."""
        del count, batch_size, name
        yield self.fixed

    def batch(self, step: int, student: torch.nn.Module | None) -> Batch:
        """Give the batch of a step."""
        return self.source.batch(step, student) if self.source else self.fixed


def distiller_of(teacher: Teacher, feed: Feed, device: torch.device, scales: str) -> Distiller:
    """Return a student calibrated on the feed's fixed batch, and what trains it."""
    settings = QAT(scales=scales, num_samples=len(feed.fixed.images), bias_correction=False)  # type: ignore[arg-type]
    student = quantize_ptq(
        teacher.network, lambda: feed.sample(1), settings, Run(device=device), learnable=scales == "learnable"
    )
    return Distiller(student, teacher.network, feed, settings, device)


def multiply_added(network: GraphModule) -> GraphModule:
    """Return a copy whose batch norms are one multiply-add each: the quickest form that keeps what they read."""
    network = edit.copy_network(network)
    for index, norm in enumerate(batch_norms(network)):
        x = norm.node.args[0]
        assert isinstance(x, torch.fx.Node)
        shape = (1, -1, *[1] * (x.meta["val"].dim() - 2))
        names = (f"bench_scale_{index}", f"bench_shift_{index}")
        for name, value in zip(names, (norm.scale, norm.shift), strict=True):
            edit.set_tensor(network, name, value.view(shape))
        with network.graph.inserting_before(norm.node):
            stored = tuple(network.graph.get_attr(name) for name in names)
            norm.node.replace_all_uses_with(network.graph.call_function(torch.addcmul, (stored[1], x, stored[0])))
        network.graph.erase_node(norm.node)
    return edit.finish(network).requires_grad_(False)


def norm_inputs(teacher: Teacher, images: Tensor) -> list[Tensor]:
    """Return what each batch norm reads, as leaves that take gradients."""
    network = edit.copy_network(teacher.network).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    view = edit.view_of(network, [norm.node.args[0] for norm in batch_norms(network)])  # type: ignore[misc]
    with torch.no_grad():
        return [x.detach().requires_grad_() for x in view(images)[1]]


def pass_through(network: torch.nn.Module, images: Tensor, upstream: Tensor) -> Callable[[], None]:
    """Return the action: forward, and the gradient down to the images."""
    leaf = images.detach().requires_grad_()

    def action() -> None:
        leaf.grad = None
        network(leaf).backward(upstream)

    return action


def learning_parts(source: ConditionalSource, teacher: Teacher) -> Actions:
    """Return the irreducible parts of a ZS-CGAN step: generator, teacher, statistics, optimizer.

    Raises:
        AssertionError: they would not compute what the step computes.
    """
    generator, count = source.generator.train(), source.batch_size
    random = torch.Generator(source.device).manual_seed(0)
    labels = torch.randint(0, source.spec.classes, (count,), generator=random, device=source.device)
    noise = torch.randn(count, source.noise_size, generator=random, device=source.device)
    images = generator(noise, labels).detach()
    image_gradient = torch.randn(images.shape, generator=random, device=source.device).to(
        memory_format=torch.channels_last
    )
    plain = multiply_added(teacher.network).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    inputs = norm_inputs(teacher, images)
    logits_gradient = torch.randn(count, source.spec.classes, generator=random, device=source.device) / count
    with torch.no_grad():
        check_same(source, images, plain(images), [moments(x) for x in inputs])

    def make_images() -> None:
        source.optimizer.zero_grad(set_to_none=True)
        generator(noise, labels).backward(image_gradient)

    def statistics() -> None:
        for x in inputs:
            x.grad = None
        source.bns([moments(x) for x in inputs]).backward()

    return {
        "generator": make_images,
        "teacher": pass_through(plain, images, logits_gradient),
        "statistics": statistics,
        "optimizer": source.optimizer.step,
    }


def check_same(source: ConditionalSource, images: Tensor, logits: Tensor, found: list[tuple[Tensor, Tensor]]) -> None:
    """Assert that the parts are given what the step works on, and find what it finds."""
    spec = source.spec
    assert images.shape == (source.batch_size, spec.channels, spec.height, spec.width), images.shape
    wanted, observed = source.teacher(images)
    assert logits.shape == wanted.shape == (source.batch_size, spec.classes), logits.shape
    torch.testing.assert_close(logits, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
    loss, other = source.bns(observed), source.bns(found)
    torch.testing.assert_close(loss, other, rtol=1e-3, atol=1e-3)


def folded_teacher(source: ConditionalSource, teacher: Teacher) -> Actions:
    """Return the teacher's pass with batch norm folded into the layers: what observing them before they scale costs."""
    images = one_batch(source).images
    network, _ = fold(teacher.network)
    network = network.requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    upstream = torch.randn(len(images), source.spec.classes, device=source.device) / len(images)
    return {"folded teacher": pass_through(network, images, upstream)}


def float_training(teacher: Teacher, batch: Batch, settings: QAT) -> tuple[Callable[[], None], int]:
    """Return the training step of the BN-folded float network with a student's loss and optimizer, and its weights."""
    network, _ = fold(teacher.network)
    if batch.images.is_cuda:  # as the student
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for layer in list(edit.layers(network)):
        for read in layer.args[1:3]:
            if isinstance(read, torch.fx.Node):
                value = edit.tensor_of(network, read)
                assert value is not None
                edit.set_tensor(network, str(read.target), value.clone(), trainable=True)
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=settings.learning_rate, momentum=settings.momentum, nesterov=True)

    def action() -> None:
        optimizer.zero_grad(set_to_none=True)
        answer_loss(network, batch).backward()
        optimizer.step()

    return action, sum(p.numel() for p in parameters)


def student_pass(distiller: Distiller, batch: Batch) -> Callable[[], None]:
    """Return the student's forward and backward pass through its fake quantizers, without optimizer."""

    def action() -> None:
        distiller.student.train()
        distiller.optimizer.zero_grad(set_to_none=True)
        answer_loss(distiller.trained, batch).backward()

    return action


def answer_loss(network: torch.nn.Module, batch: Batch) -> Tensor:
    """Return the distillation loss of a network on a batch of which the teacher's logits are known."""
    logits = batch.teacher_logits
    assert logits is not None
    answers = network(batch.images)
    assert answers.shape == logits.shape, (answers.shape, logits.shape)
    return distillation_loss(answers, logits, batch.labels, kd_weight=1.0)


def trained_weights(distiller: Distiller) -> int:
    """Count the weights and biases that a student trains, without its grids."""
    grids = {id(p) for quantizer in quantizers(distiller.student) for p in quantizer.parameters()}
    return sum(p.numel() for p in distiller.student.parameters() if p.requires_grad and id(p) not in grids)
