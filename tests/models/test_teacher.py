import copy
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from zsq.data import digits
from zsq.errors import InputError, TeacherError
from zsq.models.teacher import load_teacher, state_sha256, teacher_from_module
from zsq.types import ImageSpec, Output

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

def ten():
    return nn.Sequential(*small()[:-1], nn.Linear(48, 10))

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
        return flat * self.scale + torch.ones(4, device=x.device)


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
    stored = {name for name, _ in teacher.network.named_buffers()}
    assert stored == {"bn.running_mean", "bn.running_var", "scale", "ones"}  # the last made in the forward
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


def test_what_is_computed_with_the_same_weights_has_a_hash_of_its_own() -> None:
    layer = nn.Conv2d(2, 4, 6)
    ends = (nn.ReLU(), nn.ReLU(), nn.LeakyReLU(0.1), nn.LeakyReLU(0.2))
    teachers = [teacher_from_module(nn.Sequential(layer, nn.Flatten(), end), SPEC) for end in ends]
    assert len({each.weights_sha256 for each in teachers}) == 1
    first, same, *others = (each.graph_sha256 for each in teachers)
    assert first == same
    assert len({first, *others}) == 3


def test_digits() -> None:
    teacher = load_teacher("digits")
    assert (teacher.name, teacher.weights_source, teacher.spec) == ("digits", "bundled", digits.SPEC)
    copied = load_teacher("digits", weights=digits.NETWORK.weights)
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


def test_weights_from_a_file(factories, tmp_path) -> None:
    drawn = load_teacher(f"{factories}:told", weights="random")
    torch.save({"model": drawn.network.state_dict()}, tmp_path / "w.pth")
    save_file(drawn.network.state_dict(), tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"):
        loaded = load_teacher(f"{factories}:told", weights=tmp_path / name)
        assert (loaded.weights_source, loaded.weights_sha256) == (name, drawn.weights_sha256)
    with pytest.raises(TeacherError, match=r"w\.pth holds 4 classes \(4\.weight is 4x48\); classes says 10\."):
        load_teacher(f"{factories}:ten", weights=tmp_path / "w.pth", input=(2, 6, 6), classes=10)


def test_factory_with_and_without_an_image_spec(factories) -> None:
    told = load_teacher(f"{factories}:told")
    assert (told.spec, told.weights_source) == (SPEC, "factory")
    changed = load_teacher(f"{factories}:told", mean=(0.1, 0.2), resize="none")
    assert (changed.spec.mean, changed.spec.std, changed.spec.resize) == ((0.1, 0.2), (0.25, 0.25), None)
    flagged = load_teacher(f"{factories}:small", input=(2, 6, 6), classes=4)
    assert (flagged.spec.mean, flagged.spec.std, flagged.spec.resize) == ((0.0, 0.0), (1.0, 1.0), None)
    with pytest.raises(TeacherError, match=r"give input=CxHxW, with mean and std"):
        load_teacher(f"{factories}:small")
    with pytest.raises(
        TeacherError, match=r"gives \[2, 4\] for 2 images\. If that is right, say what it means: outputs"
    ):
        load_teacher(f"{factories}:small", input=(2, 6, 6))
    assert load_teacher(f"{factories}:small", input=(2, 6, 6), outputs="classes").spec.classes == 4
    with pytest.raises(InputError, match=r"classes is 0; it must be at least 1"):
        load_teacher(f"{factories}:small", input=(2, 6, 6), classes=0)


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
        ("raising", "fails: ValueError: first line (nets.py, line "),
        ("Failing", "fails on images of 2x6x6: KeyError: 'missing thing' (nets.py, line "),
        ("Pair", "gives output_0 [2, 2, 6, 6], output_1 [2, 2, 6, 6] for 2 images; [2, 4] was expected"),
        ("Map", "gives [2, 2, 6, 6] for 2 images; [2, 4] was expected, for classes=4."),
        ("FixedBatch", "cannot be exported by torch.export: "),
        ("Branching", "Its forward branches on the values of its images, which no exported file can."),
        ("Drawing", "gives other logits than the network"),
    ],
)
def test_factories_that_give_no_teacher(factories, factory, text) -> None:
    with pytest.raises(InputError) as caught:
        load_teacher(f"{factories}:{factory}", input=(2, 6, 6), classes=4)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_number_of_classes_and_image_size_are_checked(factories) -> None:
    with pytest.raises(TeacherError, match=r"knows 4 classes; classes says 7\."):
        load_teacher(f"{factories}:small", input=(2, 6, 6), classes=7)
    with pytest.raises(
        TeacherError, match="fails on images of 2x9x9: RuntimeError: mat1 and mat2 shapes cannot be multiplied"
    ):
        load_teacher(f"{factories}:small", input=(2, 9, 9), classes=4)


