import dataclasses
from dataclasses import replace

import pytest
import torch

from zsq.errors import InputError
from zsq.methods import ZSCGAN, Noise
from zsq.models.teacher import Teacher, load_teacher
from zsq.quantization import PTQ, QAT
from zsq.runs import budget as budget_module
from zsq.runs.budget import choose_schedule, settling
from zsq.runs.fitted import FittedRun
from zsq.runs.folder import ARTIFACTS, claimed, clear_folder, open_folder
from zsq.runs.request import QuantizeRequest
from zsq.runs.resume import chosen_seed, resumed_settings, warn_of_recipe
from zsq.runs.settings import resolve
from zsq.runs.settings_file import stored_spec, teacher_table, write_settings
from zsq.runs.start import wanted_settings
from zsq.runtime.device import pick_device
from zsq.runtime.files import save_tensors
from zsq.runtime.versions import versions
from zsq.training.loop import Run


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return load_teacher("digits")


def resolve_settings(method, quantizer, bits, *, source_run=None, recipe=None, assignments=()):
    request = QuantizeRequest("digits", out="run", method=method, recipe=recipe, settings=tuple(assignments))
    return wanted_settings(request, quantizer, bits, source_run)


@pytest.fixture
def run_folder(tmp_path, teacher):
    """A folder as a run with 5 generator steps leaves it behind."""
    folder = tmp_path / "run"
    facts = {"seed": 0} | versions()
    write_settings(folder / "settings.toml", resolve(assignments=["method.steps=5"]), teacher_table(teacher), facts)
    meta = {"method": "zscgan", "weights_sha256": teacher.weights_sha256}
    save_tensors(folder / "generator.safetensors", {"generator.a": torch.ones(2)}, meta)
    return folder


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_new_folder_is_made_with_its_parents(tmp_path):
    assert open_folder(tmp_path / "a" / "b", resume=False, overwrite=False) is False
    assert (tmp_path / "a" / "b").is_dir()


