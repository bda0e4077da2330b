"""Train a network of the drawn world and write its weights: `python -m zsq.data.shapes.train NAME [FILE]`.

Each takes a few minutes on one core. Seeds are fixed, and so are the images: one machine writes the same file twice.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from zsq.data import shapes
from zsq.data.bundled import write_weights
from zsq.data.shapes.detection import maps
from zsq.data.shapes.networks import STRIDE

SEED = 0

TEST_EXAMPLES = 2000

VIEWS = 6
"""Views of each shape that the embedder learns from."""

TEMPERATURE = 0.1
"""Of the cosines of its loss."""

NOISE_IMAGES = 8
"""Images of noise beside each batch of the MobileNet."""

NOISE_WEIGHT = 0.5
"""Of their part of its loss."""

RAMP = (0.15, 0.65)
"""Shares of the training at which inputs begin to be made harder, and at which they are made so in full."""

GROUND_WEIGHT = 0.2
"""Of a pixel of the ground, where one of a shape counts 1."""

Rows = tuple[Tensor, ...]
"""What is known of each training example: first its input, then what the loss needs."""

Draw = Callable[[int, int], Rows]
Loss = Callable[[nn.Module, Rows], Tensor]
Augment = Callable[[Rows, torch.Generator], Rows]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How one network is trained: AdamW under a one-cycle rate."""

    draw: Draw
    """Draws so many examples of a seed."""
    augment: Augment
    """Changes a batch at random."""
    loss: Loss
    """Of a network on a batch."""
    score: Callable[[nn.Module, Draw, int], dict[str, float]]
    """How good a network is on so many test examples, by the names of the measures."""
    examples: int
    epochs: int
    batch_size: int = 64
    learning_rate: float = 4e-3
    weight_decay: float = 1e-2
    reach: float = 0.0
    """Most by which each number of an input is changed so that the loss grows; see `hardened`."""


def pixels(images: np.ndarray) -> Tensor:
    """Return uint8 [N, H, W, 3] as the networks take it, float [N, 3, H, W]."""
    spec = shapes.NETWORKS["shapes_mobilenet"].spec
    return spec.normalize(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)


def score(name: str, net: nn.Module, count: int) -> dict[str, float]:
    """Return how good a network is on so many test examples, by the names of the measures."""
    return RECIPES[name].score(net, RECIPES[name].draw, count)


