"""Methods that other packages register: one that works, from entry point to file, and each kind that does not."""

import json
import logging
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from zsq.errors import InputError
from zsq.methods import METHODS, Method, Noise
from zsq.runs.docstrings import settings_of
from zsq.runtime.plugins import Registry

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "toy_method"

PLUGIN = """
from dataclasses import dataclass
from typing import ClassVar
from zsq.methods import Noise

@dataclass(frozen=True, kw_only=True)
class Good(Noise):
    name: ClassVar[str] = "good"
"""


def install(folder: Path, package: str, entries: dict[str, str], code: str | None = None, version: str = "1.0") -> None:
    """Lay a package out as pip does: its metadata, its entry points and its module."""
    information = folder / f"{package}-{version}.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    lines = [f"{name} = {value}" for name, value in entries.items()]
    (information / "entry_points.txt").write_text("\n".join(["[zsq.methods]", *lines, ""]))
    if code is not None:
        (folder / f"{package}.py").write_text(code)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed packages, one of which holds a method that works."""
    install(tmp_path, "good_plugin", {"good": "good_plugin:Good"}, PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("good_plugin", "toy_plugin"):  # the next test has others of these names
        sys.modules.pop(name, None)


@pytest.fixture
def registry() -> Registry:
    return Registry("zsq.methods", kind="method", base=Method, own=[Noise])


def toy(**changes: str) -> str:
    """Return the code of a method, with some lines of it replaced; an empty one is left out."""
    lines = {
        "decorator": "@dataclass(frozen=True, kw_only=True)",
        "class": "class Toy(Method):",
        "name": 'name: ClassVar[str] = "toy"',
        "summary": 'summary: ClassVar[str] = "a toy"',
        "quantizers": 'quantizers: ClassVar[tuple[str, ...]] = ("ptq",)',
        "steps": "steps: int = 0",
        "fit": "def fit(self, teacher, run, *, distill_steps=0, fitted=None): ...",
    } | changes
    head = ["from dataclasses import dataclass", "from typing import ClassVar", "from zsq.methods import Method"]
    return "\n".join([*head, lines.pop("decorator"), lines.pop("class"), *(f"    {text}" for text in lines.values())])


def test_own_classes_come_first_and_a_plugin_behind_them(site: Path, registry: Registry) -> None:
    assert list(registry) == ["noise", "good"]
    assert len(registry) == 2
    assert dict(registry.items()) == {"noise": Noise, "good": registry["good"]}
    assert issubclass(registry["good"], Noise)
    assert "good" in registry
    assert "absent" not in registry
    with pytest.raises(KeyError):
        registry["absent"]


def test_a_plugin_is_imported_only_when_it_is_asked_for(site: Path, registry: Registry) -> None:
    assert registry["noise"] is Noise
    assert "absent" not in registry
    assert "good_plugin" not in sys.modules
    assert registry["good"] is registry["good"]
    assert "good_plugin" in sys.modules


def test_without_plugins_it_holds_what_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry("zsq.no_such_group", kind="thing", base=Method, own=[Noise])
    assert dict(registry) == {"noise": Noise}


BROKEN = {
    "no module": ("absent_module:Toy", None, "loading absent_module:Toy raises ModuleNotFoundError: No module named"),
    "no class": ("toy_plugin:Tony", toy(), "has no attribute 'Tony'"),
    "error on import": ("toy_plugin:Toy", "1 / 0", "raises ZeroDivisionError: division by zero"),
    "exit on import": ("toy_plugin:Toy", "raise SystemExit('no licence')", "raises SystemExit: no licence"),
    "syntax": ("toy_plugin:Toy", "class Toy(:", "raises SyntaxError: "),
    "no address": ("-", None, "loading - raises "),
    "module": ("toy_plugin", toy(), "is not a frozen dataclass"),
    "plain class": ("toy_plugin:Toy", toy(decorator=""), "is not a frozen dataclass"),
    "not frozen": ("toy_plugin:Toy", toy(decorator="@dataclass"), "is not a frozen dataclass"),
    "no summary": ("toy_plugin:Toy", toy(summary=""), "Toy has no 'summary'"),
    "no subclass": ("toy_plugin:Toy", toy(**{"class": "class Toy:"}), "Toy is no subclass of zsq.methods.base.Method"),
    "no fit": ("toy_plugin:Toy", toy(fit=""), "Toy has no method 'fit'"),
    "fit is a value": ("toy_plugin:Toy", toy(fit="fit: ClassVar[int] = 3"), "Toy has no method 'fit'"),
    "fit takes less": (
        "toy_plugin:Toy",
        toy(fit="def fit(self, teacher, run): ..."),
        "Toy cannot be called as fit(teacher, run, distill_steps=..., fitted=...): got an unexpected keyword argument",
    ),
    "quantizers": (
        "toy_plugin:Toy",
        toy(quantizers='quantizers: ClassVar[str] = "ptq"'),
        "Toy.quantizers is 'ptq': Input should be a valid tuple",
    ),
    "other name": ("toy_plugin:Toy", toy(name='name: ClassVar[str] = "tony"'), "Toy.name is 'tony', not 'toy'"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_plugin_is_one_line_and_the_others_work(
    kind: str, site: Path, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    value, code, reason = BROKEN[kind]
    install(site, "toy_plugin", {"toy": value}, code)
    assert list(registry) == ["noise", "good"]
    assert list(registry) == ["noise", "good"]
    (record,) = caplog.records  # once
    assert (record.name, record.levelno) == ("zsq.methods", logging.WARNING)
    text = record.getMessage()
    assert text.startswith("Method 'toy' of toy_plugin 1.0 cannot be used: ")
    assert reason in text
    assert text.endswith(".")
    assert "\n" not in text
    for ask in (registry.__getitem__, registry.__contains__, registry.get):
        with pytest.raises(InputError) as caught:
            ask("toy")
        assert str(caught.value) == text


def test_a_plugin_does_not_replace_a_class_of_zsq(
    site: Path, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    install(site, "toy_plugin", {"noise": "toy_plugin:Toy"}, toy())
    assert registry["noise"] is Noise
    assert caplog.messages == ["Method 'noise' of toy_plugin 1.0 is ignored: zsq has a method of that name."]
    assert list(registry) == ["noise", "good"]
    assert len(caplog.messages) == 1


def test_one_name_in_two_packages_is_neither(site: Path, registry: Registry, caplog: pytest.LogCaptureFixture) -> None:
    install(site, "toy_plugin", {"toy": "toy_plugin:Toy"}, toy())
    install(site, "zz_plugin", {"toy": "toy_plugin:Toy"}, version="2.0")
    assert list(registry) == ["noise", "good"]
    assert "registers it, too" in caplog.text
    with pytest.raises(
        InputError, match=r"'toy' of .*_plugin .* cannot be used: .*_plugin .* registers it, too\."
    ) as caught:
        registry["toy"]
    assert all(package in str(caught.value) for package in ("toy_plugin 1.0", "zz_plugin 2.0"))


def test_damaged_entry_points_of_any_package_leave_the_own_classes(
    site: Path, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    install(site, "other", {})
    (site / "other-1.0.dist-info" / "entry_points.txt").write_bytes(b"[zsq.methods]\n\xff\xfe = \xff\n")
    assert dict(registry) == {"noise": Noise}
    (text,) = caplog.messages
    assert text.startswith("Plugins are ignored: the entry points of an installed package are damaged: UnicodeDecode")


def test_settings_of_a_class_without_source_are_listed_without_texts() -> None:
    names: dict[str, Any] = {"__name__": "nowhere"}
    exec(toy().replace("steps: int = 0", "width: int = 3"), names)
    assert list(settings_of(names["Toy"])) == [("width", "3", "")]


@dataclass(frozen=True, kw_only=True)
class Inherited(Noise):
    """A class in a module that has its source."""

    name: ClassVar[str] = "inherited"
    width: int = 3
    """Its width."""


def test_settings_of_a_class_with_source_have_texts() -> None:
    assert list(settings_of(Inherited))[-1] == ("width", "3", "Its width.")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages: the example, as its own pyproject.toml describes it, and a broken one."""
    folder = tmp_path_factory.mktemp("site")
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    install(folder, "zsq_toy", project["entry-points"]["zsq.methods"], (EXAMPLE / "zsq_toy.py").read_text())
    install(folder, "broken", {"broken": "absent_module:Broken"})
    return folder


