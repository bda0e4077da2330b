"""Nothing passes that is not finished, or that is not what it says."""

import shutil
import time

import pytest
import torch
from torch import nn
from toys import SPEC

from zsq.checked import validated
from zsq.comparison.recipe import cells, read_recipe
from zsq.data.datasets import open_dataset
from zsq.errors import InputError, NumericsError, StorageError, TeacherError
from zsq.export.image_spec import from_json
from zsq.export.onnx_runtime import OnnxClassifier
from zsq.models.network import Network
from zsq.models.teacher import teacher_from_module
from zsq.runs import pipeline
from zsq.runs.quantize import quantize
from zsq.training.loop import Run
from zsq.types import ImageSpec

RECIPE = """
title = "many"
seeds = {seeds}
[[teachers]]
model = "digits"
data = "digits"
[[methods]]
name = "noise"
[[quantizers]]
name = "ptq"
bits = {bits}
"""


class Diverges:
    """Its losses are finite, and its last update is not a number."""

    def __init__(self, last):
        self.last, self.weight = last, torch.zeros(3)

    def step(self, step):
        self.weight += float("nan") if step == self.last else 1
        return {"loss": torch.tensor(1.0)}

    def state_dict(self):
        return {"weight": self.weight}

    def load_state_dict(self, state):
        self.weight = state["weight"]

    def halve(self):
        return False

    def rates(self):
        return {}


def test_what_diverges_in_its_last_step_is_not_stored(tmp_path):
    with pytest.raises(NumericsError, match=r"after step 4 of 5, 1 of 1 tensors, such as weight, are not numbers"):
        Run(tmp_path).train("fit", Diverges(4), 5)
    assert not (tmp_path / "checkpoints").exists()


def test_a_lower_rate_is_not_advised_where_nothing_was_learnt():
    class Lost(Diverges):
        def step(self, step):
            return {"loss": torch.tensor(float("inf"))}

    with pytest.raises(NumericsError, match=r"at step 0 of 5; nothing was learnt before it") as caught:
        Run().train("fit", Lost(9), 5)
    assert "learning rate" not in str(caught.value)


@pytest.mark.slow
def test_a_run_that_lost_its_folder_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "measure_latency", lambda job: shutil.rmtree(job.folder))
    monkeypatch.setattr(pipeline, "_record", lambda *_: type("Record", (), {"artifacts": {}})())
    monkeypatch.setattr(pipeline, "replace", lambda record, **_: record)
    monkeypatch.setattr(pipeline, "end_details", lambda record: ())
    with pytest.raises(StorageError, match=r"run lost settings\.toml while the run went on; it is not finished"):
        quantize("digits", out=tmp_path / "run", method="noise", settings={"quantizer.num_samples": 16}, quiet=True)
    assert not (tmp_path / "run" / "result.json").exists()


def test_no_class_is_refused():
    with pytest.raises(InputError, match="classes is 0; it must be at least 1"):
        Network(model="x", classes=0, input=(1, 8, 8)).spec_alone()


def test_a_file_that_gives_other_classes_than_it_says_is_refused(tmp_path):
    class Three(OnnxClassifier):
        def __init__(self):
            super(OnnxClassifier, self).__init__(tmp_path / "a.onnx", {"image_spec": NOTE}, ["batch", 1, 8, 8])

        def _run(self, array):
            return [torch.zeros(len(array), 3).numpy()]

    with pytest.raises(InputError, match="gives 3 values an image, and its metadata says 10"):
        Three()(torch.zeros(2, 1, 8, 8))


NOTE = '{"channels": 1, "height": 8, "width": 8, "classes": 10, "mean": [0.5], "std": [0.5], "resize": null}'


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"height": 8', '"height": "tall"', "height: Input should be a valid integer"),
        ('"mean": [0.5]', '"mean": 0.5', "mean: Input should be a valid tuple"),
        ('"height": 8, ', "", "image spec: height is 0"),
        ('"height": 8', '"height": 0', "image spec: height is 0"),
        ("{", "", "is not JSON"),
        (NOTE, "[1]", "holds no image spec"),
        (NOTE, "[" * 100_000, "is not JSON"),
    ],
)
def test_a_note_of_another_type_is_told(old, new, message):
    with pytest.raises(InputError, match=message):
        from_json(NOTE.replace(old, new, 1))


def test_a_note_is_read():
    assert from_json(NOTE) == ImageSpec(channels=1, height=8, width=8, classes=10, mean=(0.5,), std=(0.5,))
    assert validated(ImageSpec, {**SPEC_VALUES}, "here").outputs[0].shape == (4,)


SPEC_VALUES = {
    "channels": 1,
    "height": 8,
    "width": 8,
    "mean": [0],
    "std": [1],
    "outputs": [{"name": "a", "kind": "values", "shape": [4]}],
}


def test_widths_are_counted_once_in_whatever_way_they_are_written(tmp_path):
    (tmp_path / "a.toml").write_text(RECIPE.format(seeds="[0]", bits='["08", "w4A8", "int6"]'))
    assert [cell.bits for cell in cells(read_recipe(tmp_path / "a.toml"))] == ["8", "W4A8", "6"]
    (tmp_path / "a.toml").write_text(RECIPE.format(seeds="[0]", bits='[8, "W8A8"]'))
    with pytest.raises(InputError, match=r"bits of quantizer 'ptq' are \['8', '8'\]; each may stand once"):
        read_recipe(tmp_path / "a.toml")


def test_a_grid_of_a_million_cells_answers_at_once(tmp_path):
    (tmp_path / "a.toml").write_text(RECIPE.format(seeds=list(range(250_000)), bits='["8", "6", "4", "2"]'))
    begin = time.process_time()
    with pytest.raises(InputError, match=r"the grid has 1,000,000 cells; at most 10,000 are run"):
        read_recipe(tmp_path / "a.toml")
    assert time.process_time() - begin < 2


def test_images_that_no_memory_holds_are_refused_before_they_are_made():
    with pytest.raises(InputError, match=r"3 images of 1x100000000x100000000 need .* GiB of memory"):
        teacher_from_module(
            nn.Flatten(), ImageSpec(channels=1, height=10**8, width=10**8, classes=2, mean=(0.0,), std=(1.0,))
        )


def test_a_batch_that_no_memory_holds_is_refused_before_it_is_drawn(tmp_path):
    with pytest.raises(InputError, match=r"batches of 1,000,000,000 images need 238 GiB of memory"):
        quantize("digits", out=tmp_path / "a", settings=("method.batch_size=1000000000",), quiet=True)


@pytest.mark.parametrize(
    ("text", "message"), [("learning_rate=1e300", "at most 1e.30"), ("steps=1000000000000", "at most 1e.09")]
)
def test_huge_settings_are_refused(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        quantize("digits", out=tmp_path / "a", settings=(f"method.{text}",), quiet=True)


def test_an_output_of_integers_is_named():
    class Classes(nn.Flatten):
        def forward(self, x):
            return super().forward(x).long()

    with pytest.raises(TeacherError, match=r"gives torch\.int64 values, which cannot be learnt from"):
        teacher_from_module(Classes(), SPEC)


def test_labels_of_thirty_digits_are_told(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "metadata.csv").write_text("file_name,label\na.png," + "9" * 30 + "\n")
    with pytest.raises(InputError, match=r"line 2 of metadata\.csv has the label '9{30}'"):
        open_dataset(str(tmp_path), SPEC)
