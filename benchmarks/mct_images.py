"""Images of Sony MCT's generator for torchvision's MobileNetV2, for peers.py; run by an interpreter that has MCT.

    pip install model-compression-toolkit==2.6.1 torchvision safetensors
    python benchmarks/mct_images.py --weights imagenet_mobilenet_v2.safetensors --images 32 --iterations 120 --out x.npy

All images are one batch, and every other setting is MCT's default. The images, float32 [n, 3, 224, 224], are
normalised as the network takes them. Prints one line of JSON: seconds, peak memory in MiB, versions.
"""

import argparse
import json
import random
import resource
import time
from importlib.metadata import version

import numpy as np
import torch


def main() -> None:
    """Make the images and print what they cost."""
    import model_compression_toolkit as mct
    from safetensors.torch import load_file
    from torchvision.models import mobilenet_v2

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--iterations", type=int, default=120)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    np.random.seed(given.seed)
    random.seed(given.seed)
    network = mobilenet_v2()
    network.load_state_dict(load_file(given.weights))
    generation = mct.data_generation
    start = time.perf_counter()
    config = generation.get_pytorch_data_generation_config(n_iter=given.iterations, data_gen_batch_size=given.images)
    made = generation.pytorch_data_generation_experimental(
        model=network.eval(), n_images=given.images, output_image_size=(224, 224), data_generation_config=config
    )
    seconds = time.perf_counter() - start
    images = torch.cat([image.detach().cpu().reshape(-1, 3, 224, 224) for image in made]).float().numpy()
    np.save(given.out, images)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    versions = {name: version(name) for name in ("model-compression-toolkit", "torch", "torchvision")}
    facts = {"images": len(images), "steps": given.iterations, "seconds": round(seconds, 2), "peak_MiB": peak}
    print(json.dumps(facts | versions))


if __name__ == "__main__":
    main()
