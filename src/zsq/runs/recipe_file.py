"""Recipe files: one form for a run and for a comparison, since a run is a comparison of one cell.

`[teacher]`, `[method]` and `[quantizer]` are the short form of `[[teachers]]`, `[[methods]]` and `[[quantizers]]` with
one entry. `[run]` says what a run was started with; a recipe takes its seed and data. A run's `settings.toml` is in the
short form.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zsq.errors import InputError, unknown_name
from zsq.types import SIDES

SECTIONS = ("method", "quantizer")
SHORT = ("teacher", *SECTIONS, "run")
"""Tables of a run's settings.toml."""

LISTS = ("teachers", "methods", "quantizers")
COMPARISON = (*LISTS, "title", "seeds", "layout", "gap", "claims", "figure")
"""Keys of a recipe that is written as a comparison."""

NOT_SETTINGS = ("label", "title", "only", "quantizer")
"""Keys of an entry of `[[methods]]` or `[[quantizers]]` that are no settings of it."""


def read_toml(path: Path) -> dict[str, Any]:
    """Return the content of a TOML file.

    Raises:
        InputError: it is missing or is not TOML; the text gives the line.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not TOML: {error}.") from error


def run_tables(path: Path) -> dict[str, dict[str, Any]]:
    """Return what a recipe says of one run: tables `method`, `quantizer` and `run`, each possibly empty.

    Raises:
        InputError: it is not TOML, holds something else, or is a comparison of several cells.
    """
    content = read_toml(path)
    if any(key in content for key in LISTS):
        return _only_cell(path, content)
    for key, table in content.items():
        if key not in SHORT:
            raise InputError(f"{path}: {unknown_name('table', key, (*SHORT, *COMPARISON))}")
        if not isinstance(table, dict):
            raise InputError(f"{path}: '{key}' is a value; a table [{key}] is expected.")
    return {key: dict(content.get(key, {})) for key in (*SECTIONS, "run")}


def _only_cell(path: Path, content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the tables of a comparison's only cell."""
    _check_form(path, content)
    methods, quantizers = (content.get(key, []) for key in ("methods", "quantizers"))
    widths = [bits for entry in quantizers for bits in _widths(entry)]
    seeds = content.get("seeds", [0])
    if len(methods) != 1 or len(widths) != 1 or len(seeds) != 1 or len(content.get("teachers", [])) > 1:
        raise InputError(
            f"{path} is a comparison of several cells, and a run takes the settings of one; "
            f"run it with zsq compare {path} --out DIR."
        )
    method, quantizer = methods[0], quantizers[0]
    (teacher,) = content.get("teachers", [{}])
    own = teacher.get("methods", {}).get(method.get("label") or method.get("name"), {})
    overrides = teacher.get("quantizer", {}) | method.get("quantizer", {})
    return {
        "method": _settings(method) | own,
        "quantizer": _settings(quantizer) | overrides | {"bits": widths[0]},
        "run": {"seed": seeds[0]},
    }


def _widths(entry: Mapping[str, Any]) -> list[Any]:
    bits = entry.get("bits", ["8"])
    return bits if isinstance(bits, list) else [bits]


def _settings(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in NOT_SETTINGS}


def comparison_tables(path: Path) -> dict[str, Any]:
    """Return what a recipe says of a comparison, its tables as lists.

    Raises:
        InputError: it is not TOML, mixes both forms, or names no network or no images.
    """
    content = read_toml(path)
    short = [key for key in SHORT if key in content]
    if not short:
        return content
    _check_form(path, content)
    if "teacher" not in content:
        raise InputError(
            f"{path} names no network to compare anything on: it holds the settings of a run; "
            f"zsq quantize NETWORK --recipe {path} --out DIR takes them."
        )
    run, quantizer = content.get("run", {}), dict(content.get("quantizer", {}))
    if "data" not in run:
        raise InputError(f'{path} names no images to measure accuracy on; add data = "SET" to its table [run].')
    quantizer["bits"] = [str(quantizer.get("bits", "8"))]
    teacher = _as_entry(content["teacher"], run)
    return {
        "title": f"{teacher.get('model')} as in {path.name}",
        "seeds": [run.get("seed", 0)],
        "teachers": [teacher],
        "methods": [{"name": "zscgan"} | content.get("method", {})],
        "quantizers": [{"name": "ptq"} | quantizer],
    }


def _as_entry(teacher: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry of `[[teachers]]` for the table `[teacher]` of a run, which says shapes one by one."""
    entry = {key: teacher[key] for key in ("model", "classes", "mean", "std") if teacher.get(key)}
    if sides := [size for key in ("channels", *SIDES[3]) if (size := teacher.get(key))]:
        entry["input"] = sides
    if outputs := teacher.get("outputs"):
        entry["outputs"] = [{key: output[key] for key in ("name", "kind")} for output in outputs]
    weights = "random" if teacher.get("weights") == "random" else teacher.get("weights_file")
    facts = {
        "resize": teacher.get("resize", "none"),
        "weights": weights,
        "data": run.get("data"),
        "decode": run.get("decode"),
    }
    return entry | {key: value for key, value in facts.items() if value is not None}


def _check_form(path: Path, content: Mapping[str, Any]) -> None:
    """Check that a recipe is written in one of the two forms, its tables and lists as such."""
    short, lists = ([key for key in keys if key in content] for keys in (SHORT, COMPARISON))
    if short and lists:
        raise InputError(
            f"{path} has both '{short[0]}' of a run and '{lists[0]}' of a comparison; write it in one form."
        )
    for key in short:
        if not isinstance(content[key], dict):
            raise InputError(f"{path}: '{key}' is a value; a table [{key}] is expected.")
    for key in (key for key in lists if key in LISTS):
        if not isinstance(content[key], list) or not all(isinstance(entry, dict) for entry in content[key]):
            raise InputError(f"{path}: '{key}' is no list of tables; write [[{key}]], or [{key[:-1]}] for one.")
