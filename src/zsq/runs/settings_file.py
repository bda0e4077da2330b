"""`settings.toml` of a run's folder: network, method, quantizer and what the run was started with; a recipe, too."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import tomli_w

from zsq.checked import validated
from zsq.errors import InputError
from zsq.models.teacher import Teacher
from zsq.runs.recipe_file import read_toml
from zsq.runs.settings import Settings, to_tables
from zsq.runtime.checksums import check_text, sealed_text
from zsq.runtime.files import replacing
from zsq.runtime.versions import versions
from zsq.types import ImageSpec

SETTINGS = "settings.toml"


def write_settings(path: Path, settings: Settings, teacher: dict[str, Any], run: dict[str, Any]) -> None:
    """Write the resolved settings and their checksum; the file is a recipe that repeats the run."""
    content = {"teacher": teacher, **to_tables(settings), "run": run}
    text = tomli_w.dumps({name: _without_none(table) for name, table in content.items()})
    with replacing(path) as temporary:
        temporary.write_text(sealed_text(text), encoding="utf-8")


def read_settings(path: Path) -> dict[str, Any]:
    """Return what a run's settings.toml says.

    Raises:
        InputError: there is none, it is no TOML, or not what the run has written.
    """
    content = read_toml(path)
    check_text(path, path.read_text(encoding="utf-8"))
    return content


def _without_none(table: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if value is not None}


def teacher_table(teacher: Teacher) -> dict[str, Any]:
    """Return what `settings.toml` says of the teacher."""
    spec = teacher.spec
    return (
        {
            "model": teacher.name,
            "weights": teacher.weights_source,
            "weights_file": teacher.weights_file,
            "weights_sha256": teacher.weights_sha256,
            "graph_sha256": teacher.graph_sha256,
            "channels": spec.channels,
            "height": spec.height,
            "width": spec.width,
            "classes": spec.classes,
            "mean": list(spec.mean),
            "std": list(spec.std),
            "resize": spec.resize,
        }
        | ({} if spec.is_image else {"depth": spec.depth, "axes": spec.axes})
        | ({"outputs": [asdict(output) for output in spec.outputs]} if spec.outputs else {})
    )


def other_graph(content: Mapping[str, Any], teacher: Teacher) -> bool:
    """Whether a settings.toml is of a network that computed something else; versions of PyTorch cannot be compared."""
    if content.get("run", {}).get("torch") != versions()["torch"]:
        return False
    return bool(content.get("teacher", {}).get("graph_sha256", teacher.graph_sha256) != teacher.graph_sha256)


def stored_spec(path: Path, *, sealed: bool = True) -> ImageSpec:
    """Return the image spec of the teacher in a run's settings.toml, or with `sealed` off in an edited copy.

    Raises:
        InputError: the file names no teacher.
    """
    content = read_settings(path) if sealed else read_toml(path)
    table = content.get("teacher")
    if not isinstance(table, dict):
        raise InputError(f"{path} names no teacher; it is not a run's.")
    if "run" not in content:
        raise InputError(f"{path} is cut short: its last table, [run], is missing.")
    known = {field.name for field in fields(ImageSpec)}
    return validated(ImageSpec, {name: table[name] for name in table if name in known}, f"{path}, table [teacher]")


def stored_facts(folder: Path) -> dict[str, Any]:
    """Return what a run's settings.toml says of how it was started; empty where it has no such table."""
    return dict(read_settings(folder / SETTINGS).get("run", {}))


def shape_of(spec: ImageSpec) -> str:
    """Say all of an image spec that a generator depends on; `resize` serves files only."""
    values = f"mean {list(spec.mean)}, std {list(spec.std)}"
    given = f", {', '.join(f'{o.name} {o.kind} {list(o.shape)}' for o in spec.outputs)}" if spec.outputs else ""
    return f"{spec.shape_text} in {spec.classes} classes, {values}{given}"


@contextmanager
def of_version(path: Path) -> Iterator[None]:
    """Name the version that has written a settings.toml, where it is another one, in what is wrong with it.

    Raises:
        InputError: as the block does.
    """
    try:
        yield
    except InputError as error:
        facts = read_toml(path).get("run", {}) if path.is_file() else {}
        was, now = facts.get("zsq") if isinstance(facts, dict) else None, versions()["zsq"]
        if was in (None, now):
            raise
        raise InputError(f"{path} was written by zsq {was}, and this is zsq {now}. {error}") from error
