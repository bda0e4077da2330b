"""Train the bundled teacher and write its weights: `python -m zsq.data.digits.train [FILE]`, half a minute."""

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from zsq.data.bundled import write_weights
from zsq.data.digits import NETWORK, SPEC, split

SEED = 0
EPOCHS = 60
BATCH_SIZE = 64
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 5e-2
LABEL_SMOOTHING = 0.05


def half(train: bool) -> tuple[Tensor, Tensor]:
    """Return one half of the set as the network takes it: images float [N, 1, 8, 8], labels int64 [N]."""
    images, labels = split(train)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return SPEC.normalize(pixels), torch.from_numpy(labels)


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image [N, 1, 8, 8] by -1, 0 or 1 pixel a direction, filling with background."""
    padded = nn.functional.pad(images, (1, 1, 1, 1), value=float(-SPEC.mean[0] / SPEC.std[0]))
    offsets = torch.randint(0, 3, (2, len(images), 1, 1), generator=generator)
    rows = offsets[0] + torch.arange(8).view(1, 8, 1)
    columns = offsets[1] + torch.arange(8).view(1, 1, 8)
    return padded[torch.arange(len(images)).view(-1, 1, 1), 0, rows, columns].unsqueeze(1)


def train(epochs: int = EPOCHS) -> nn.Module:
    """Return the network, trained with AdamW under a one-cycle rate on the training half; the same on every call."""
    images, labels = half(train=True)
    generator = torch.Generator().manual_seed(SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        net = NETWORK.build()
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = epochs * (len(images) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    criterion = nn.CrossEntropyLoss(label_smoothing=LABEL_SMOOTHING)
    net.train()
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for start in range(0, len(images) - BATCH_SIZE + 1, BATCH_SIZE):
            chosen = order[start : start + BATCH_SIZE]
            loss = criterion(net(shifted(images[chosen], generator)), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def correct(net: nn.Module, train: bool) -> tuple[int, int]:
    """Return how many images of one half the network recognises, and how many there are."""
    images, labels = half(train)
    with torch.no_grad():
        return int((net(images).argmax(1) == labels).sum()), len(labels)


def main(arguments: list[str] | None = None) -> None:
    """Train, print the accuracy on both halves and write the weights."""
    parser = argparse.ArgumentParser(description="Train the bundled digits teacher and write its weights.")
    parser.add_argument("file", nargs="?", type=Path, default=NETWORK.weights, help="where to write (safetensors)")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    begin = time.perf_counter()
    net = train(options.epochs)
    write_weights(net, options.file)
    for name, is_train in (("train", True), ("test", False)):
        hits, count = correct(net, is_train)
        print(f"{name}: {hits} of {count} ({100 * hits / count:.2f} %)")
    print(f"{options.file}: {options.file.stat().st_size} bytes, {time.perf_counter() - begin:.1f} s")


if __name__ == "__main__":
    main()