def test_other_files_in_the_folder_do_not_matter(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert open_folder(tmp_path, resume=False, overwrite=False) is False


@pytest.mark.parametrize("name", [*ARTIFACTS, "checkpoints/fit.safetensors"])
def test_a_folder_that_holds_a_run_is_refused(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("kept")
    with pytest.raises(InputError, match="holds another run; resume=True continues it, overwrite=True discards it"):
        open_folder(tmp_path, resume=False, overwrite=False)
    assert path.read_text() == "kept"


def test_resume_continues_a_run_and_starts_where_there_is_none(tmp_path, run_folder):
    assert open_folder(run_folder, resume=True, overwrite=False) is True
    assert open_folder(tmp_path / "new", resume=True, overwrite=False) is False


def test_resume_without_settings_is_refused(run_folder):
    (run_folder / "settings.toml").unlink()
    before = contents(run_folder)
    with pytest.raises(InputError, match=r"without settings\.toml, which resume=True needs"):
        open_folder(run_folder, resume=True, overwrite=False)
    assert contents(run_folder) == before


def test_resume_and_overwrite_exclude_each_other(run_folder):
    with pytest.raises(InputError, match="give one of them"):
        open_folder(run_folder, resume=True, overwrite=True)


def test_opening_to_overwrite_deletes_nothing_yet(run_folder):
    before = contents(run_folder)
    assert open_folder(run_folder, resume=False, overwrite=True) is False
    assert contents(run_folder) == before


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_file_in_the_way_is_named(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="out takes a folder"):
        open_folder(tmp_path / place, resume=False, overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"


def test_clearing_takes_what_runs_wrote_and_nothing_else(run_folder):
    for name in (*ARTIFACTS, "checkpoints/fit.safetensors", "checkpoints/distill.safetensors"):
        (run_folder / name).parent.mkdir(exist_ok=True)
        (run_folder / name).write_text("x")
    for name in ("mine.txt", "checkpoints/mine.safetensors", ".hidden"):
        (run_folder / name).write_text("mine")
    clear_folder(run_folder, everything=True)
    assert contents(run_folder).keys() == {"mine.txt", "checkpoints/mine.safetensors", ".hidden"}


def test_clearing_for_resume_takes_half_written_files_only(run_folder):
    before = contents(run_folder)
    (run_folder / "checkpoints").mkdir()
    for name in (".model.onnx.tmp12", ".result.json.77.part", "checkpoints/.fit.safetensors.9.part"):
        (run_folder / name).write_text("half")
    clear_folder(run_folder, everything=False)
    assert contents(run_folder) == before


def test_devices():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda")
    with pytest.raises(InputError, match="device is 'tpu'; cpu, cuda and auto work"):
        pick_device("tpu")


def test_cuda_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="device is 'cuda' and PyTorch sees no CUDA device here"):
        pick_device("cuda")


def test_a_fitted_run_brings_state_and_settings(run_folder, teacher):
    fitted = FittedRun.open(run_folder, teacher)
    assert fitted.method == ZSCGAN(steps=5)
    assert fitted.state["generator.a"].tolist() == [1, 1]


def test_a_folder_without_a_generator_is_refused(tmp_path, teacher):
    with pytest.raises(InputError, match=r"holds no generator\.safetensors; from_run takes a folder"):
        FittedRun.open(tmp_path, teacher)


def test_a_generator_of_other_weights_is_refused(run_folder, teacher):
    other = replace(teacher, name="other", weights_sha256="f" * 64)
    with pytest.raises(InputError, match=rf"{teacher.weights_sha256[:12]}.*'other' \({'f' * 12}\)"):
        FittedRun.open(run_folder, other)


def test_a_generator_of_other_images_is_refused(run_folder, teacher):
    other = replace(teacher, spec=replace(teacher.spec, height=16, width=16))
    with pytest.raises(InputError, match=r"fitted to images of 1x8x8 .* takes 1x16x16"):
        FittedRun.open(run_folder, other)
    resized = replace(teacher, spec=replace(teacher.spec, resize=9))  # of no concern to a generator
    assert FittedRun.open(run_folder, resized).method.steps == 5


def test_a_damaged_generator_is_named(run_folder, teacher):
    path = run_folder / "generator.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InputError, match=r"generator\.safetensors is not a readable safetensors file"):
        FittedRun.open(run_folder, teacher)


def test_a_generator_without_settings_is_refused(run_folder, teacher):
    (run_folder / "settings.toml").unlink()
    with pytest.raises(InputError, match=r"settings\.toml: No such file"):
        FittedRun.open(run_folder, teacher)


def test_objects_and_names_give_the_same_settings():
    method, quantizer = ZSCGAN(steps=7, learning_rate=3e-4, batch_size=16), QAT(bits="W4A8", steps=9, kd_weight=0.25)
    settings = resolve_settings(method, quantizer, None)
    assert (settings.method, settings.quantizer) == (method, quantizer)
    assert settings.chosen >= {"method.steps", "quantizer.steps"}
    assert resolve_settings("noise", "ptq", 4) == resolve(method="noise", quantizer="ptq", bits=4)


@pytest.mark.parametrize("given", [PTQ(range_rule="mse"), QAT(first_last_bits=8, bias_correction=False)])
def test_a_quantizer_object_survives_the_merge(given):
    assert resolve_settings(Noise(distribution="uniform"), given, None).quantizer == given
    assert resolve_settings(Noise(distribution="uniform"), given, None).method == Noise(distribution="uniform")


def test_bits_and_assignments_win_over_an_object():
    settings = resolve_settings(ZSCGAN(steps=7), PTQ(bits="8"), "4", assignments=("method.steps=8",))
    assert (settings.method.steps, settings.quantizer.bits) == (8, "4")


def test_a_reused_generator_brings_its_settings(run_folder, teacher, tmp_path):
    fitted = FittedRun.open(run_folder, teacher)
    recipe = tmp_path / "r.toml"
    recipe.write_text("[method]\nwidth = 64\n[quantizer]\nrange_rule = 'percentile'\n")
    for settings in (
        resolve_settings(None, None, 4, source_run=fitted),
        resolve_settings("zscgan", None, 4, source_run=fitted, recipe=recipe),
    ):
        assert settings.method == ZSCGAN(steps=5)
        assert settings.quantizer.bits == "4"
        assert "method.steps" in settings.chosen


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"assignments": ("method.steps=9",)}, "method.steps cannot change it"),
        ({"method": "noise"}, "method cannot change it"),
        ({"method": ZSCGAN(steps=9)}, "method.steps cannot change it"),
        ({"assignments": ("method.width=9",), "recipe": True}, "method.width cannot change it"),
    ],
)
def test_a_reused_generator_cannot_be_changed(run_folder, teacher, tmp_path, arguments, message):
    fitted = FittedRun.open(run_folder, teacher)
    if arguments.get("recipe"):
        (tmp_path / "r.toml").write_text("[method]\nsteps = 3\n")
        arguments = arguments | {"recipe": tmp_path / "r.toml"}
    with pytest.raises(InputError, match=message):
        resolve_settings(arguments.pop("method", None), None, None, source_run=fitted, **arguments)


