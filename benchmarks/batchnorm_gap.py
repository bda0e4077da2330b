"""Whether samples' batch-norm gap tells a right mean and std from wrong ones: short zscgan fits of one network.

    python benchmarks/batchnorm_gap.py digits --budget 30s
    python benchmarks/batchnorm_gap.py examples/mobilenet_v2.py:mobilenet_v2 --weights mobilenet_v2.safetensors

Prints one line a variant: the gap at the first batch norm, mean and median over layers, in nats a channel, and the
share of labels that the float network recognises. No real image is looked at.
"""

import argparse
import statistics
import tempfile

import zsq


def main() -> None:
    """Fit once for each variant."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("network")
    parser.add_argument("--weights")
    parser.add_argument("--budget", default="30s")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    right = zsq.load_teacher(asked.network, weights=asked.weights).spec
    channels = right.channels
    variants = {
        "right": (right.mean, right.std),
        "none (0, 1)": ((0.0,) * channels, (1.0,) * channels),
        "half (0.5, 0.5)": ((0.5,) * channels, (0.5,) * channels),
        "narrow (0.5, 0.1)": ((0.5,) * channels, (0.1,) * channels),
        "scale 255 (0, 1/255)": ((0.0,) * channels, (1 / 255,) * channels),
    }
    for name, (mean, std) in variants.items():
        teacher = zsq.load_teacher(asked.network, weights=asked.weights, mean=mean, std=std)
        with tempfile.TemporaryDirectory() as folder:
            result = zsq.quantize(
                teacher, out=f"{folder}/run", budget=asked.budget, seed=asked.seed, device="cpu", quiet=True
            )
        record = result.record
        gaps = [layer.batch_norm_gap for layer in record.layers if layer.batch_norm_gap is not None]
        print(
            f"{asked.network} {name}: first {gaps[0]:.4g}, mean {statistics.fmean(gaps):.4g}, "
            f"median {statistics.median(gaps):.4g}, recognised {record.label_recognition} %, "
            f"steps {record.settings['method'].get('steps')}",
            flush=True,
        )


if __name__ == "__main__":
    main()
