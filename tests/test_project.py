"""Files beside the code that repeat what pyproject.toml says: they agree with it."""

import re
import tomllib
from pathlib import Path
from textwrap import dedent

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOW = (ROOT / ".github" / "workflows" / "ci.yml").read_text()


def allowed(name: str) -> SpecifierSet:
    """Return the versions of a package that pyproject.toml admits."""
    listed = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    (found,) = [entry.specifier for entry in map(Requirement, listed) if entry.name == name]
    return found


def versions_in(field: str, text: str) -> list[str]:
    """Return the strings of a list in a YAML file."""
    (line,) = re.findall(rf"^ *{field}: \[(.*)\]", text, flags=re.MULTILINE)
    return re.findall(r'"([^"]+)"', line)


def test_the_workflow_tests_the_oldest_and_the_newest_torch() -> None:
    oldest, newest = versions_in("torch", WORKFLOW)
    torch = allowed("torch")
    assert f">={oldest.removesuffix('.0')}" in map(str, torch)
    assert newest in torch
    major, minor, _ = map(int, newest.split("."))
    assert f"{major}.{minor + 1}.0" not in torch


def test_the_workflow_tests_pythons_that_are_listed() -> None:
    pythons = versions_in("python", WORKFLOW)
    listed = re.findall(r":: (3\.\d+)$", "\n".join(PROJECT["classifiers"]), flags=re.MULTILINE)
    assert (pythons[0], pythons[-1]) == (listed[0], listed[-1])
    assert PROJECT["requires-python"] == f">={pythons[0]}"


def test_the_hooks_use_an_allowed_ruff() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    (version,) = re.findall(r"ruff-pre-commit\n +rev: v(\S+)", hooks)
    assert version in allowed("ruff")


def test_the_citation_is_of_this_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^version: (\S+)", citation, flags=re.MULTILINE) == [PROJECT["version"]]
    assert re.findall(r"^license: (\S+)", citation, flags=re.MULTILINE) == [PROJECT["license"]]


def test_the_changelog_has_its_fixed_headings() -> None:
    sections = re.split(r"^## ", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1:]
    titles = [section.splitlines()[0] for section in sections]
    assert titles[0] == "Unreleased"
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ - \d{4}-\d\d-\d\d", title) for title in titles[1:])
    assert PROJECT["version"] in [title.split()[0] for title in titles[1:]]
    order = ["Added", "Changed", "Fixed", "Removed"]
    for section in sections:
        headings = re.findall(r"^### (.*)", section, flags=re.MULTILINE)
        assert headings == [heading for heading in order if heading in headings]


def test_the_contributing_guide_shows_the_example_and_files_that_exist() -> None:
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    (entry,) = re.findall(r"```toml\n(.*?)```", guide, flags=re.DOTALL)
    assert dedent(f"   {entry.strip()}") in (ROOT / "examples" / "toy_method" / "pyproject.toml").read_text()
    links = re.findall(r"\]\(([^)#:]+)\)", guide)
    code = re.findall(r"`((?:src|tests|benchmarks|docs|examples)/[\w/.]+)`", guide)
    methods = [f"src/zsq/{path}" for path in re.findall(r"`(methods/\w+\.py)`", guide)]
    paths = [path for path in [*links, *code, *methods] if "NAME" not in path]
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists()] == []
    packages = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", guide, flags=re.MULTILINE)))
    found = {path.name.removesuffix(".py") for path in (ROOT / "src" / "zsq").glob("[a-z]*") if path.name != "py.typed"}
    assert found <= set(packages)
