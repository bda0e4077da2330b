"""Settings: defaults, then the recipe, then what the user sets, checked and written down before a run starts."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from zsq.errors import InputError, unknown_name
from zsq.methods import METHODS, Method
from zsq.quantization import PTQ, QUANTIZERS
from zsq.quantization.prepare import Bits
from zsq.runs.recipe_file import SECTIONS, read_toml, run_tables

DEFAULTS = {"method": "zscgan", "quantizer": "ptq"}

BITS_KEYS = ("weight", "activation", "weights")
"""What a file of widths holds: widths of all weights and of all activations, 8 if unset, and a table of weights."""


@dataclass(frozen=True, slots=True)
class Settings:
    """A method and a quantizer, and which of their steps the user chose."""

    method: Method
    quantizer: PTQ
    chosen: frozenset[str] = frozenset()
    """Dotted names that a recipe or the user set, such as `method.steps`; a budget leaves them alone.

    `method.name` and `quantizer.name` are among them where they were asked for.
    """

    def with_steps(self, *, method: int | None = None, quantizer: int | None = None) -> "Settings":
        """Return the same settings with other schedules."""
        changed = self
        if method is not None:
            changed = replace(changed, method=changed.method.with_steps(method))
        if quantizer is not None:
            changed = replace(changed, quantizer=changed.quantizer.with_steps(quantizer))
        return changed

    @property
    def distill_steps(self) -> int:
        """Steps of distillation, 0 for PTQ."""
        return self.quantizer.distill_steps


def resolve(
    *,
    method: str | None = None,
    quantizer: str | None = None,
    bits: str | int | None = None,
    flags: Mapping[str, str | int | None] | None = None,
    recipe: Path | None = None,
    given: Mapping[str, Mapping[str, Any]] | None = None,
    assignments: Iterable[str] = (),
) -> Settings:
    """Merge defaults, recipe, given tables and assignments, the last winning.

    Args:
        method, quantizer: names; None takes the recipe's, else zscgan and ptq.
        bits: as `--bits`, a text or a TOML file of widths; None takes the recipe's.
        flags: settings of the quantizer that have a flag of their own, such as `target`; None takes the recipe's.
        recipe: a TOML file (see `recipe_file`); a run's `settings.toml` is one.
        given: tables `method` and `quantizer`, without names.
        assignments: `method.steps=100` or `quantizer.range_rule=minmax`.

    Raises:
        InputError: a name or value is wrong; the text quotes it and the nearest known one.
    """
    read = {} if recipe is None else run_tables(recipe)
    names: dict[str, str] = {}
    tables: dict[str, dict[str, Any]] = {}
    chosen: set[str] = set()
    for section, asked in (("method", method), ("quantizer", quantizer)):
        table = read.get(section, {})
        stored = table.pop("name", None)
        if stored is not None and not isinstance(stored, str):
            raise InputError(f"{recipe}: {section}.name is {stored!r}; a name is expected.")
        names[section] = asked or stored or DEFAULTS[section]
        chosen |= {f"{section}.name"} if asked or stored else set()
        other = asked is not None and asked != (stored or DEFAULTS[section])
        tables[section] = _shared(section, names[section], table) if other else table
        tables[section] |= (given or {}).get(section, {})
    for assignment in assignments:
        section, key, value = _parse_assignment(assignment)
        tables[section][key] = value
    if bits is not None:
        tables["quantizer"] |= _read_bits(str(bits))
    tables["quantizer"] |= {name: value for name, value in (flags or {}).items() if value is not None}
    check_pair(names["method"], names["quantizer"])
    chosen |= {f"{section}.{key}" for section, table in tables.items() for key in table}
    built = {section: build(section, names[section], tables[section]) for section in SECTIONS}
    return Settings(built["method"], built["quantizer"], frozenset(chosen))


def _read_bits(text: str) -> dict[str, Any]:
    """Return the settings that `--bits` stands for: a text for all weights and activations, or a file of widths.

    Raises:
        InputError: the file is missing, is not TOML, or holds something else.
    """
    if not text.lower().endswith(".toml"):
        return {"bits": text, "weight_bits": None}
    content = read_toml(Path(text))
    for key in content:
        if key not in BITS_KEYS:
            raise InputError(f"{text}: {unknown_name('key', key, BITS_KEYS)}")
    weights = content.get("weights")
    if not isinstance(weights, dict) or not weights:
        raise InputError(f'{text} has no table [weights] of widths by name, such as "conv.weight" = 4.')
    widths = {key: content.get(key, 8) for key in ("weight", "activation")}
    for key, width in widths.items():
        if type(width) is not int or not 2 <= width <= 8:
            raise InputError(f"{text}: {key} is {width!r}; a width from 2 to 8 is expected.")
    return {"bits": str(Bits(**widths)), "weight_bits": weights}


def _flat(table: Any) -> Any:
    """Undo the nesting that TOML reads into an unquoted name such as conv.weight; other values stay as they are."""
    if not isinstance(table, dict):
        return table
    flat: dict[str, Any] = {}
    for name, value in table.items():
        inner = _flat(value)
        flat |= {f"{name}.{rest}": v for rest, v in inner.items()} if isinstance(inner, dict) else {name: inner}
    return flat


_READ: dict[str, Callable[[Any], Any]] = {"bits": str, "weight_bits": _flat}
"""What is done to a setting's value before its kind is checked."""


