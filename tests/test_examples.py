import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from zsq.data.datasets import open_dataset
from zsq.evaluation.accuracy import evaluate
from zsq.models.teacher import load_teacher

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "parameters", "norms"),
    [
        ("cifar10.py:cifar10_resnet20", 269_722, 19),
        ("cifar10.py:cifar10_resnet32", 464_154, 31),
        ("cifar10.py:cifar10_resnet44", 658_586, 43),
        ("mobilenet_v1.py:mobilenet_v1_025", 470_072, 27),
        ("mobilenet_v1.py:mobilenet_v1_075", 2_585_560, 27),
        ("mobilenet_v2.py:mobilenet_v2", 3_504_872, 52),
        ("efficientnet_lite.py:efficientnet_lite0", 4_652_008, 49),
        ("crepe.py:crepe_tiny", 486_552, 6),
    ],
)
def test_definitions(model, parameters, norms) -> None:
    teacher = load_teacher(str(EXAMPLES / model), weights="random")
    assert sum(p.numel() for p in teacher.network.parameters()) == parameters
    assert sum("batch_norm" in str(node.target) for node in teacher.network.graph.nodes) == norms


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "weights", "images", "counts"),
    [
        ("cifar10.py:cifar10_resnet20", "cifar10_resnet20", "cifar10/test.npz", (4606, 5000)),
        ("mobilenet_v1.py:mobilenet_v1_025", "imagenet_mobilenet_v1_025", "imagenet/val", (422, 650)),
        ("mobilenet_v2.py:mobilenet_v2", "imagenet_mobilenet_v2", "imagenet/val", (529, 650)),
        ("efficientnet_lite.py:efficientnet_lite0", "imagenet_efficientnet_lite0", "imagenet/val", (551, 650)),
    ],
)
def test_real_weights_reach_their_accuracy(real_data, model, weights, images, counts) -> None:
    path = real_data / "weights" / f"{weights}.safetensors"
    teacher = load_teacher(str(EXAMPLES / model), weights=path, resize="none")  # what the images are: cropped already
    result = evaluate(teacher.network, open_dataset(str(real_data / images), teacher.spec))
    assert result.num_images == counts[1]
    assert result.top1_correct == pytest.approx(counts[0], abs=2)


@pytest.mark.slow
def test_every_script_imports() -> None:
    """In one process; their names stand beside each other in no package."""
    root = EXAMPLES.parent
    scripts = [path for folder in ("examples", "benchmarks") for path in sorted((root / folder).glob("*.py"))]
    assert len(scripts) > 15
    text = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)"
    path = os.pathsep.join([str(root / "benchmarks"), str(root / "examples"), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, "-c", text, *(script.stem for script in scripts)],
        check=True,
        env=os.environ | {"PYTHONPATH": path},
    )


@pytest.mark.slow
def test_the_cells_of_the_notebook_run_one_after_the_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a Jupyter server: what a cell ends with is shown as a notebook shows it."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names: dict[str, object] = {}
    shown = []
    for cell in json.loads((EXAMPLES / "quantize.ipynb").read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        assert cell["outputs"] == []  # none is committed
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "cell", "exec"), names)
        if last is not None:
            shown.append(eval(compile(ast.Expression(last.value), "cell", "eval"), names))
    result, samples, losses, shape, _, report = shown
    assert "quantized top-1" in result._repr_html_()
    assert samples._repr_png_().startswith(b"\x89PNG")
    assert losses._repr_png_().startswith(b"\x89PNG")
    assert shape == (2, 10)
    assert report.exists()
