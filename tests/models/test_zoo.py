import socket
import sys
import types

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from zsq.errors import InputError, MissingExtraError, TeacherError
from zsq.graph.trace import first_line
from zsq.models import teacher, zoo
from zsq.models.teacher import known_models, load_teacher
from zsq.types import ImageSpec


def test_known_models_say_what_is_missing(monkeypatch) -> None:
    zoo.zoo_names.cache_clear()
    monkeypatch.setitem(sys.modules, "timm", None)
    groups = {group.form: group for group in known_models()}
    zoo.zoo_names.cache_clear()
    assert groups["digits"].installed
    assert not groups["timm:NAME"].installed
    assert "pip install timm" in groups["timm:NAME"].reason
    assert teacher.ModelGroup is zoo.ModelGroup


def test_library_that_is_not_installed_or_broken(monkeypatch) -> None:
    zoo.zoo_names.cache_clear()
    monkeypatch.setattr(zoo.importlib, "import_module", missing("pytorchcv", ModuleNotFoundError))
    with pytest.raises(MissingExtraError, match=r"^pytorchcv is not installed: pip install 'zsq\[zoo\]'$"):
        load_teacher("pytorchcv:resnet18")
    monkeypatch.setattr(zoo.importlib, "import_module", missing("operator nms does not exist", RuntimeError))
    with pytest.raises(TeacherError, match=r"^torchvision does not import: operator nms does not exist$"):
        load_teacher("torchvision:resnet18")
    zoo.zoo_names.cache_clear()


def missing(text: str, kind: type[Exception]):
    def import_module(name: str):
        raise kind(text, name=text) if kind is ModuleNotFoundError else kind(text)

    return import_module


class Fake(nn.Module):
    def __init__(self, classes: int, channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, classes, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3))


def fake_libraries(pretrained_fails: bool = False) -> dict[str, types.SimpleNamespace]:
    """Stand-ins with the few functions of torchvision and timm that the loader calls."""

    def torchvision_model(name, weights, num_classes=7):
        if weights == "DEFAULT" and pretrained_fails:
            raise OSError("<urlopen error no route>\nmore")
        return Fake(num_classes)

    preset = types.SimpleNamespace(crop_size=[12], resize_size=[14], mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    default = types.SimpleNamespace(transforms=lambda: preset, meta={"categories": list("abcdefg")})
    models = types.SimpleNamespace(
        list_models=lambda module: ["tiny"],
        get_model_weights=lambda name: types.SimpleNamespace(DEFAULT=default),
        get_model=torchvision_model,
    )
    config = types.SimpleNamespace(input_size=(3, 12, 12), crop_pct=0.8, num_classes=7, mean=(0.5,) * 3, std=(0.5,) * 3)
    timm = types.SimpleNamespace(
        list_models=lambda: ["tiny"],
        get_pretrained_cfg=lambda name: config,
        create_model=lambda name, pretrained, num_classes=7, in_chans=3: Fake(num_classes, in_chans),
    )
    return {"torchvision": types.SimpleNamespace(models=models), "timm": timm}


@pytest.fixture
def fakes(monkeypatch):
    def install(**options) -> None:
        zoo.zoo_names.cache_clear()
        for name, library in fake_libraries(**options).items():
            monkeypatch.setitem(sys.modules, name, library)

    yield install
    zoo.zoo_names.cache_clear()


def test_torchvision_and_timm_bring_their_image_spec(fakes) -> None:
    fakes()
    teacher = load_teacher("torchvision:tiny")
    assert teacher.weights_source == "zoo"
    assert teacher.spec == ImageSpec(
        channels=3, height=12, width=12, classes=7, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), resize=14
    )
    assert load_teacher("timm:tiny.some_tag").spec.resize == 15
    changed = load_teacher("timm:tiny", weights="random", input=(1, 24, 24), classes=5, mean=(0.5,), std=(0.5,))
    assert (changed.spec.channels, changed.spec.classes, changed.spec.resize) == (1, 5, 30)
    with pytest.raises(TeacherError, match=r"torchvision:tiny takes 3 channels; input says 1\."):
        load_teacher("torchvision:tiny", weights="random", input=(1, 12, 12), mean=(0.5,), std=(0.5,))
    with pytest.raises(TeacherError, match=r"are for 7 classes and 3 channels; the flags say 9 and 3\."):
        load_teacher("timm:tiny", classes=9)


def test_zoo_weights_that_cannot_be_fetched(fakes) -> None:
    fakes(pretrained_fails=True)
    with pytest.raises(TeacherError) as caught:
        load_teacher("torchvision:tiny")
    assert str(caught.value) == (
        "torchvision:tiny: its weights could not be fetched (<urlopen error no route>). "
        "Give weights=FILE, or weights='random'."
    )