def check_pair(method: str, quantizer: str) -> None:
    """Check that a method gives what a quantizer needs; unknown names are left to `build`."""
    if method in METHODS and quantizer in QUANTIZERS and quantizer not in METHODS[method].quantizers:
        raise InputError(
            f"quantizer {quantizer} trains on images, and method {method} makes none; "
            f"it works with: {', '.join(METHODS[method].quantizers)}."
        )


def build(section: str, name: str, table: Mapping[str, Any]) -> Any:
    """Return the settings dataclass of a method or quantizer.

    Raises:
        InputError: unknown name, unknown key or a value of the wrong kind.
    """
    known: Mapping[str, type] = METHODS if section == "method" else QUANTIZERS
    if name not in known:
        raise unknown_name(section, name, known)
    kind = known[name]
    keys = [field.name for field in fields(kind)]
    for key in table:
        if key not in keys:
            others = [other for other, rival in known.items() if key in {field.name for field in fields(rival)}]
            if others:
                raise InputError(f"{section} {name} has no setting '{key}'; --{section} {' or '.join(others)} has it.")
            raise unknown_name(f"{section} setting", f"{section}.{key}", [f"{section}.{k}" for k in keys])
    table = {key: _READ[key](value) if key in _READ else value for key, value in table.items()}
    return kind(**table)


def _shared(section: str, name: str, table: dict[str, Any]) -> dict[str, Any]:
    """Keep what a recipe written for another method or quantizer says of settings that this one has, too."""
    known: Mapping[str, type] = METHODS if section == "method" else QUANTIZERS
    if name not in known:
        raise unknown_name(section, name, known)
    keys = {field.name for field in fields(known[name])}
    return {key: value for key, value in table.items() if key in keys}


def _parse_assignment(text: str) -> tuple[str, str, Any]:
    """Split `method.steps=100`."""
    path, equals, value = text.partition("=")
    section, dot, key = path.strip().partition(".")
    if not equals or not dot or section not in SECTIONS:
        raise InputError(f"--set takes method.NAME=VALUE or quantizer.NAME=VALUE; got '{text}'.")
    value = value.strip()
    return section, key, None if value.lower() == "none" else value


def to_tables(settings: Settings) -> dict[str, dict[str, Any]]:
    """Return the tables `method` and `quantizer`, fit for TOML: what is None is left out."""
    tables = {}
    for section, part in (("method", settings.method), ("quantizer", settings.quantizer)):
        values = asdict(part)  # type: ignore[arg-type]
        tables[section] = {"name": part.name} | {k: v for k, v in values.items() if v is not None}
    return tables
