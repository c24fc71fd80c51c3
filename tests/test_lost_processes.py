"""One of two processes fails or hangs: the other does not wait for it forever, and says what it knows."""

import os
from pathlib import Path
from typing import Any

import pytest

from diffusion_lit.callbacks import EMA, Checkpoints, Scalars
from tests import forked, tiny
from tests.faults import FailsAt
from tests.tiny import identical

RARE = ["--evaluation.every_n_steps", "null", "--sample_grid.every_n_steps", "null", "--checkpoints.every_n_steps", "2"]
TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.process_timeout", "8"]


def trainer(place: Path, steps: int, *faults: FailsAt, timeout: float = 8) -> Any:
    callbacks = [EMA([0.9]), Scalars(), *faults, Checkpoints(10)]
    return tiny.trainer(place, steps, callbacks, devices=2, strategy="ddp", process_timeout=timeout)


def run_in_two(place: Path, *faults: FailsAt, pair: bool = False, patience: float = 60) -> list[str]:
    """Trains in two processes, of which one fails; returns the error of each, empty where there was none."""

    def run() -> None:
        try:
            trainer(place / "run", 6, *faults).fit(tiny.Pair() if pair else tiny.module(), tiny.data())
        except Exception as error:
            (place / os.environ["RANK"]).write_text(f"{type(error).__name__}: {error}")
            raise

    place.mkdir(exist_ok=True)
    code = forked.wait(forked.fork(lambda: forked.in_two(run, patience), place / "output.txt"))
    assert code != 0
    return [path.read_text() if path.exists() else "" for path in (place / "0", place / "1")]


@pytest.mark.few(1)
@pytest.mark.parametrize(("rank", "kept", "pair"), [(1, 3, True), (0, None, False)])
def test_when_one_process_fails_the_other_ends_and_the_first_keeps_its_newest_whole_step(
    tmp_path: Path, rank: int, kept: int | None, pair: bool
) -> None:
    errors = run_in_two(tmp_path, FailsAt(rank, 3), pair=pair)
    assert errors[rank] == f"ValueError: on purpose in process {rank}"
    assert errors[1 - rank] != ""
    assert "on purpose" not in errors[1 - rank]
    last = tiny.last(tmp_path / "run")
    assert (tiny.load(last)["global_step"] if last.exists() else None) == kept


def test_what_the_first_process_kept_alone_continues_to_the_same_weights(tmp_path: Path) -> None:
    run_in_two(tmp_path, FailsAt(1, 3), pair=True)

    def go(place: Path) -> None:
        trainer(place, 6).fit(tiny.Pair(), tiny.data(), ckpt_path="last")

    for place in (tmp_path / "whole", tmp_path / "run"):
        child = forked.fork(lambda: forked.in_two(lambda: go(place)), tmp_path / "continued.txt")  # noqa: B023
        assert forked.wait(child) == 0, (tmp_path / "continued.txt").read_text()
    whole, parts = (tiny.load(tiny.last(tmp_path / name)) for name in ("whole", "run"))
    for name in ("state_dict", "current_model_state", "averages", "optimizer_states", "lr_schedulers"):
        assert identical(whole[name], parts[name])


@pytest.mark.slow
def test_a_process_that_hangs_in_training_is_not_waited_for(tmp_path: Path) -> None:
    errors = run_in_two(tmp_path, FailsAt(1, 3, hangs=True), patience=1)
    assert errors[0] != ""
    assert errors[1] == ""


# By the command line


def overlay(place: Path, rank: int, hangs: bool) -> list[str]:
    text = f"{{class_path: tests.faults.FailsAt, init_args: {{rank: {rank}, step: 3, hangs: {str(hangs).lower()}}}}}"
    place.mkdir(exist_ok=True)
    (place / "fault.yaml").write_text(f"trainer:\n  callbacks: [{text}]\n")
    return ["-c", str(place / "fault.yaml"), "--trust", "tests.faults"]


def run_both(args: list[str], output: Path, patience: float = 60) -> tuple[int, list[str]]:
    """Exit code, and error lines in the order in which they were written."""
    from diffusion_lit import cli

    code = forked.wait(forked.fork(lambda: forked.in_two(lambda: cli.main(args), patience), output))
    lines = [line for line in output.read_text().splitlines() if line.startswith("diffusion_lit: error: ")]
    return code, lines


@pytest.mark.further
@pytest.mark.parametrize("rank", [0, 1])
def test_when_one_process_fails_its_own_error_comes_first(tmp_path: Path, rank: int) -> None:
    from tests.test_cli import CPU, QUIET, fit_args

    args = fit_args(tmp_path / "run", *QUIET, *RARE, *overlay(tmp_path, rank, False), max_steps=50)
    code, lines = run_both([*args, *CPU, *TWO], tmp_path / "output.txt")
    assert code != 0
    assert lines[0] == f"diffusion_lit: error: rank {rank}: on purpose in process {rank}"
    assert lines[1].startswith(f"diffusion_lit: error: rank {1 - rank}: another process has failed or does not answer")


@pytest.mark.few(1)
@pytest.mark.parametrize("hangs", [False, True])
def test_a_process_that_is_lost_at_the_end_of_sampling_is_not_waited_for(tmp_path: Path, hangs: bool) -> None:
    from diffusion_lit import cli
    from tests.test_cli import CPU, QUIET, fit_args

    run_dir = tmp_path / "run"
    child = forked.fork(lambda: cli.main(fit_args(run_dir, *QUIET, *RARE, max_steps=1)), tmp_path / "first.txt")
    assert forked.wait(child) == 0
    args = ["predict", "--ckpt_path", str(tiny.last(run_dir)), *overlay(tmp_path, 1, hangs), "--num_images", "4"]
    patience = 1 if hangs else 60
    _, lines = run_both([*args, "--batch_size", "2", *QUIET, *CPU, *TWO], tmp_path / "output.txt", patience)
    other = "diffusion_lit: error: rank 0: another process has failed or does not answer"
    own = [] if hangs else ["diffusion_lit: error: rank 1: on purpose in process 1"]
    assert [line[: len(other)] for line in lines] == [*own, other]


def test_a_time_that_is_not_positive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"process_timeout=0 must be above 0"):
        tiny.trainer(tmp_path, process_timeout=0)
