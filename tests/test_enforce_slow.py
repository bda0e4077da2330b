"""`--enforce-slow` names what is slow without the mark, and only that."""

import re

import enforce_slow
import pytest

TESTS = """
import subprocess, sys, time
import pytest

def work(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass

@pytest.fixture(scope="module")
def made():
    work(0.2)

def test_own_time():
    work(0.2)

def test_shared_fixture(made):
    pass

def test_process():
    text = "import time\\nwhile time.process_time() < 0.2: pass"
    subprocess.run([sys.executable, "-S", "-c", text], check=True)

def test_waiting_is_no_work():
    time.sleep(0.2)

@pytest.mark.slow
def test_marked():
    work(0.2)

@pytest.mark.real
def test_real():
    work(0.2)
"""


@pytest.fixture
def run(pytester, monkeypatch):
    monkeypatch.setattr(enforce_slow, "LIMIT", 0.1)
    pytester.makepyfile(test_some=TESTS)
    pytester.makeini("[pytest]\nmarkers =\n    slow\n    real\n")
    return lambda *arguments: pytester.runpytest_inprocess("-p", "enforce_slow", *arguments)


@pytest.mark.parametrize("processes", [(), pytest.param(("-n", "1"), marks=pytest.mark.slow)], ids=["alone", "xdist"])
def test_what_is_slow_without_the_mark_fails_the_run(run, processes):
    result = run("--enforce-slow", *processes)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=6)
    _, _, told = result.stdout.str().partition("more than 0.1 s of the processor and not marked slow")
    assert set(re.findall(r"::(\w+)$", told, flags=re.MULTILINE)) == {"test_own_time", "test_process"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [("--enforce-slow", "-k", "waiting or fixture or marked or real"), ("-k", "own_time")]
)
def test_nothing_is_said_where_all_is_well_or_nobody_asks(run, arguments):
    result = run(*arguments)
    assert result.ret == pytest.ExitCode.OK
    assert "not marked slow" not in result.stdout.str()


def test_another_failure_keeps_its_own_code(run, pytester):
    pytester.makepyfile(test_other="import nowhere")
    assert run("--enforce-slow").ret == pytest.ExitCode.INTERRUPTED