class TestPytorchcv:
    @pytest.fixture(autouse=True)
    def library(self):
        return pytest.importorskip("pytorchcv.model_provider")

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("name", "size", "classes"),
        [("resnet20_cifar10", 32, 10), ("resnet20_cifar100", 32, 100), ("resnet20_svhn", 32, 10)],
    )
    def test_cifar_networks(self, name, size, classes) -> None:
        teacher = load_teacher(f"pytorchcv:{name}", weights="random")
        assert (teacher.spec.height, teacher.spec.classes, teacher.spec.resize) == (size, classes, None)
        assert teacher.spec.mean == (0.4914, 0.4822, 0.4465)
        assert teacher.weights_source == "random"
        assert not [node for node in teacher.network.graph.nodes if "relu_" in str(node.target)]

    @pytest.mark.slow
    def test_a_network_that_reads_a_former_name_of_numpy(self) -> None:
        assert load_teacher("pytorchcv:regnetx002", weights="random").spec.height == 224
        assert not hasattr(np, "int")

    @pytest.mark.parametrize(
        ("name", "size", "resize", "classes"),
        [
            ("resnet18", 224, 256, 1000),
            ("resnet50", 224, 256, 1000),
            ("mobilenet_w1", 224, 256, 1000),
            ("mobilenetv2_w1", 224, 256, 1000),
            ("mobilenetv3_large_w1", 224, 256, 1000),
            ("inceptionv3", 299, 342, 1000),
            ("efficientnet_b1", 240, 275, 1000),
            ("resnet18_cub", 224, 256, 200),
        ],
    )
    def test_image_specs(self, name, size, resize, classes) -> None:
        spec = zoo.zoo_spec("pytorchcv", name)
        assert (spec.height, spec.width, spec.resize, spec.classes) == (size, size, resize, classes)
        assert (spec.mean, spec.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    @pytest.mark.slow
    def test_other_channels_and_classes(self) -> None:
        teacher = load_teacher(
            "pytorchcv:mobilenetv2_wd4",
            weights="random",
            input=(1, 224, 224),
            classes=5,
            mean=(0.0,),
            std=(1.0,),
        )
        assert teacher.network(torch.zeros(1, 1, 224, 224)).shape == (1, 5)
        assert teacher.spec.resize == 256
        with pytest.raises(TeacherError, match=r"cannot be built with num_classes=5: AssertionError"):
            load_teacher("pytorchcv:resnet20_cifar10", weights="random", classes=5)

    def test_unknown_name(self) -> None:
        with pytest.raises(InputError, match=r"Did you mean 'resnet18'\?.* To search all \d+: zsq models PART"):
            load_teacher("pytorchcv:resnet_18")
        assert not [name for name in zoo.zoo_names("pytorchcv") if "coco" in name]

    def test_weights_that_cannot_be_fetched(self, library, monkeypatch, capsys) -> None:
        def get_model(name, pretrained, **options):
            print("Downloading")
            raise UserWarning("File is downloaded but the content hash does not match.")

        monkeypatch.setattr(library, "get_model", get_model)
        with pytest.raises(TeacherError, match=r"could not be fetched \(File is downloaded but.*weights='random'"):
            load_teacher("pytorchcv:resnet18")
        assert capsys.readouterr().out == ""

    def test_weights_without_a_connection(self, monkeypatch, tmp_path) -> None:
        def nowhere(*arguments: object, **options: object) -> None:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

        monkeypatch.setattr(socket, "getaddrinfo", nowhere)
        monkeypatch.setenv("HOME", str(tmp_path))
        with pytest.raises(TeacherError) as caught:
            load_teacher("pytorchcv:resnet20_cifar10")
        assert str(caught.value) == (
            "pytorchcv:resnet20_cifar10: its weights could not be fetched (the server that has them cannot be reached "
            "from here). Give weights=FILE, or weights='random'."
        )


@pytest.mark.parametrize(
    "error",
    [
        OSError("HTTPSConnectionPool(host='x', port=443): Max retries exceeded (Caused by NameResolutionError('x'))"),
        RuntimeError("<urlopen error [Errno -3] Temporary failure in name resolution>"),
    ],
)
def test_a_machine_without_a_connection_is_told_in_plain_words(error):
    assert zoo._why(error) == "the server that has them cannot be reached from here"
    assert zoo._why(ValueError("checksum is wrong")) == first_line(ValueError("checksum is wrong"))
