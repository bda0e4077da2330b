"""How good is a file of a network with layer norm, attention and no batch norm, with and without real images?

    python benchmarks/transformer.py --weights net.pth            # trains where there is no such file, then measures

The network is small: two blocks as of ConvNeXt, then two of a vision transformer over 64 places. It is trained on the
drawn shapes of `zsq.data.shapes`, 32x32.
Appends a line a file to benchmarks/results/transformer.jsonl, and leaves out those that it holds.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import processor
from records import RESULTS, append
from torch import Tensor, nn
from torch.nn import functional as F

import zsq
from zsq.data import shapes
from zsq.data.datasets import open_dataset
from zsq.data.shapes.train import draw_images, turned
from zsq.evaluation.accuracy import evaluate
from zsq.export.files import open_file
from zsq.models.teacher import teacher_from_module

NARROW, WIDTH, HEADS, DEPTH = 24, 48, 4, 2
EXAMPLES, BATCH, RATE = 8000, 64, 2e-3
TESTED = 1000
METHODS: dict[str, dict[str, Any]] = {
    "zscgan": {"method.steps": 400, "method.batch_size": 32, "method.bns_weight": 0.0},
    "noise": {},
    "natural noise": {"method.distribution": "natural"},
    "real": {"method.data": "shapes:train", "method.limit": 1024},
}


class ConvBlock(nn.Module):
    """ConvNeXt's: a depthwise convolution, layer norm over channels and two linear layers, beside a skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 5, 1, 2, groups=width), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, width, H, W] to the same."""
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        mixed: Tensor = x + self.fc2(F.gelu(self.fc1(y))).permute(0, 3, 1, 2)
        return mixed


class Block(nn.Module):
    """Attention and two linear layers, each behind layer norm and beside a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [N, T, WIDTH] to tokens."""
        count, tokens, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(count, tokens, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(attended.transpose(1, 2).reshape(count, tokens, WIDTH))
        mixed: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return mixed


class ShapesViT(nn.Module):
    """Classify [N, 3, 32, 32] by 64 places."""

    def __init__(self) -> None:
        super().__init__()
        first, second = nn.Conv2d(3, NARROW, 3, 2, 1), nn.Conv2d(NARROW, WIDTH, 3, 2, 1)
        self.patches = nn.Sequential(first, ConvBlock(NARROW), second, ConvBlock(WIDTH))
        self.places = nn.Parameter(0.02 * torch.randn(1, 64, WIDTH))
        self.blocks = nn.Sequential(*[Block() for _ in range(DEPTH)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(shapes.CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        """Map images to logits."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.places
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return logits


def trained(path: Path, epochs: int) -> ShapesViT:
    """Return the network of a file; where there is none, trained and written there."""
    torch.manual_seed(0)
    net = ShapesViT()
    if path.exists():
        net.load_state_dict(torch.load(path))
        return net.eval()
    rows, generator = draw_images(EXAMPLES, shapes.TRAIN_SEED), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=0.02)
    steps = epochs * (EXAMPLES // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.15)
    for epoch in range(epochs):
        for index in torch.randperm(EXAMPLES, generator=generator).split(BATCH)[: EXAMPLES // BATCH]:
            images, labels = turned((rows[0][index], rows[1][index]), generator)
            loss = F.cross_entropy(net(images), labels.long(), label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1} of {epochs}: loss {float(loss.detach()):.3f}", flush=True)
    torch.save(net.state_dict(), path)
    return net.eval()


def measured(net: nn.Module, seeds: list[int], only: list[str], steps: int) -> None:
    """Quantize the network in every way that there is no line of."""
    spec = shapes.NETWORKS["shapes_mobilenet"].spec
    teacher = teacher_from_module(net, spec, name="shapes_vit")
    data = open_dataset("shapes", spec, limit=TESTED)
    path = RESULTS / "transformer.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = {tuple(line.get(key) for key in ("seed", "method", "bits", "quantizer")) for line in lines}
    base = {"network": "shapes_vit", "processor": processor(), "weights_sha256": teacher.weights_sha256}
    if not known:
        found = evaluate(teacher.network, data)
        append("transformer", base | {"method": "float", "top-1": found.top1})
    for seed in seeds:
        for method in only:
            for bits, quantizer in (("8", "ptq"), ("4", "ptq"), ("8", "qat"), ("4", "qat")):
                if (seed, method, bits, quantizer) in known:
                    continue
                settings = METHODS[method] | {"quantizer.num_samples": 256}
                settings |= {"quantizer.steps": steps} if quantizer == "qat" else {}
                with tempfile.TemporaryDirectory() as folder:
                    result = zsq.quantize(
                        teacher,
                        method=method.split()[-1],
                        quantizer=quantizer,
                        bits=bits,
                        settings=settings,
                        seed=seed,
                        out=Path(folder) / "run",
                        quiet=True,
                    )
                    found = evaluate(open_file(Path(folder) / "run" / result.record.file, threads=1), data)
                line = {"seed": seed, "method": method, "bits": bits, "quantizer": quantizer, "top-1": found.top1}
                line |= {"label_recognition": result.record.label_recognition, "seconds": round(result.record.seconds)}
                append("transformer", base | line)


def main() -> None:
    """Train and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--distilled", type=int, default=200, help="steps of distillation")
    given = parser.parse_args()
    torch.set_num_threads(1)
    measured(trained(given.weights, given.epochs), given.seeds, given.methods, given.distilled)


if __name__ == "__main__":
    main()