def train(name: str, examples: int | None = None, epochs: int | None = None) -> nn.Module:
    """Return a network, trained; the same on every call."""
    recipe, bundled = RECIPES[name], shapes.NETWORKS[name]
    data = recipe.draw(examples or recipe.examples, shapes.TRAIN_SEED)
    generator = torch.Generator().manual_seed(SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        net = bundled.build()
    optimizer = torch.optim.AdamW(net.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    rounds = recipe.epochs if epochs is None else epochs
    steps = rounds * (len(data[0]) // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=steps, pct_start=0.15)
    net.train()
    for epoch in range(rounds):
        losses = []
        for batch in _batches(data, recipe.batch_size, generator):
            rows = _channels_last(recipe.augment(batch, generator))
            reach = recipe.reach * _ramp(schedule.last_epoch / steps)
            loss = recipe.loss(net, hardened(net, recipe.loss, rows, reach, generator) if reach else rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        print(f"epoch {epoch + 1} of {rounds}: loss {torch.stack(losses).mean():.4f}", flush=True)
    return net.eval()


def _ramp(done: float) -> float:
    """Return how much of its reach has what makes inputs harder, where so much of the training is done."""
    return min(max((done - RAMP[0]) / (RAMP[1] - RAMP[0]), 0.0), 1.0)


def _batches(data: Rows, size: int, generator: torch.Generator) -> Iterator[Rows]:
    order = torch.randperm(len(data[0]), generator=generator)
    for start in range(0, len(order) - size + 1, size):
        rows = order[start : start + size]
        yield tuple(part[rows] for part in data)


def _channels_last(rows: Rows) -> Rows:
    """Lay images out as a CPU convolves them quickest."""
    inputs = rows[0]
    return (inputs.contiguous(memory_format=torch.channels_last), *rows[1:]) if inputs.dim() == 4 else rows


def turned(rows: Rows, generator: torch.Generator) -> Rows:
    """Mirror and turn a batch of images, and maps over them, by a multiple of 90 degrees; labels [N] stay."""
    quarters, mirrored = torch.randint(0, 4, (1,), generator=generator), torch.randint(0, 2, (1,), generator=generator)

    def turn(part: Tensor) -> Tensor:
        if part.dim() < 3:
            return part
        part = torch.rot90(part, int(quarters), (-2, -1))
        return part.flip(-1) if mirrored else part

    return tuple(turn(part) for part in rows)


def turned_beside_noise(rows: Rows, generator: torch.Generator) -> Rows:
    """Turn a batch and put images of Gaussian noise behind it, which have no label."""
    images, labels = turned(rows, generator)
    return torch.cat([images, torch.randn(NOISE_IMAGES, *images.shape[1:], generator=generator)]), labels


def hardened(net: nn.Module, loss: Loss, rows: Rows, reach: float, generator: torch.Generator) -> Rows:
    """Return a batch whose inputs are changed by at most `reach` to raise the loss: a random step, then one uphill.

    A network that withstands this is pulled towards shapes that an eye sees, too, and so are images learned from it.

    Source: Wong, Rice, Kolter, Fast is better than free, algorithm 3; Santurkar et al., Image Synthesis with a Single
    (Robust) Classifier.
    """
    inputs = rows[0]
    change = ((2 * torch.rand(inputs.shape, generator=generator) - 1) * reach).requires_grad_()
    net.eval()
    (uphill,) = torch.autograd.grad(loss(net, (inputs + change, *rows[1:])), change)
    net.train()
    change = (change.detach() + 1.25 * reach * uphill.sign()).clamp(-reach, reach)
    return _channels_last((inputs + change, *rows[1:]))


def draw_images(count: int, seed: int) -> Rows:
    """Draw images and their classes."""
    images, labels = shapes.images(count, seed=seed)
    return pixels(images), torch.from_numpy(labels)


def draw_scenes(count: int, seed: int) -> Rows:
    """Draw scenes and the class of each pixel."""
    drawn = shapes.scenes(count, seed=seed)
    return pixels(drawn.images), torch.from_numpy(drawn.masks)


def draw_views(count: int, seed: int) -> Rows:
    """Draw `VIEWS` images of each of many shapes, [N, VIEWS, 3, 32, 32]."""
    drawn = shapes.views(count, VIEWS, seed=seed)
    return (pixels(drawn.reshape(-1, *drawn.shape[2:])).view(count, VIEWS, 3, *drawn.shape[2:4]),)


def draw_maps(count: int, seed: int) -> Rows:
    """Draw scenes and the three maps that the detector shall give for them."""
    drawn = shapes.scenes(count, seed=seed)
    cells = drawn.images.shape[1] // STRIDE
    wanted = [maps(*each, len(shapes.CLASSES), cells, STRIDE) for each in zip(drawn.boxes, drawn.labels, strict=True)]
    return (pixels(drawn.images), *(torch.from_numpy(np.stack(part)) for part in zip(*wanted, strict=True)))


def draw_signals(count: int, seed: int) -> Rows:
    """Draw signals and their classes."""
    drawn, labels = shapes.signals(count, seed=seed)
    return torch.from_numpy(drawn), torch.from_numpy(labels)


def as_they_are(rows: Rows, generator: torch.Generator) -> Rows:
    """Leave a batch as it is."""
    del generator
    return rows


def two_views(rows: Rows, generator: torch.Generator) -> Rows:
    """Take two views of each shape, [2N, 3, 32, 32]: all first ones, then all second ones."""
    chosen = torch.randperm(VIEWS, generator=generator)[:2]
    return (rows[0][:, chosen].transpose(0, 1).flatten(0, 1),)


def cross_entropy(net: nn.Module, rows: Rows) -> Tensor:
    """Return the cross-entropy of classes, of an example or of each of its pixels."""
    return nn.functional.cross_entropy(net(rows[0]), rows[1].long())


def undecided_about_noise(net: nn.Module, rows: Rows) -> Tensor:
    """Return the cross-entropy of images, and of equal probabilities for those behind the labelled ones.

    Source: Hendrycks et al., Deep Anomaly Detection with Outlier Exposure, section 3.
    """
    images, labels = rows
    known, unknown = net(images).split([len(labels), len(images) - len(labels)])
    classes = nn.functional.cross_entropy(known, labels.long())
    even: Tensor = -nn.functional.log_softmax(unknown, 1).mean()
    return classes + NOISE_WEIGHT * even


def balanced_cross_entropy(net: nn.Module, rows: Rows) -> Tensor:
    """Return the cross-entropy of the classes of pixels, of which the ground, most of them, counts for less."""
    logits = net(rows[0])
    weights = torch.ones(logits.shape[1])
    weights[0] = GROUND_WEIGHT
    return nn.functional.cross_entropy(logits, rows[1].long(), weights)


def contrastive(net: nn.Module, rows: Rows) -> Tensor:
    """Return the cross-entropy of finding each shape's other view among all views of the batch, by cosine.

    Source: Chen et al., SimCLR, equation (1).
    """
    embeddings = nn.functional.normalize(net(rows[0]))
    cosines = embeddings @ embeddings.T / TEMPERATURE
    cosines = cosines.masked_fill(torch.eye(len(cosines), dtype=torch.bool), -torch.inf)
    return nn.functional.cross_entropy(cosines, torch.arange(len(cosines)).roll(len(cosines) // 2))


def focal_and_sizes(net: nn.Module, rows: Rows) -> Tensor:
    """Return CenterNet's loss: focal on the heat, and absolute errors of size and offset in the cells of middles.

    Source: Zhou, Wang, Kraehenbuehl, Objects as Points, equations (1) to (4).
    """
    images, heat, size, offset = rows
    logits, sizes, offsets = net(images)
    middles = heat == 1
    count = middles.sum().clamp(min=1)
    score = logits.sigmoid()
    found = (1 - score) ** 2 * nn.functional.logsigmoid(logits)
    spared = (1 - heat) ** 4 * score**2 * nn.functional.logsigmoid(-logits)
    focal = -torch.where(middles, found, spared).sum() / count
    here = middles.any(1, keepdim=True)
    errors = 0.2 * (sizes - size).abs() + (offsets - offset).abs()
    loss: Tensor = focal + (errors * here).sum() / count
    return loss


@torch.no_grad()
def answers(net: nn.Module, inputs: Tensor) -> list[Tensor]:
    """Return what a network gives for inputs [N, ...], a tensor for each of its outputs."""
    parts = [net(part) for part in inputs.split(100)]
    parts = [part if isinstance(part, tuple) else (part,) for part in parts]
    return [torch.cat(each) for each in zip(*parts, strict=True)]


def top1(net: nn.Module, draw: Draw, count: int) -> dict[str, float]:
    """Return the share of examples recognised."""
    inputs, labels = draw(count, shapes.TEST_SEED)
    return {"top-1": float((answers(net, inputs)[0].argmax(1) == labels).double().mean())}


def mean_iou(net: nn.Module, draw: Draw, count: int) -> dict[str, float]:
    """Return intersection over union, the mean of all classes with the ground, and the share of pixels recognised."""
    inputs, masks = draw(count, shapes.TEST_SEED)
    seen, classes = answers(net, inputs)[0].argmax(1), 1 + len(shapes.CLASSES)
    table = torch.bincount(masks.long().flatten() * classes + seen.flatten(), minlength=classes**2).view(classes, -1)
    right, union = table.diag().double(), table.sum(0) + table.sum(1) - table.diag()
    return {"mean IoU": float((right / union).mean()), "pixels": float(right.sum() / table.sum())}


def verified(net: nn.Module, draw: Draw, count: int) -> dict[str, float]:
    """Return the share of pairs told apart by the cosine of their embeddings, at the best threshold."""
    del draw
    drawn = shapes.pairs(count, seed=shapes.TEST_SEED)
    first, second = (answers(net, pixels(images))[0] for images in (drawn.first, drawn.second))
    cosines = nn.functional.cosine_similarity(first, second).double().numpy()
    same = drawn.same[np.argsort(-cosines, kind="stable")]
    right = np.cumsum(same) + np.concatenate([np.cumsum(~same[::-1])[::-1][1:], [0]])
    return {"verification": float(right.max() / count)}


def found(net: nn.Module, draw: Draw, count: int) -> dict[str, float]:
    """Return the average precision of boxes at an overlap of a half."""
    del draw
    drawn = shapes.scenes(count, seed=shapes.TEST_SEED)
    heat, size, offset = (part.numpy() for part in answers(net, pixels(drawn.images)))
    return {"AP at 0.5": shapes.average_precision(shapes.decode(heat, size, offset), drawn.boxes, drawn.labels)}


RECIPES = {
    "shapes_mobilenet": Recipe(
        draw=draw_images,
        augment=turned_beside_noise,
        loss=undecided_about_noise,
        score=top1,
        examples=16_000,
        epochs=16,
        weight_decay=1e-3,
        reach=0.05,
    ),
    "shapes_unet": Recipe(
        draw=draw_scenes,
        augment=turned,
        loss=balanced_cross_entropy,
        score=mean_iou,
        examples=8000,
        epochs=16,
        batch_size=32,
    ),
    "shapes_embedder": Recipe(
        draw=draw_views, augment=two_views, loss=contrastive, score=verified, examples=4000, epochs=16
    ),
    "shapes_detector": Recipe(
        draw=draw_maps, augment=as_they_are, loss=focal_and_sizes, score=found, examples=6000, epochs=8, batch_size=32
    ),
    "signals_net": Recipe(
        draw=draw_signals, augment=as_they_are, loss=cross_entropy, score=top1, examples=12_000, epochs=12
    ),
}
"""By the network's name."""


def main(arguments: list[str] | None = None) -> None:
    """Train and write the weights."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("file", nargs="?", type=Path, help="where to write (safetensors)")
    parser.add_argument("--examples", type=int)
    parser.add_argument("--epochs", type=int)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    begin = time.perf_counter()
    net = train(options.name, options.examples, options.epochs)
    path = options.file or shapes.NETWORKS[options.name].weights
    path.parent.mkdir(exist_ok=True)
    write_weights(net, path)
    for measure, value in score(options.name, net, TEST_EXAMPLES).items():
        print(f"{measure}: {value:.4f}")
    print(f"{path}: {path.stat().st_size} bytes, {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
