"""What a terminal of 80 columns shows, read back through a terminal emulator."""

import logging
import re
import sys
import time
import types

import pytest
from terminals import Terminal

from zsq.runs import console
from zsq.runs.console import TerminalProgress
from zsq.runs.forecast import Forecast


@pytest.fixture
def terminal_of(monkeypatch):
    """Makes a terminal of so many columns."""
    made = []

    def make(columns: int) -> Terminal:
        made.append(Terminal(monkeypatch, columns))
        return made[-1]

    yield make
    monkeypatch.undo()
    for terminal in made:
        terminal.close()


LOSSES = {"ce": 0.1234, "bns": 312.0, "label_recognition": 87.5}


def shown_by(progress: TerminalProgress, terminal: Terminal) -> list[str]:
    progress._bars.refresh()
    return terminal.lines()


@pytest.mark.parametrize("columns", [80, 120])
def test_phase_step_and_time_left_stay_and_losses_go_first(terminal_of, columns):
    terminal = terminal_of(columns)
    with TerminalProgress() as progress:
        progress.expect(Forecast({"compare samples": 1.0, "report": 245.0}))
        progress.update("compare samples", 0, 200_000, {})
        time.sleep(0.05)
        progress.update("compare samples", 100_000, 200_000, LOSSES)
        (line,) = shown_by(progress, terminal)
        assert line.startswith("compare samples ")
        assert "100000/200000" in line
        assert re.search(r"0:0\d left, run [34]:\d\d", line)
        assert len(line) <= columns
        assert ("label_recognition 87.5" in line) == (columns == 120)


def test_finished_phases_are_one_line_each(terminal_of):
    terminal = terminal_of(80)
    with TerminalProgress() as progress:
        progress.update("fit", 10, 20, LOSSES)
        progress.update("fit", 20, 20, LOSSES)
        progress.update("check", 5, 500, {})
        progress.update("check", 10, 10, {})  # ends early
        progress.update("evaluate", 100, 899, {})
        *folded, current = shown_by(progress, terminal)
        assert [line.split()[:2] for line in folded] == [["fit", "20/20"], ["check", "10/10"]]
        assert folded[0] == "fit             20/20 in 0:00  ce 0.123 bns 312 label_recognition 87.5"
        assert current.startswith("evaluate ")
        assert "100/899" in current
    assert [line.split()[0] for line in terminal.lines()] == ["fit", "check", "evaluate"]


def test_lines_that_are_said_stand_above_the_bar(terminal_of):
    terminal = terminal_of(80)
    with TerminalProgress() as progress:
        progress.update("fit", 10, 20, {})
        console.say_line("WARNING: look")
        assert [line.split()[0] for line in shown_by(progress, terminal)] == ["WARNING:", "fit"]


class Output:
    """One output of a notebook's cell, as IPython's display makes it."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    def update(self, data: dict[str, str], *, raw: bool) -> None:
        assert raw
        self.shown.append(data["text/plain"])
        assert data["text/html"].startswith("<pre")


def test_a_notebook_has_one_output_that_is_replaced(monkeypatch):
    outputs: list[Output] = []

    def display(data: dict[str, str], *, raw: bool, display_id: bool) -> Output:
        assert display_id
        outputs.append(Output())
        outputs[-1].update(data, raw=raw)
        return outputs[-1]

    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(display=display))
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    with console.shown(None, quiet=False) as progress:
        progress.update("fit", 0, 20, {})
        progress.update("fit", 10, 20, LOSSES)
        logging.getLogger("zsq.test").warning("look: 1 < 2")
        progress.update("fit", 20, 20, LOSSES)
        progress.update("write", 0, 1, {})
    (output,) = outputs
    assert output.shown[0].split()[:1] == ["fit"]
    assert "0/20" in output.shown[0]
    assert output.shown[-1].splitlines() == [
        "WARNING: look: 1 < 2",
        "fit             20/20 in 0:00  ce 0.123 bns 312 label_recognition 87.5",
        "write           0/1 in 0:00",
    ]
