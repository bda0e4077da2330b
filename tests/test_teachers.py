import copy
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from zsq import digits, teachers, zoo
from zsq.errors import InputError, MissingExtraError, TeacherError
from zsq.teachers import known_models, load_teacher, state_sha256, teacher_from_module
from zsq.types import ImageSpec

SPEC = ImageSpec(channels=2, height=6, width=6, classes=4, mean=(0.5, 0.5), std=(0.25, 0.25), resize=7)

FACTORIES = """
from dataclasses import dataclass
import torch
from torch import nn
from zsq.types import ImageSpec

def small():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(48, 4)
    )

def told():
    return small()

told.image_spec = ImageSpec(
    channels=2, height=6, width=6, classes=4, mean=(0.5, 0.5), std=(0.25, 0.25), resize=7
)

def wrong_kind():
    return {"no": "network"}

def raising():
    raise ValueError("first line\\nsecond line")

class Failing(nn.Module):
    def forward(self, x):
        raise KeyError("missing thing")

class Pair(nn.Module):
    def forward(self, x):
        return x, x

class Map(nn.Module):
    def forward(self, x):
        return x

class Branching(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x.mean((2, 3)).repeat(1, 2)
        return x.mean((2, 3)).repeat(1, 2) * 2

class FixedBatch(nn.Module):
    def forward(self, x):
        return x.reshape(2, -1)[:, :4]

class Drawing(nn.Module):
    def forward(self, x):
        return torch.dropout(x.mean((2, 3)).repeat(1, 2), 0.5, True)
"""


@pytest.fixture
def factories(tmp_path) -> str:
    (tmp_path / "nets.py").write_text(FACTORIES)
    return str(tmp_path / "nets.py")


@pytest.fixture
def trained(factories) -> dict[str, Tensor]:
    """Weights of the file's network, unlike its initial ones."""
    net = load_teacher(f"{factories}:told", weights="random").network
    generator = torch.Generator().manual_seed(5)
    return {name: torch.rand(value.shape, generator=generator) for name, value in net.state_dict().items()}