def test_stored_settings_are_those_of_the_run(run_folder, teacher):
    assert resumed_settings(run_folder, resolve(), teacher, 0).method == ZSCGAN(steps=5)
    same = resolve(assignments=["method.steps=5"], bits="8", method="zscgan", quantizer="ptq")
    assert resumed_settings(run_folder, same, teacher, 0).quantizer == PTQ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"assignments": ["method.steps=6"]}, "method.steps is 5 there, not 6"),
        ({"bits": 4}, "quantizer.bits is 8 there, not 4"),
        ({"method": "noise"}, "method.name is zscgan there, not noise"),
        ({"quantizer": "qat"}, "quantizer.name is ptq there, not qat"),
        ({"quantizer": "qat", "bits": 4}, "quantizer.name is ptq there, not qat"),
    ],
)
def test_a_resumed_run_cannot_be_changed(run_folder, teacher, arguments, message):
    with pytest.raises(InputError, match=f"holds a run that differs: {message}.*overwrite=True starts anew"):
        resumed_settings(run_folder, resolve(**arguments), teacher, 0)


def test_a_resumed_run_keeps_network_images_and_seed(run_folder, teacher):
    with pytest.raises(InputError, match="its seed is 0, not 1"):
        resumed_settings(run_folder, resolve(), teacher, 1)
    with pytest.raises(InputError, match="its network 'digits' had other weights"):
        resumed_settings(run_folder, resolve(), replace(teacher, weights_sha256="f" * 64), 0)
    with pytest.raises(InputError, match="its network 'digits' had the same weights and computed something else with"):
        resumed_settings(run_folder, resolve(), replace(teacher, graph_sha256="f" * 64), 0)
    with pytest.raises(InputError, match=r"its images were 1x8x8 .*, not 1x8x8 .*0.9"):
        resumed_settings(run_folder, resolve(), replace(teacher, spec=replace(teacher.spec, std=(0.9,))), 0)


def test_a_resumed_run_keeps_its_generator(run_folder, teacher, tmp_path):
    fitted = FittedRun.open(run_folder, teacher)
    wanted = resolve_settings(None, None, None, source_run=fitted)
    with pytest.raises(InputError, match="it was started without from_run"):
        resumed_settings(run_folder, wanted, teacher, 0, fitted)
    second = tmp_path / "second"
    facts = {"seed": 0, "generator_sha256": fitted.sha256}
    write_settings(second / "settings.toml", wanted, teacher_table(teacher), facts)
    assert resumed_settings(second, wanted, teacher, 0, fitted).method == ZSCGAN(steps=5)
    with pytest.raises(InputError, match="it was started with from_run; give it again"):
        resumed_settings(second, wanted, teacher, 0)
    with pytest.raises(InputError, match="it was started with from_run another folder"):
        resumed_settings(second, wanted, teacher, 0, replace(fitted, sha256="0"))


def test_the_image_spec_comes_back(run_folder, teacher):
    assert stored_spec(run_folder / "settings.toml") == teacher.spec


@pytest.mark.parametrize("text", ["[method]\nsteps = 3\n", "teacher = 3\n"])
def test_settings_without_a_teacher_are_refused(tmp_path, text):
    (tmp_path / "settings.toml").write_text(text)
    with pytest.raises(InputError, match=r"settings\.toml names no teacher"):
        stored_spec(tmp_path / "settings.toml")


