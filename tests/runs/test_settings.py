import tomllib
from dataclasses import fields

import pytest

from zsq.errors import InputError
from zsq.methods import METHODS, ZSCGAN, Noise
from zsq.quantization import PTQ, QAT
from zsq.runs.settings import build, resolve, to_tables
from zsq.runs.settings_file import write_settings


@pytest.fixture
def recipe(tmp_path):
    def write(text: str):
        path = tmp_path / "recipe.toml"
        path.write_text(text)
        return path

    return write


def test_nothing_said_is_zscgan_and_ptq_at_their_defaults():
    settings = resolve()
    assert settings.method == ZSCGAN()
    assert settings.quantizer == PTQ()
    assert type(settings.quantizer) is PTQ
    assert settings.chosen == frozenset()


def test_recipe_wins_over_defaults_and_assignments_over_the_recipe(recipe):
    path = recipe('[method]\nsteps = 20\nwidth = 8\n[quantizer]\nname = "qat"\nbits = 6\nsteps = 30\n')
    settings = resolve(recipe=path, assignments=["method.width=12", "quantizer.steps=40"], bits="W4A8")
    assert (settings.method.steps, settings.method.width, settings.method.levels) == (20, 12, ZSCGAN().levels)
    assert isinstance(settings.quantizer, QAT)
    assert (settings.quantizer.steps, settings.quantizer.bits) == (40, "W4A8")
    assert settings.chosen >= {"method.steps", "method.width", "quantizer.steps", "quantizer.bits", "quantizer.name"}
    assert "method.levels" not in settings.chosen


def test_the_last_assignment_wins():
    assert resolve(assignments=["method.steps=3", "method.steps=4"]).method.steps == 4


def test_bits_of_a_recipe_may_be_a_number(recipe):
    assert resolve(recipe=recipe("[quantizer]\nbits = 4\n")).quantizer.bits == "4"
    assert resolve(bits=6).quantizer.bits == "6"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("method.steps=100", 100),
        (" method.learning_rate = 3e-4 ", 3e-4),
        ("method.batch_size=none", None),
        ("method.generator=light", "light"),
        ("quantizer.bias_correction=false", False),
        ("quantizer.range_rule=moving-average", "moving-average"),
        ("quantizer.first_last_bits=8", 8),
    ],
)
def test_assignments_are_read_as_the_field_wants_them(text, value):
    settings = resolve(assignments=[text])
    section, key = text.strip().split("=")[0].strip().split(".")
    found = getattr(getattr(settings, section), key)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "zs-cgan"}, r"Unknown method 'zs-cgan'. Did you mean 'zscgan'\? Known: .*noise, real.*zscgan"),
        ({"quantizer": "qta"}, r"Unknown quantizer 'qta'. Did you mean 'qat'\? Known: ptq, qat"),
        ({"assignments": ["method.step=3"]}, r"'method.step'. Did you mean 'method.steps'\?"),
        ({"assignments": ["quantizer.steps=3"]}, "quantizer ptq has no setting 'steps'; quantizer='qat' has it"),
        ({"assignments": ["method.data=x"]}, "method zscgan has no setting 'data'; method .*real has it"),
        ({"assignments": ["steps=3"]}, "settings takes method.NAME=VALUE or quantizer.NAME=VALUE; got 'steps=3'"),
        ({"assignments": ["method.steps"]}, "got 'method.steps'"),
        ({"assignments": ["run.seed=3"]}, "got 'run.seed=3'"),
        ({"assignments": ["method.name=noise"]}, "Unknown method setting 'method.name'"),
        ({"assignments": ["method.steps=many"]}, "method.steps is 'many': Input should be a valid integer"),
        ({"assignments": ["method.steps=2.5"]}, "method.steps is '2.5'"),
        ({"assignments": ["method.steps="]}, "method.steps is ''"),
        ({"assignments": ["method.steps=none"]}, "method.steps is None"),
        ({"assignments": ["method.steps=-1"]}, "method.steps is -1; it must be at least 0"),
        (
            {"assignments": ["method.generator=resnet"]},
            "method.generator is 'resnet': Input should be 'unet' or 'light'",
        ),
        ({"assignments": ["quantizer.bias_correction=perhaps"]}, "quantizer.bias_correction is 'perhaps'"),
        ({"assignments": ["method.learning_rate=nan"]}, "method.learning_rate is nan; a finite number"),
        ({"assignments": ["quantizer.logit_headroom=inf"]}, "quantizer.logit_headroom is inf"),
        ({"bits": "9"}, "9"),
        ({"bits": "W4"}, "W4"),
        ({"bits": "four"}, "four"),
    ],
)
def test_wrong_names_and_values_are_quoted(arguments, message):
    with pytest.raises(InputError, match=message):
        resolve(**arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[methods]\nsteps = 3\n", r"'methods' is no list of tables; write \[\[methods\]\], or \[method\] for one"),
        ("method = 3\n", r"'method' is a value; a table \[method\] is expected"),
        ("[method]\nsteps = \n", "is not TOML: .*line 2"),
        ('[method]\nname = "nois"\n', "Unknown method 'nois'"),
        ("[method]\nname = 3\n", "method.name is 3; a name is expected"),
        ('[quantizer]\nname = ["qat"]\n', "quantizer.name is "),
        ("[method]\nsteps = [1]\n", r"method.steps is \[1\]"),
        ("[method]\nlearning_rate = inf\n", "method.learning_rate is inf"),
        ("[quantizer]\nbits = 4.5\n", "4.5"),
        ("[quantizer]\nweight_bits = 4\n", "quantizer.weight_bits is 4"),
        ('[quantizer.weight_bits]\n"fc.weight" = "x"\n', "quantizer.weight_bits.fc.weight is 'x'"),
    ],
)
def test_wrong_recipes_are_quoted(recipe, text, message):
    with pytest.raises(InputError, match=message):
        resolve(recipe=recipe(text))


