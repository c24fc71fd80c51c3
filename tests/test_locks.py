"""Two programs do not write to one place at once."""

import os
import signal
import time
from pathlib import Path

import pytest

import diffusion_lit
from diffusion_lit.locks import locked
from tests import forked, tiny


def hold(path: Path, ready: Path) -> None:
    with locked(path, "trains"):
        ready.touch()
        time.sleep(60)


def start(tmp_path: Path) -> int:
    ready = tmp_path / "ready"
    child = forked.fork(lambda: hold(tmp_path / "run" / ".lock", ready), tmp_path / "output.txt")
    end = time.monotonic() + 30
    while not ready.exists() and time.monotonic() < end:
        time.sleep(0.01)
    assert ready.exists()
    return child


def test_a_lock_that_another_process_holds_is_refused_by_its_number(tmp_path: Path) -> None:
    child = start(tmp_path)
    with (
        pytest.raises(ValueError, match=rf"process {child} on .* trains there at this moment; wait for it"),
        locked(tmp_path / "run" / ".lock", "trains", patience=0.0),
    ):
        pass
    forked.kill_group(child)


def test_the_death_of_its_holder_frees_a_lock_that_is_waited_for(tmp_path: Path) -> None:
    child = start(tmp_path)
    os.kill(child, signal.SIGKILL)
    with locked(tmp_path / "run" / ".lock", "trains", patience=30.0):
        assert str(os.getpid()) in (tmp_path / "run" / ".lock").read_text()


def test_a_lock_that_is_removed_in_the_end_can_be_taken_again(tmp_path: Path) -> None:
    path = tmp_path / "evaluation" / "key.lock"
    for _ in range(2):
        with locked(path, "evaluates", remove=True):
            assert path.exists()
        assert not path.exists()


def test_a_run_in_a_directory_in_use_is_refused_and_leaves_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusion_lit.trainer.LOCK_PATIENCE", 0.0)
    child = start(tmp_path)
    with pytest.raises(ValueError, match="trains there at this moment"):
        tiny.trainer(tmp_path / "run").fit(tiny.module(), tiny.data())
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    forked.kill_group(child)


def test_the_package_exports_what_a_program_needs() -> None:
    assert sorted(diffusion_lit.__all__) == ["DiffusionModule", "Generator", "System", "load_model"]
    assert all(callable(getattr(diffusion_lit, name)) for name in diffusion_lit.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        _ = diffusion_lit.Trainer
