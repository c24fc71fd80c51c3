"""What tests share. The environment is set before torch is imported, and child processes inherit it."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["WANDB_MODE"] = "disabled"
# LightningCLI 2.6 calls what jsonargparse 4.5x deprecates.
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"

from collections import defaultdict
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch

from tests import forked

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the cases of a test that is marked `few(n)`, all but n, evenly spread, are further ones."""
    tests: defaultdict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("few") and not item.get_closest_marker("slow"):
            tests[item.nodeid.partition("[")[0]].append(item)
    for cases in tests.values():
        mark = cases[0].get_closest_marker("few")
        count = mark.args[0] if mark else 0
        quick = [cases[len(cases) * i // count] for i in range(count)]
        for case in cases:
            if case not in quick:
                case.add_marker(pytest.mark.further)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Names of files that are not UTF-8 may stand in the output of a test, and xdist's workers send it as UTF-8."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(scope="session", autouse=True)
def fork_server() -> Iterator[None]:
    """Ends before the coverage of lines is added up."""
    yield
    forked.end_server()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing a test does may be written into the working directory or the user's cache."""
    place = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.setenv("DIFFUSION_LIT_CACHE", str(place / "cache"))
    monkeypatch.chdir(place)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the working tree."""
    return Path(__file__).parent.parent