def test_logits_that_are_not_finite() -> None:
    class Divides(nn.Sequential):
        def forward(self, x):
            return super().forward(x) / 0

    with pytest.raises(TeacherError, match="logits that are not finite"):
        teacher_from_module(Divides(nn.Flatten(), nn.Linear(72, 4)), SPEC)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("1.bias", float("nan"), "has 1.bias with values up to nan; weights and batch-norm statistics are finite"),
        ("1.weight", 1e30, "has 1.weight with values up to 1e.30"),
        ("2.running_mean", float("inf"), "has 2.running_mean with values up to inf"),
        ("2.running_var", 1e30, "has 2.running_var with values up to 1e.30"),
        ("2.running_var", -1.0, "has 2.running_var with the negative variance -1"),
    ],
)
def test_values_that_no_training_leaves_are_named(name, value, message) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(72, 4), nn.BatchNorm1d(4))
    with torch.no_grad():
        net.state_dict()[name].fill_(value)
    with pytest.raises(TeacherError, match=message):
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


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"mean": (123.0, 116.0, 103.0)}, r"mean is \(123.0, 116.0, 103.0\), but pixels are in \[0, 1\]"),
        ({"std": (58.0, 57.0, 57.0)}, "divide what is on the scale of"),
        ({"std": (math.nan, 1.0, 1.0)}, r"std is \(nan"),
    ],
)
def test_normalisation_on_another_scale_is_refused(given, text):
    spec = {"channels": 3, "height": 8, "width": 8, "classes": 5, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    with pytest.raises(InputError, match=text):
        ImageSpec(**(spec | given))


def test_what_is_wrapped_around_a_network_is_taken_off() -> None:
    plain = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(48, 4))
    wanted = teacher_from_module(plain, SPEC)
    compiled = torch.compile(plain, backend="eager")
    for wrapped in (nn.DataParallel(plain), compiled, nn.DataParallel(compiled)):
        found = teacher_from_module(wrapped, SPEC)
        assert found.weights_sha256 == wanted.weights_sha256
        assert next(name for name, _ in found.network.named_parameters()) == "0.weight"


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:`torch.jit:FutureWarning")
def test_networks_that_cannot_serve_are_told_why() -> None:
    plain = nn.Sequential(nn.Flatten(), nn.Linear(72, 4))
    with pytest.raises(TeacherError, match=r"is a TorchScript module; give the torch\.nn\.Module that it was made of"):
        teacher_from_module(torch.jit.script(plain), SPEC)
    ends = {"softmax": ([nn.Softmax(1)], [nn.Softmax(-1), nn.Dropout()]), "sigmoid": ([nn.Sigmoid(), nn.Flatten()],)}
    for end, last in [(end, last) for end, lasts in ends.items() for last in lasts]:
        with pytest.raises(TeacherError, match=f"ends in a {end}; zsq learns from logits: return what goes into it"):
            teacher_from_module(nn.Sequential(plain, *last), SPEC)
    labels = replace(SPEC, classes=0, outputs=(Output("", "values"),))
    assert not teacher_from_module(nn.Sequential(plain, nn.Sigmoid()), labels).spec.classes
    assert teacher_from_module(nn.Sequential(plain, nn.LogSoftmax(1)), SPEC).spec == SPEC  # its softmax is the same


def test_mean_and_std_belong_together(factories) -> None:
    with pytest.raises(TeacherError, match=r"gets mean and no std; give both, or neither"):
        load_teacher(f"{factories}:small", input=(2, 6, 6), classes=4, mean=(0.5, 0.5))
    with pytest.raises(TeacherError, match=r"gets std and no mean"):
        load_teacher(f"{factories}:small", input=(2, 6, 6), classes=4, std=(0.5, 0.5))
