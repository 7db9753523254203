"""Fixtures that several rooms share."""

from __future__ import annotations

import logging
import signal
from collections.abc import Generator, Iterator

import pytest
import torch

from tests.support.lab import Lab
from training.distributed.signals import SIGNALS

# Files whose tests wait for processes, for a minute or more in all: they begin first, so that none is the last.
LONGEST = (
    "tests/device/test_runs.py",
    "tests/checkpoint/test_kill.py",
    "tests/slurm/test_slurm.py",
    "tests/project/test_benchmarks.py",
    "tests/project/test_study.py",
    "tests/test_main.py",
    "tests/project/test_examples.py",
    "tests/checkpoint/test_continuity.py",
    "tests/cache/test_views.py",
    "tests/config/test_flag_effects.py",
    "tests/distributed/test_powersgd.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(places)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Reports travel between pytest's processes as UTF-8, and tests log names that are not."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """A run that fails ignores signals from then on, since it is about to end."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _log_streams() -> Iterator[None]:
    """open_clip logs through ``logging.warning``, which gives the root a handler for the stderr of that moment."""
    root = logging.getLogger()
    yield
    for handler in [handler for handler in root.handlers if type(handler) is logging.StreamHandler]:
        root.removeHandler(handler)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Sums that do not depend on how many cores are idle, and small runs that do not wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def lab(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Small data and models for commands, and the runs of these commands."""
    return Lab(tmp_path_factory.mktemp("lab"))
