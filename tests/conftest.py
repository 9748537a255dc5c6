"""Shared by all tests: a private cache, quiet libraries, and a budget of time per room of conformance tests."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("ESPALIER_CACHE", tempfile.mkdtemp(prefix="espalier-tests-"))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

ROOM_BUDGET = 240.0
"""Seconds that the conformance tests of one room may take on two cores; more fails the run."""

_spent: dict[str, float] = defaultdict(float)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    began = time.perf_counter()
    yield
    for mark in item.iter_markers("room"):
        _spent[mark.args[0]] += time.perf_counter() - began


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for room, seconds in _spent.items():
        terminalreporter.write_line(f"conformance of {room}/: {seconds:.0f} s of {ROOM_BUDGET:.0f} s allowed")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus == 0 and any(seconds > ROOM_BUDGET for seconds in _spent.values()):
        session.exitstatus = 1
