"""Shared by all tests: a private cache, quiet libraries, and a budget of time per room of conformance tests."""

from __future__ import annotations

import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("ESPALIER_CACHE", tempfile.mkdtemp(prefix="espalier-tests-"))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

ROOM_BUDGET = 480.0
"""Seconds of processor time that the conformance tests of one room may take, of thirty methods 10 s each on an idle machine;
more fails the run, on a busy machine too."""

_spent: dict[str, float] = defaultdict(float)


FIRST = ("test_examples.py", "test_budget.py", "test_survival.py", "test_calibrate.py", "test_cli.py", "test_merge_search.py")
"""Files that take minutes: begun first, so that no process is left alone with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in FIRST)
    for item in items:
        item.user_properties += [("room", mark.args[0]) for mark in item.iter_markers("room")]


@pytest.fixture(autouse=True)
def the_number_of_threads_stays() -> Iterator[None]:
    """``threads=`` of a verb is for the whole process; sums in float32 depend on it, and other tests compare such sums."""
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else 0
    yield
    if torch:
        torch.set_num_threads(threads)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    began = sum(os.times()[:4])  # of this process and of those it waited for
    item.user_properties.append(("work", lambda: sum(os.times()[:4]) - began))
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    report.user_properties = [(name, value() if callable(value) else value) for name, value in report.user_properties]
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    found = dict(report.user_properties)
    if report.when == "teardown" and "room" in found:
        _spent[str(found["room"])] += float(found["work"])  # type: ignore[arg-type]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for room, seconds in _spent.items():
        terminalreporter.write_line(f"conformance of {room}/: {seconds:.0f} s of {ROOM_BUDGET:.0f} s allowed")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus == 0 and any(seconds > ROOM_BUDGET for seconds in _spent.values()):
        session.exitstatus = 1