def test_a_recipe_that_is_missing_or_binary_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.toml: No such file"):
        resolve(recipe=tmp_path / "none.toml")
    with pytest.raises(InputError, match="directory"):
        resolve(recipe=tmp_path)
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"b\.toml is not TOML"):
        resolve(recipe=tmp_path / "b.toml")


def test_a_recipe_of_another_method_keeps_what_both_know(recipe):
    path = recipe(
        '[method]\nname = "zscgan"\nsteps = 20\nbatch_size = 32\n[quantizer]\nname = "qat"\nsteps = 9\nbits = 4'
    )
    settings = resolve(method="noise", quantizer="ptq", recipe=path)
    assert settings.method == Noise(batch_size=32)
    assert settings.quantizer == PTQ(bits="4")
    assert "method.steps" not in settings.chosen
    with pytest.raises(InputError, match=r"method noise has no setting 'steps'; method='zscgan' or "):
        resolve(method="noise", recipe=path, assignments=["method.steps=3"])


@pytest.mark.parametrize(
    ("method", "quantizer"), [(name, q) for name in sorted(METHODS) for q in METHODS[name].quantizers]
)
def test_written_settings_are_a_recipe_of_the_same_run(tmp_path, method, quantizer):
    whole = "batch_size" if hasattr(METHODS[method], "batch_size") else "iterations"
    changed = [f"method.{whole}=17", "quantizer.num_samples=77", "quantizer.first_last_bits=8"]
    settings = resolve(method=method, quantizer=quantizer, bits="W4A6", assignments=changed)
    path = tmp_path / "settings.toml"
    write_settings(path, settings, {"model": "digits", "resize": None}, {"seed": 3})
    again = resolve(recipe=path)
    assert (again.method, again.quantizer) == (settings.method, settings.quantizer)
    content = tomllib.loads(path.read_text())
    assert content["teacher"] == {"model": "digits"}
    assert content["run"] == {"seed": 3}
    write_settings(tmp_path / "again.toml", again, {"model": "digits"}, {"seed": 3})
    assert (tmp_path / "again.toml").read_text() == path.read_text()


def test_every_setting_is_written(tmp_path):
    tables = to_tables(resolve(quantizer="qat"))
    unset = {"method": {"batch_size", "ce_weight", "learning_rate", "width"}}
    unset["quantizer"] = {"channel_scaling", "first_last_bits", "kd_weight", "pixels", "range_sigmas", "weight_bits"}
    for section, kind in (("method", ZSCGAN), ("quantizer", QAT)):
        assert tables[section].keys() == {"name", *(field.name for field in fields(kind))} - unset[section]


