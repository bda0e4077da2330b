"""Faults speak the language in which they are met."""

from pathlib import Path

import pytest

import zsq
from zsq.cli.main import main
from zsq.errors import InputError, StorageError, in_python, speaks_shell


def test_the_same_fault_names_arguments_in_python_and_flags_in_a_shell(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file is a file; out takes a folder\."):
        zsq.quantize("digits", out=tmp_path / "file", quiet=True)
    with pytest.raises(SystemExit):
        main(["quantize", "digits", "--out", str(tmp_path / "file")])
    assert "file is a file; --out takes a folder." in capsys.readouterr().err
    with pytest.raises(InputError, match=r"; out takes a folder\."):  # the command line has ended
        zsq.quantize("digits", out=tmp_path / "file", quiet=True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "--resume runs/a continues it, --from runs/a builds.",
            "resume=True, out='runs/a' continues it, from_run='runs/a' builds.",
        ),
        ("--overwrite starts anew", "overwrite=True starts anew"),
        ("give --input CxHxW, with --mean and --std", "give input=CxHxW, with mean and std"),
        ("a smaller --set method.batch_size=N", "a smaller settings={'method.batch_size': N}"),
        (
            "(--set method.learning_rate, --checkpoint-every)",
            "(settings={'method.learning_rate': ...}, checkpoint_every)",
        ),
        ("--outputs a=values,b=values.", "outputs='a=values,b=values'."),
        ("run it with zsq compare a.toml --out DIR.", "run it with zsq compare a.toml --out DIR."),
        ("a--b and a/--c/d", "a--b and a/--c/d"),
    ],
)
def test_flags_become_arguments(text: str, said: str) -> None:
    assert in_python(text) == said


def test_faults_of_the_system_keep_their_text() -> None:
    error = StorageError("disk is full; --out names another.")
    assert str(error) == "disk is full; out names another."
    with speaks_shell():
        assert str(error) == "disk is full; --out names another."