def zsq(installed: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Call the command line in a process that finds the installed packages."""
    paths = [str(installed), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, "-m", "zsq", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_the_example_is_listed_beside_a_broken_plugin(installed: Path) -> None:
    done = zsq(installed, "methods")
    assert done.returncode == 0
    listed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("--method ")]
    assert [name for name in listed if name not in METHODS] == ["toy"]
    assert "striped images" in done.stdout
    (line,) = done.stderr.splitlines()
    assert "Method 'broken' of broken 1.0 cannot be used: loading absent_module:Broken raises ModuleNotFound" in line
    settings = zsq(installed, "methods", "toy").stdout.splitlines()
    assert [line.split()[1] for line in settings] == ["method.images=1000", "method.batch_size=64"]


@pytest.mark.slow
def test_the_example_quantizes_from_end_to_end(installed: Path, tmp_path: Path) -> None:
    asked = ["--method", "toy", "--quantizer", "qat", "--set", "method.images=100"]
    asked += ["--set", "quantizer.num_samples=64", "--set", "quantizer.steps=3"]
    done = zsq(installed, "quantize", "digits", *asked, "--data", "digits", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert record["method"] == "toy"
    assert record["data_free"]
    assert record["quantized_top1"] > 90
    assert tomllib.loads((tmp_path / "run" / "settings.toml").read_text())["method"]["images"] == 100


@pytest.mark.slow
def test_a_broken_plugin_that_is_asked_for_is_one_line(installed: Path, tmp_path: Path) -> None:
    done = zsq(installed, "quantize", "digits", "--method", "broken", "--out", tmp_path / "run")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: Method 'broken' of broken 1.0 cannot be used: loading absent_module:Broken raises")