class Dropping(nn.Module):
    """Dropout, in-place operators, a residual add in place, and a constant made in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.3)
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0, 4.0]))

    def forward(self, x: Tensor) -> Tensor:
        first = self.bn(self.conv(x))
        second = functional.relu(first, inplace=True)
        second += first
        flat = self.dropout(functional.hardswish(second, inplace=True)).mean((2, 3))
        return flat * self.scale + torch.zeros(4, device=x.device)


def targets(network) -> list[str]:
    return [str(node.target) for node in network.graph.nodes if node.op == "call_function"]


def test_graph_computes_what_the_network_computes() -> None:
    net = Dropping().eval()
    teacher = teacher_from_module(net, SPEC)
    for count in (1, 5):
        images = torch.randn(count, 2, 6, 6)
        with torch.no_grad():
            assert torch.allclose(teacher.network(images), net(images), atol=1e-6)
    names = targets(teacher.network)
    assert not [name for name in names if "dropout" in name or name.partition(".")[2].partition(".")[0].endswith("_")]
    assert "aten.batch_norm.default" in names
    assert teacher.network.graph.output_node().args[0].op == "call_function"
    weights = {name for name, _ in net.named_parameters()}
    assert {name for name, _ in teacher.network.named_parameters()} == weights
    assert {name for name, _ in teacher.network.named_buffers()} == {"bn.running_mean", "bn.running_var", "scale"}
    assert not any(p.requires_grad for p in teacher.network.parameters())


def test_graph_can_be_copied_and_switched() -> None:
    teacher = load_teacher("digits")
    images = torch.randn(2, 1, 8, 8)
    wanted = teacher.network(images)
    clone = copy.deepcopy(teacher.network).train().eval()
    assert torch.equal(clone(images), wanted)
    assert clone.fc.weight is not teacher.network.fc.weight


def test_module_stays_as_it_is() -> None:
    net = Dropping().train()
    before = copy.deepcopy(net.state_dict())
    teacher = teacher_from_module(net, SPEC, name="mine")
    assert net.training
    assert all(p.requires_grad for p in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert (teacher.name, teacher.weights_source, teacher.spec) == ("mine", "memory", SPEC)
    with torch.no_grad():
        net.conv.weight.zero_()
    assert teacher.network.conv.weight.abs().sum() > 0


def test_half_precision_becomes_float32() -> None:
    teacher = teacher_from_module(Dropping().half(), SPEC)
    assert {p.dtype for p in teacher.network.parameters()} == {torch.float32}


def test_to_another_device_moves_constants_too() -> None:
    teacher = teacher_from_module(Dropping(), SPEC)
    moved = teacher.to("meta")
    assert moved.network(torch.empty(3, 2, 6, 6, device="meta")).shape == (3, 4)
    assert teacher.network(torch.zeros(1, 2, 6, 6)).device.type == "cpu"
    assert moved.weights_sha256 == teacher.weights_sha256


def test_hash_depends_on_names_shapes_and_values_only() -> None:
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(())}
    same = {"b": torch.ones(()), "a": torch.arange(6.0).reshape(3, 2).t().contiguous().t().reshape(2, 3)}
    assert state_sha256(state) == state_sha256(same | {"bn.num_batches_tracked": torch.tensor(3)})
    others = [
        {"a": state["a"].reshape(3, 2), "b": state["b"]},
        {"a": state["a"], "c": state["b"]},
        {"a": state["a"].double(), "b": state["b"]},
        {"a": state["a"] + 1e-6, "b": state["b"]},
    ]
    assert len({state_sha256(value) for value in [state, *others]}) == 5


def test_digits() -> None:
    teacher = load_teacher("digits")
    assert (teacher.name, teacher.weights_source, teacher.spec) == ("digits", "bundled", digits.SPEC)
    copied = load_teacher("digits", weights=digits.weights_path())
    assert (copied.weights_source, copied.weights_sha256) == ("weights.safetensors", teacher.weights_sha256)
    drawn = load_teacher("digits", weights="random", mean=(0.0,), std=(1.0,))
    assert drawn.weights_sha256 != teacher.weights_sha256
    assert drawn.spec.mean == (0.0,)


def test_random_weights_are_seeded_and_leave_the_global_generator_alone(factories) -> None:
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    hashes = {load_teacher(f"{factories}:told", weights="random").weights_sha256 for _ in range(2)}
    assert len(hashes) == 1
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module._orig_mod."])
@pytest.mark.parametrize("nest", [None, "state_dict", "model_state_dict", "model", "net"])
def test_checkpoints(factories, trained, tmp_path, prefix, nest) -> None:
    state = {prefix + name: value for name, value in trained.items()}
    torch.save(state if nest is None else {nest: state, "epoch": 3}, tmp_path / "w.pth")
    save_file(trained, tmp_path / "w.safetensors")
    loaded = load_teacher(f"{factories}:told", weights=tmp_path / "w.pth")
    assert loaded.weights_source == "w.pth"
    assert torch.equal(loaded.network.get_parameter("4.weight"), trained["4.weight"])
    plain = load_teacher(f"{factories}:told", weights=str(tmp_path / "w.safetensors"))
    assert plain.weights_sha256 == loaded.weights_sha256


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_checkpoint_that_would_execute_code(factories, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Malicious()}, tmp_path / "evil.pth")
    with pytest.raises(TeacherError, match=r"^evil\.pth would execute code when loaded \(it holds .*as safetensors"):
        load_teacher(f"{factories}:told", weights=tmp_path / "evil.pth")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(TeacherError, match=r"would execute code when loaded \(it holds torch\.nn\.modules\.linear"):
        load_teacher(f"{factories}:told", weights=tmp_path / "module.pth")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is not a PyTorch checkpoint"),
        (b"plain text", "is not a PyTorch checkpoint"),
        ([1, 2], "w.pth holds a list; a state dict is wanted, at the top or under state_dict, model_state_dict"),
        ({}, "w.pth holds nothing; a state dict is wanted"),
        ({"epoch": 3, "loss": 0.5}, "w.pth holds the keys epoch, loss; a state dict is wanted"),
    ],
)
def test_files_that_are_no_checkpoint(factories, tmp_path, content, text) -> None:
    path = tmp_path / "w.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(TeacherError) as caught:
        load_teacher(f"{factories}:told", weights=path)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_damaged_weights(factories, tmp_path) -> None:
    with pytest.raises(TeacherError, match=r"^no such weights file: .*nothing\.pth$"):
        load_teacher(f"{factories}:told", weights=tmp_path / "nothing.pth")
    (tmp_path / "w.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(TeacherError, match=r"^w\.safetensors is not a readable safetensors file"):
        load_teacher(f"{factories}:told", weights=tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("change", "flags", "text"),
    [
        (
            {"4.weight": torch.zeros(9, 48), "4.bias": torch.zeros(9)},
            {"classes": 4},
            "w.pth holds 9 classes (4.weight is 9x48); --classes says 4.",
        ),
        (
            {"4.weight": torch.zeros(9, 48), "4.bias": torch.zeros(9)},
            {},
            "w.pth holds 9 classes (4.weight is 9x48); the network has 4.",
        ),
        (
            {"0.weight": torch.zeros(3, 1, 3, 3)},
            {"input": (2, 6, 6)},
            "w.pth takes 1 channels (0.weight is 3x1x3x3); --input says 2.",
        ),
        (
            {"0.weight": torch.zeros(3, 1, 3, 3)},
            {},
            "w.pth takes 1 channels (0.weight is 3x1x3x3); the network takes 2.",
        ),
        (
            {"1.bias": torch.zeros(5), "0.bias": torch.zeros(5)},
            {},
            "w.pth does not fit, in 2 shapes: 0.bias is 5 there and 3 in the network, 1.bias is 5 there and",
        ),
        (
            {"9.weight": torch.zeros(2, 3), "9.bias": torch.zeros(())},
            {},
            "another network; 2 unexpected: 9.weight (2x3), 9.bias (a single number).",
        ),
        ({"0.weight": None}, {}, "w.pth holds the weights of another network; 1 missing: 0.weight (3x2x3x3)."),
    ],
)
def test_weights_of_another_network(factories, trained, tmp_path, change, flags, text) -> None:
    state = {name: value for name, value in (trained | change).items() if value is not None}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(TeacherError) as caught:
        load_teacher(f"{factories}:told", weights=tmp_path / "w.pth", **flags)
    assert text in str(caught.value)


def test_factory_with_and_without_an_image_spec(factories) -> None:
    told = load_teacher(f"{factories}:told")
    assert (told.spec, told.weights_source) == (SPEC, "factory")
    changed = load_teacher(f"{factories}:told", mean=(0.1, 0.2), resize=None)
    assert (changed.spec.mean, changed.spec.std, changed.spec.resize) == ((0.1, 0.2), (0.25, 0.25), None)
    flagged = load_teacher(f"{factories}:small", input=(2, 6, 6), classes=4)
    assert (flagged.spec.mean, flagged.spec.std, flagged.spec.resize) == ((0.0, 0.0), (1.0, 1.0), None)
    with pytest.raises(TeacherError, match=r"give --input C,H,W and --classes N, with --mean and --std"):
        load_teacher(f"{factories}:small")
    with pytest.raises(TeacherError, match=r"give --classes N, with"):
        load_teacher(f"{factories}:small", input=(2, 6, 6))


def test_module_factory_from_the_working_folder(factories, monkeypatch) -> None:
    monkeypatch.chdir(Path(factories).parent)
    assert load_teacher("nets:told").weights_source == "factory"
    sys.modules.pop("nets", None)
    with pytest.raises(TeacherError, match=r"^no\.such\.module does not import: No module named 'no'"):
        load_teacher("no.such.module:net")


@pytest.mark.parametrize(
    ("factory", "text"),
    [
        ("smal", "Did you mean 'small'?"),
        ("wrong_kind", "returns a dict; a factory returns a torch.nn.Module."),
        ("raising", "fails: first line"),
        ("Failing", "fails on images of 2x6x6: 'missing thing'"),
        ("Pair", "returns a tuple; a classifier returns logits [N, classes]."),
        ("Map", "gives [2, 2, 6, 6] for 2 images of 2x6x6; a classifier gives [2, 4]."),
        ("FixedBatch", "cannot be exported by torch.export: "),
        ("Branching", "cannot be exported by torch.export: "),
        ("Drawing", "gives other logits than the network"),
    ],
)
def test_factories_that_give_no_teacher(factories, factory, text) -> None:
    with pytest.raises(InputError) as caught:
        load_teacher(f"{factories}:{factory}", input=(2, 6, 6), classes=4)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_number_of_classes_and_image_size_are_checked(factories) -> None:
    with pytest.raises(TeacherError, match=r"knows 4 classes; --classes says 7\."):
        load_teacher(f"{factories}:small", input=(2, 6, 6), classes=7)
    with pytest.raises(TeacherError, match="fails on images of 2x9x9: mat1 and mat2 shapes cannot be multiplied"):
        load_teacher(f"{factories}:small", input=(2, 9, 9), classes=4)


def test_logits_that_are_not_finite() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(72, 4))
    nn.init.constant_(net[1].bias, float("nan"))
    with pytest.raises(TeacherError, match="logits that are not finite"):
        teacher_from_module(net, SPEC)


def test_files_that_do_not_import(tmp_path) -> None:
    with pytest.raises(TeacherError, match=r"^no such file: .*gone\.py$"):
        load_teacher(str(tmp_path / "gone.py:net"))
    (tmp_path / "bad.py").write_text("def broken(:\n")
    with pytest.raises(TeacherError, match=r"bad\.py does not import: "):
        load_teacher(str(tmp_path / "bad.py:net"))
    (tmp_path / "sibling.py").write_text("from helper import net")
    (tmp_path / "helper.py").write_text("from torch import nn\ndef net(): return nn.Sequential(nn.Flatten())")
    assert load_teacher(str(tmp_path / "sibling.py:net"), input=(1, 2, 2), classes=4).spec.classes == 4
    assert str(tmp_path) not in sys.path


@pytest.mark.parametrize("model", ["digit", "resnet18", "nothing at all", ":net", "nets.py:"])
def test_unknown_models(model) -> None:
    with pytest.raises(InputError, match=r"^Unknown model '.*Known: .*FILE\.py:FACTORY.*digits"):
        load_teacher(model)


def test_unknown_models_quote_the_nearest() -> None:
    with pytest.raises(InputError, match="Did you mean 'digits'"):
        load_teacher("digit")
    pytest.importorskip("pytorchcv")
    with pytest.raises(InputError, match="Did you mean 'pytorchcv:resnet18'"):
        load_teacher("resnet18")


def test_known_models_say_what_is_missing(monkeypatch) -> None:
    zoo.zoo_names.cache_clear()
    monkeypatch.setitem(sys.modules, "timm", None)
    groups = {group.form: group for group in known_models()}
    zoo.zoo_names.cache_clear()
    assert groups["digits"].installed
    assert not groups["timm:NAME"].installed
    assert "pip install timm" in groups["timm:NAME"].reason
    assert teachers.ModelGroup is zoo.ModelGroup


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
    with pytest.raises(TeacherError, match=r"torchvision:tiny takes 3 channels; --input says 1\."):
        load_teacher("torchvision:tiny", weights="random", input=(1, 12, 12), mean=(0.5,), std=(0.5,))
    with pytest.raises(TeacherError, match=r"are for 7 classes and 3 channels; the flags say 9 and 3\."):
        load_teacher("timm:tiny", classes=9)


def test_zoo_weights_that_cannot_be_fetched(fakes) -> None:
    fakes(pretrained_fails=True)
    with pytest.raises(TeacherError) as caught:
        load_teacher("torchvision:tiny")
    assert str(caught.value) == (
        "torchvision:tiny: its weights could not be fetched (<urlopen error no route>). "
        "Give --weights FILE, or --weights random."
    )


class TestPytorchcv:
    @pytest.fixture(autouse=True)
    def library(self):
        return pytest.importorskip("pytorchcv.model_provider")

    @pytest.mark.parametrize(
        ("name", "size", "classes"),
        [("resnet20_cifar10", 32, 10), ("resnet20_cifar100", 32, 100), ("resnet20_svhn", 32, 10)],
    )
    def test_cifar_networks(self, name, size, classes) -> None:
        teacher = load_teacher(f"pytorchcv:{name}", weights="random")
        assert (teacher.spec.height, teacher.spec.classes, teacher.spec.resize) == (size, classes, None)
        assert teacher.spec.mean == (0.4914, 0.4822, 0.4465)
        assert teacher.weights_source == "random"
        assert not [name for name in targets(teacher.network) if "relu_" in name]

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

    def test_other_size_channels_and_classes(self) -> None:
        teacher = load_teacher(
            "pytorchcv:mobilenetv3_large_w1",
            weights="random",
            input=(1, 64, 64),
            classes=5,
            mean=(0.0,),
            std=(1.0,),
        )
        assert teacher.network(torch.zeros(1, 1, 64, 64)).shape == (1, 5)
        assert teacher.spec.resize == 73

    def test_unknown_name(self) -> None:
        with pytest.raises(InputError, match=r"Did you mean 'resnet18'\?.* All \d+: zsq models"):
            load_teacher("pytorchcv:resnet_18")
        assert not [name for name in zoo.zoo_names("pytorchcv") if "coco" in name]

    def test_weights_that_cannot_be_fetched(self, library, monkeypatch, capsys) -> None:
        def get_model(name, pretrained, **options):
            print("Downloading")
            raise UserWarning("File is downloaded but the content hash does not match.")

        monkeypatch.setattr(library, "get_model", get_model)
        with pytest.raises(TeacherError, match=r"could not be fetched \(File is downloaded but.*--weights random"):
            load_teacher("pytorchcv:resnet18")
        assert capsys.readouterr().out == ""
