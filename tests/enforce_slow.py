"""`pytest --enforce-slow` fails where a test takes long and is not marked `slow`, so that `make quick` stays quick.

What counts is the processor's time of the test and of the processes that it has waited for: a busy machine stretches
the clock, and that hardly. Fixtures do not count, since several tests share the long ones.
"""

import os
from collections.abc import Iterator

import pytest

LIMIT = 4.0
"""Seconds that a test without the mark may take. Mark what takes more than half a second: machines differ, and the
first export in a process imports for two or three seconds."""

MARKS = ("slow", "real")
PROPERTY = "cpu_seconds"


def cpu_seconds() -> float:
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def pytest_addoption(parser: pytest.Parser) -> None:
    text = f"fail where a test takes more than {LIMIT:g} s of the processor and is not marked slow"
    parser.addoption("--enforce-slow", action="store_true", help=text)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--enforce-slow"):
        config.pluginmanager.register(Durations(), "durations of tests that are not marked slow")


class Durations:
    """Measures where the tests run, and judges where the reports arrive: with pytest-xdist, in another process."""

    def __init__(self) -> None:
        self.late: dict[str, float] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        begun = cpu_seconds()
        try:
            return (yield)
        finally:
            item.user_properties.append((PROPERTY, cpu_seconds() - begun))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        seconds = dict(report.user_properties).get(PROPERTY, 0.0)
        if seconds > LIMIT and not any(mark in report.keywords for mark in MARKS):
            self.late[report.nodeid] = seconds

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.late and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.late:
            title = f"more than {LIMIT:g} s of the processor and not marked slow"
            terminalreporter.section(title, red=True, bold=True)
            for name, seconds in self.late.items():
                terminalreporter.write_line(f"{seconds:5.1f} s  {name}")