def test_with_steps_changes_nothing_else():
    settings = resolve(quantizer="qat", assignments=["method.width=9"])
    changed = settings.with_steps(method=5, quantizer=6)
    assert (changed.method, changed.quantizer) == (ZSCGAN(width=9, steps=5), QAT(steps=6))
    assert changed.distill_steps == 6
    assert resolve().distill_steps == 0
    assert changed.with_steps() == changed


def test_build_quotes_the_unknown_name():
    with pytest.raises(InputError, match="Unknown quantizer 'gptq'"):
        build("quantizer", "gptq", {})


@pytest.mark.parametrize(
    ("method", "assignment", "text"),
    [
        ("zscgan", "method.beta1=2", "method.beta1 is 2; it must lie in [0, 1)."),
        ("zscgan", "method.style_size=-1", "method.style_size is -1; it must be at least 0."),
        ("zscgan", "method.batch_size=1", "method.batch_size is 1; batch statistics need at least 2 images."),
        ("noise", "method.batch_size=0", "method.batch_size is 0; it must be at least 1."),
        ("real", "method.limit=0", "method.limit is 0; it must be at least 1."),
        ("noise", "quantizer.momentum=-1", "quantizer.momentum is -1; it must lie in [0, 1)."),
        ("noise", "quantizer.logit_headroom=0.5", "quantizer.logit_headroom is 0.5; it must be at least 1."),
    ],
)
def test_values_out_of_range_are_refused(method: str, assignment: str, text: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve(method=method, quantizer="qat", assignments=[assignment])
    assert str(caught.value) == text


WIDTHS = 'activation = 6\n[weights]\n"conv1.weight" = 8\nlayer1.0.conv1.weight = 2\n'


def test_a_file_of_widths_is_resolved_into_the_settings(tmp_path, recipe):
    path = recipe(WIDTHS)
    quantizer = resolve(bits=str(path)).quantizer
    widths = {"conv1.weight": 8, "layer1.0.conv1.weight": 2}  # an unquoted name is nested TOML, and means the same
    assert (quantizer.bits, quantizer.weight_bits) == ("W8A6", widths)
    write_settings(tmp_path / "settings.toml", resolve(bits=str(path)), {}, {})
    path.unlink()
    again = resolve(recipe=tmp_path / "settings.toml")
    assert again.quantizer == quantizer
    assert again.chosen >= {"quantizer.bits", "quantizer.weight_bits"}
    assert resolve(recipe=tmp_path / "settings.toml", bits=4).quantizer == PTQ(bits="4")
    given = {"quantizer": {"weight_bits": {"fc.weight": 3}}}
    assert resolve(recipe=tmp_path / "settings.toml", given=given).quantizer.weight_bits == {"fc.weight": 3}
    assert PTQ(weight_bits=widths).scheme().weight_bits == widths


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weights = 4", r"has no table \[weights\] of widths by name, such as \"conv.weight\" = 4"),
        ("activation = 8", r"has no table \[weights\]"),
        ("[weight]\na = 4", "weight is {'a': 4}|no table"),
        ("[wieghts]\na = 4", r"recipe\.toml: Unknown key 'wieghts'. Did you mean 'weights'\?"),
        ("activation = 9\n[weights]\na = 4", "activation is 9; a width from 2 to 8 is expected"),
        ("weight = true\n[weights]\na = 4", "weight is True; a width"),
        ("[weights]\nb.weight = 9", r"quantizer\.weight_bits\.b\.weight is 9; widths from 2 to 8 work"),
        ("[weights]\na = 4.5", "quantizer.weight_bits.a is 4.5"),
        ("[weights]\na = \n", "is not TOML: .*line 2"),
    ],
)
def test_wrong_files_of_widths_are_quoted(recipe, text, message):
    with pytest.raises(InputError, match=message):
        resolve(bits=str(recipe(text)))


def test_a_missing_file_of_widths_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.TOML: No such file"):
        resolve(bits=str(tmp_path / "none.TOML"))
