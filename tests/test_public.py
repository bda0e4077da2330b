"""What `import zsq` promises: names, signatures and fields are those of the snapshot.

    python tests/test_public.py

writes the snapshot anew. A change of it is a change that users of the library meet: it goes into the changelog.
"""

import ast
import dataclasses
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import zsq

SNAPSHOT = Path(__file__).with_name("public_face.json")


def described(value: Any) -> Any:
    if inspect.isclass(value):
        if issubclass(value, Exception):
            return [base.__name__ for base in value.__mro__[1:-1]]
        members = [name for name, _ in inspect.getmembers(value) if not name.startswith("_")]
        if dataclasses.is_dataclass(value):
            fields = {f.name: str(f.default) if f.default is not dataclasses.MISSING else "" for f in fields_of(value)}
            return {"fields": fields, "members": [name for name in members if name not in fields]}
        return {"members": members}
    if callable(value):
        parameters = inspect.signature(value).parameters.values()
        return {
            p.name: f"{p.kind.description}{'' if p.default is p.empty else f' = {p.default!r}'}" for p in parameters
        }
    return type(value).__name__


def fields_of(kind: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(kind)


def face() -> dict[str, Any]:
    return {name: described(getattr(zsq, name)) for name in sorted(zsq.__all__)}


def test_names_and_signatures_are_those_promised() -> None:
    assert face() == json.loads(SNAPSHOT.read_text())


def test_dir_shows_what_is_promised_and_no_inner_modules() -> None:
    assert set(dir(zsq)) == {*zsq.__all__, "__version__"}


def test_importing_zsq_alone_imports_nothing_that_takes_time() -> None:
    text = (
        "import sys, zsq, zsq.cli.start; print(*sorted({'torch', 'numpy', 'tyro', 'rich', 'onnx'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", text], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == ""


def test_names_come_from_where_type_checkers_look_for_them() -> None:
    tree = ast.parse(Path(zsq.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and isinstance(node.test, ast.Name)]
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert {node.module: tuple(sorted(a.name for a in node.names)) for node in imports} == zsq._MODULES
    assert sorted(name for names in zsq._MODULES.values() for name in names) == sorted(zsq.__all__)


def test_a_name_that_is_not_there_is_said_to_be_missing() -> None:
    with pytest.raises(AttributeError, match="module 'zsq' has no attribute 'quantise'"):
        zsq.quantise  # noqa: B018


def test_no_package_is_named_like_a_public_function() -> None:
    packages = {path.parent.name for path in Path(zsq.__file__).parent.rglob("__init__.py")}
    assert packages & set(zsq.__all__) == set()


@pytest.mark.slow
def test_every_module_can_be_imported_by_its_name() -> None:
    """In one fresh process, where no function of the public face hides a package of its name."""
    root = Path(zsq.__file__).parent
    paths = [path.relative_to(root.parent).with_suffix("") for path in root.rglob("*.py")]
    names = [".".join(path.parts).removesuffix(".__init__") for path in paths]
    chosen = [name for name in names if "kernels" not in name and not name.endswith("__main__")]  # Triton; runs
    assert len(chosen) > 80
    text = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)"
    subprocess.run([sys.executable, "-c", text, *chosen], check=True)


if __name__ == "__main__":
    SNAPSHOT.write_text(json.dumps(face(), indent=1) + "\n")
