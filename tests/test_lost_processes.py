"""One of two processes fails or hangs: the other does not wait for it forever, and says what it knows."""

import time
from pathlib import Path

import pytest

from diffusion_lit import cli
from tests import forked, tiny
from tests.test_cli import CPU, QUIET, fit_args

TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.process_timeout", "8"]
RARE = ["--frechet.every_n_steps", "null", "--sample_grid.every_n_steps", "null", "--checkpoints.every_n_steps", "2"]


def overlay(place: Path, rank: int, hangs: bool) -> list[str]:
    text = f"{{class_path: tests.faults.FailsAt, init_args: {{rank: {rank}, step: 3, hangs: {str(hangs).lower()}}}}}"
    place.mkdir(exist_ok=True)
    (place / "fault.yaml").write_text(f"trainer:\n  callbacks: [{text}]\n")
    return ["-c", str(place / "fault.yaml")]


def run_both(args: list[str], output: Path) -> tuple[int, float, list[str]]:
    """Exit code, seconds, and error lines in the order in which they were written."""
    start = time.monotonic()
    code = forked.wait(forked.fork(lambda: forked.in_two(lambda: cli.main(args)), output))
    lines = [line for line in output.read_text().splitlines() if line.startswith("diffusion_lit: error: ")]
    return code, time.monotonic() - start, lines


@pytest.mark.parametrize("rank", [0, 1])
def test_when_one_process_fails_its_own_error_comes_first_and_the_other_ends(tmp_path: Path, rank: int) -> None:
    args = fit_args(tmp_path / "run", *QUIET, *RARE, *overlay(tmp_path, rank, False), max_steps=50)
    code, _, lines = run_both([*args, *CPU, *TWO], tmp_path / "output.txt")
    assert code != 0
    assert lines[0] == f"diffusion_lit: error: rank {rank}: on purpose in process {rank}"
    assert lines[1].startswith(f"diffusion_lit: error: rank {1 - rank}: another process has failed or does not answer")
    assert tiny.load(tiny.last(tmp_path / "run"))["global_step"] in (2, 3)


@pytest.mark.slow
def test_a_process_that_hangs_in_training_is_not_waited_for(tmp_path: Path) -> None:
    args = fit_args(tmp_path / "run", *QUIET, *RARE, *overlay(tmp_path, 1, True), max_steps=50)
    _, _, lines = run_both([*args, *CPU, *TWO], tmp_path / "output.txt")
    assert lines[0].startswith("diffusion_lit: error: rank 0: another process has failed or does not answer")


@pytest.mark.parametrize("hangs", [False, True])
def test_a_process_that_is_lost_at_the_end_of_sampling_is_not_waited_for(tmp_path: Path, hangs: bool) -> None:
    tiny_run = tmp_path / "run"
    child = forked.fork(lambda: cli.main(fit_args(tiny_run, *QUIET, *RARE, max_steps=1)), tmp_path / "first.txt")
    assert forked.wait(child) == 0
    args = ["predict", "--ckpt_path", str(tiny.last(tiny_run)), *overlay(tmp_path, 1, hangs), "--num_images", "4"]
    _, _, lines = run_both([*args, "--batch_size", "2", *QUIET, *CPU, *TWO], tmp_path / "output.txt")
    other = "diffusion_lit: error: rank 0: another process has failed or does not answer"
    own = [] if hangs else ["diffusion_lit: error: rank 1: on purpose in process 1"]
    assert [line[: len(other)] for line in lines] == [*own, other]


def test_a_time_that_is_not_positive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"process_timeout=0 must be above 0"):
        tiny.trainer(tmp_path, process_timeout=0)
