"""Fixtures that several test files use."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from zsq.runs.console import Lines

REAL_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    if not REAL_DATA.is_dir():
        pytest.skip("the real weights and images (../shared/data) are not on this machine")
    return REAL_DATA


@pytest.fixture(autouse=True, scope="session")
def few_threads() -> None:
    torch.set_num_threads(1)


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(Lines().format(record))


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What zsq logs while the test runs, as a user reads it."""
    logger, handler = logging.getLogger("zsq"), _Kept()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield handler.lines
    logger.removeHandler(handler)
    logger.setLevel(level)