@pytest.mark.parametrize(
    ("arguments", "budget", "recipe", "planned"),
    [
        ({}, None, None, 600),  # nothing said: ten minutes
        ({}, "2m", None, 120),
        ({}, None, "recipe.toml", None),
        ({"assignments": ["method.steps=5"]}, None, None, None),
        ({"assignments": ["method.steps=5"], "quantizer": "qat"}, None, None, 600),
        ({"method": "noise"}, None, None, None),
        ({"method": "noise", "quantizer": "qat"}, None, None, 600),
    ],
)
def test_a_budget_is_the_default_where_steps_are_open(monkeypatch, teacher, arguments, budget, recipe, planned, said):
    asked = []

    def fake(settings, teacher, run, seconds, **rest):
        asked.append(seconds)
        return budget_module.Plan(settings.with_steps(), budget_module.Costs(0.25, 0.0, 0.01, 3.0), 0)

    monkeypatch.setattr(budget_module, "plan", fake)
    wanted = resolve(**arguments)
    chosen, facts, _ = choose_schedule(wanted, teacher, Run(), budget, recipe=recipe, num_eval_images=0, fitted=False)
    assert chosen == (settling(wanted) if planned and not budget else wanted)
    assert chosen.method == wanted.method or chosen.method.settle
    assert asked == ([] if planned is None else [planned])
    assert facts.get("budget_seconds") == planned
    assert bool(said) == (planned is not None)


def test_a_resumed_run_on_other_versions_says_so(run_folder, teacher, said):
    facts = {"seed": 0, "threads": torch.get_num_threads()} | versions()
    settings = resolve(assignments=["method.steps=5"])
    write_settings(run_folder / "settings.toml", settings, teacher_table(teacher), facts)
    resumed_settings(run_folder, resolve(), teacher, 0)
    assert said == []
    write_settings(run_folder / "settings.toml", settings, teacher_table(teacher), facts | {"torch": "1.0"})
    resumed_settings(run_folder, resolve(), teacher, 0)
    assert len(said) == 1
    assert "started with torch 1.0, now" in said[0]
    write_settings(run_folder / "settings.toml", settings, teacher_table(teacher), facts | {"device": "cuda"})
    resumed_settings(run_folder, resolve(), teacher, 0)
    assert "started with device cuda, now cpu" in said[1]


def test_settings_that_lack_their_last_table_are_cut_short(run_folder, teacher):
    path = run_folder / "settings.toml"
    path.write_text(path.read_text().partition("[run]")[0])
    with pytest.raises(InputError, match=r"is cut short: its last table, \[run\], is missing"):
        FittedRun.open(run_folder, teacher)


def test_a_folder_is_kept_to_one_process(tmp_path):
    with claimed(tmp_path / "run"):
        again = claimed(tmp_path / "run")
        with pytest.raises(InputError, match=r"another process is writing to .*run; wait for it, or give another"):
            again.__enter__()
        (tmp_path / "run" / "kept").touch()
    with claimed(tmp_path / "run"):
        pass
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["kept"]
    with pytest.raises(InputError, match="mistake"), claimed(tmp_path / "empty"):
        raise InputError("mistake")
    assert not (tmp_path / "empty").exists()


def test_a_recipe_of_another_network_or_of_a_reused_generator_is_named(run_folder, teacher, said):
    path = run_folder / "settings.toml"
    warn_of_recipe(path, teacher, reuses=False)
    assert said == []
    warn_of_recipe(path, dataclasses.replace(teacher, weights_sha256="0" * 64), reuses=False)
    assert "is of a run of 'digits' with other weights; its settings are taken" in said.pop()
    write_settings(path, resolve(), teacher_table(teacher), {"seed": 0, "generator_sha256": "1" * 64})
    warn_of_recipe(path, teacher, reuses=True)
    assert said == []
    warn_of_recipe(path, teacher, reuses=False)
    assert "took its generator from another run; --from DIR repeats that" in said.pop()


def test_the_seed_is_that_of_the_caller_else_of_the_run_else_of_the_recipe(run_folder, teacher, tmp_path):
    write_settings(run_folder / "settings.toml", resolve(), teacher_table(teacher), {"seed": 5})
    recipe = run_folder / "settings.toml"
    assert chosen_seed(7, recipe, run_folder, resume=True) == 7
    assert chosen_seed(None, recipe, tmp_path, resume=False) == 5
    assert chosen_seed(None, None, run_folder, resume=True) == 5
    assert chosen_seed(None, None, run_folder, resume=False) == 0
