"""Processes that tests start: they can train, whatever has run in pytest's own process, and none is left over."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests import fork_server, forked


def differentiate() -> None:
    torch.ones(2, requires_grad=True).square().sum().backward()  # type: ignore[no-untyped-call]


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended but was not waited for does not."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def test_a_child_differentiates_after_fake_tensors_and_gradients_in_this_process(tmp_path: Path) -> None:
    """After a first backward that follows FakeTensorMode, a child forked from this process itself cannot."""
    with FakeTensorMode():
        torch.ones(2)
    differentiate()
    assert forked.wait(forked.fork(differentiate, tmp_path / "output.txt")) == 0, (tmp_path / "output.txt").read_text()


@pytest.mark.parametrize(
    ("statement", "code"),
    [("None", 0), ("sys.exit()", 0), ("sys.exit(75)", 75), ("sys.exit('text')", 1), ("1 / 0", fork_server.CRASHED)],
)
def test_a_child_exits_with_the_code_of_its_function_and_its_output_is_kept(
    tmp_path: Path, statement: str, code: int
) -> None:
    def run() -> None:
        print("printed")
        os.write(2, b"written\n")
        exec(f"import sys\n{statement}")

    assert forked.wait(forked.fork(run, tmp_path / "output.txt")) == code
    output = (tmp_path / "output.txt").read_text()
    assert output.startswith("printed\nwritten\n")
    assert ("ZeroDivisionError" in output) == (statement == "1 / 0")


def test_a_child_has_the_environment_and_the_folder_of_the_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> None:
        Path("here.json").write_text(json.dumps(dict(os.environ)))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADDED", "1")
    monkeypatch.delenv("HOME", raising=False)
    assert forked.wait(forked.fork(run, tmp_path / "output.txt")) == 0
    assert json.loads((tmp_path / "here.json").read_text()) == dict(os.environ)


def test_a_child_that_does_not_end_is_killed_with_all_that_it_has_started(tmp_path: Path) -> None:
    def run() -> None:
        started = os.fork()
        if started:
            (tmp_path / "started").write_text(str(started))
        time.sleep(3600)

    child = forked.fork(run, tmp_path / "output.txt")
    with pytest.raises(TimeoutError, match=r"did not end within 0\.5 s"):
        forked.wait(child, 0.5)
    end = time.monotonic() + 10
    while alive(int((tmp_path / "started").read_text())) and time.monotonic() < end:
        time.sleep(0.01)
    assert not alive(int((tmp_path / "started").read_text()))
    assert not alive(child)


def test_two_processes_find_each_other_and_a_failure_of_the_second_is_one_of_the_first(tmp_path: Path) -> None:
    def run(failing: int | None) -> None:
        torch.distributed.init_process_group("gloo")
        total = torch.tensor(torch.distributed.get_rank() + 1)
        torch.distributed.all_reduce(total)
        (tmp_path / str(torch.distributed.get_rank())).write_text(str(total.item()))
        if torch.distributed.get_rank() == failing:
            raise ValueError("on purpose")

    for failing, code in ((None, 0), (0, fork_server.CRASHED), (1, fork_server.CRASHED)):
        child = forked.fork(lambda: forked.in_two(lambda: run(failing)), tmp_path / "output.txt")  # noqa: B023
        assert forked.wait(child) == code, (tmp_path / "output.txt").read_text()
        assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == ["3", "3"]


def test_a_process_is_killed_before_the_file_operation_of_a_given_number(tmp_path: Path) -> None:
    sizes: list[int] = []
    for at in (None, 1, 2, 3, 4):
        place = tmp_path / str(at)
        place.mkdir()

        def run() -> None:
            operations = forked.FileOperations(place, at)  # noqa: B023
            (place / "first").touch()  # noqa: B023
            with (place / "second").open("wb", buffering=0) as file:  # noqa: B023
                torch.save({"weight": torch.ones(1000)}, file)
            (tmp_path / "count").write_text(str(operations.count))

        code = forked.wait(forked.fork(run, tmp_path / "output.txt"))
        assert code == (0 if at is None else -signal.SIGKILL), (tmp_path / "output.txt").read_text()
        sizes.append(sum(path.stat().st_size + 1 for path in place.iterdir()))
    # Two files are opened; `torch.save` writes the second in parts.
    assert int((tmp_path / "count").read_text()) > 4
    assert sizes[1:3] == [0, 1]
    assert sizes[2] < sizes[3] < sizes[4] < sizes[0]
