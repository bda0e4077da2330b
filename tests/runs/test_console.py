"""What a terminal of 80 columns shows, read back through a terminal emulator."""

import re
import time

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
