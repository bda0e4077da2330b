"""A world drawn by code, in any amount: shapes with classes, masks, boxes and identities, and signals."""

from pathlib import Path

from zsq.data.bundled import Bundled
from zsq.data.shapes import networks
from zsq.data.shapes.detection import average_precision, decode
from zsq.data.shapes.heartbeats import LEADS, SAMPLES, SIGNAL_CLASSES, signal_labels, signals
from zsq.data.shapes.world import (
    CLASSES,
    MOST_SHAPES,
    TEST_SEED,
    TRAIN_SEED,
    Pairs,
    Scenes,
    images,
    labels,
    pairs,
    scenes,
    views,
)
from zsq.types import ImageSpec, Output

__all__ = [
    "CLASSES",
    "LEADS",
    "MOST_SHAPES",
    "NETWORKS",
    "SAMPLES",
    "SIGNAL_CLASSES",
    "TEST_IMAGES",
    "TEST_SEED",
    "TRAIN_IMAGES",
    "TRAIN_SEED",
    "Pairs",
    "Scenes",
    "average_precision",
    "decode",
    "images",
    "labels",
    "pairs",
    "scenes",
    "signal_labels",
    "signals",
    "views",
]

TRAIN_IMAGES, TEST_IMAGES = 8000, 2000
"""Images of the data sets `shapes:train` and `shapes`; the functions of this package draw any number."""

MEAN, STD = (0.389, 0.389, 0.389), (0.192, 0.192, 0.192)
"""Of the pixels, on the scale of [0, 1]; the colours are drawn alike."""

WEIGHTS = Path(__file__).with_name("weights")


def _spec(size: int, classes: int = 0, outputs: tuple[Output, ...] = ()) -> ImageSpec:
    return ImageSpec(channels=3, height=size, width=size, classes=classes, mean=MEAN, std=STD, outputs=outputs)


NETWORKS = {
    network.name: network
    for network in (
        Bundled(
            name="shapes_mobilenet",
            summary="32x32 drawn shapes, 10 classes; a MobileNet",
            build=networks.ShapesMobileNet,
            weights=WEIGHTS / "mobilenet.safetensors",
            spec=_spec(32, len(CLASSES)),
            class_names=CLASSES,
        ),
        Bundled(
            name="shapes_unet",
            summary="the class of each pixel of 64x64 drawn shapes, ground first; a U-Net",
            build=networks.ShapesUNet,
            weights=WEIGHTS / "unet.safetensors",
            spec=_spec(64, 1 + len(CLASSES)),
            class_names=("ground", *CLASSES),
        ),
        Bundled(
            name="shapes_embedder",
            summary="embeddings of 32x32 drawn shapes, 64 numbers",
            build=networks.ShapesEmbedder,
            weights=WEIGHTS / "embedder.safetensors",
            spec=_spec(32, outputs=(Output("embedding", "embedding"),)),
        ),
        Bundled(
            name="shapes_detector",
            summary="heat, size and offset of 64x64 drawn shapes, 16x16 cells; a CenterNet",
            build=networks.ShapesDetector,
            weights=WEIGHTS / "detector.safetensors",
            spec=_spec(64, outputs=tuple(Output(name, "values") for name in ("heat", "size", "offset"))),
        ),
        Bundled(
            name="signals_net",
            summary="drawn heartbeats of 2x256 samples, 8 classes; 1-D convolutions",
            build=networks.SignalsNet,
            weights=WEIGHTS / "signals.safetensors",
            spec=ImageSpec.of_shape((LEADS, SAMPLES), classes=len(SIGNAL_CLASSES), mean=(0.0, 0.0), std=(1.0, 1.0)),
            class_names=SIGNAL_CLASSES,
        ),
    )
}
"""The networks trained on this world by `python -m zsq.data.shapes.train NAME`, by name."""
