"""Signals to a real process: it stops between two steps with a checkpoint, and goes on as if nothing had happened."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest

from diffusion_lit import cli
from diffusion_lit.callbacks import EMA, Checkpoints, Scalars
from tests import forked, tiny
from tests.test_cli import CPU, QUIET, fit_args

SAME = ("state_dict", "current_model_state", "averages", "optimizer_states", "lr_schedulers", "global_step", "curves")
STEPS = 1_000_000


def start(place: Path, *more: str, steps: int = STEPS, two: bool = False) -> int:
    """A run far too long, which has begun its steps when this returns."""
    place.mkdir(exist_ok=True)
    quick = ["--frechet.every_n_steps", "null", "--sample_grid.every_n_steps", "null", "--trainer.log_every_n_steps"]
    args = fit_args(place, *QUIET, *quick, "1", "--ckpt_path", "last", *more, max_steps=steps)
    devices = ["--trainer.devices", "2", "--trainer.strategy", "ddp"] if two else []

    def run() -> None:
        cli.main([*args, *CPU, *devices])

    return forked.fork((lambda: forked.in_two(run)) if two else run, place / "output.txt")


def wait_for(path: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.01)


@pytest.mark.parametrize("slurm", [False, True])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_a_run_with_a_checkpoint_of_its_last_step(
    tmp_path: Path, signum: signal.Signals, slurm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if slurm:
        for name, value in (("JOB_ID", "7"), ("NTASKS", "1"), ("PROCID", "0"), ("LOCALID", "0"), ("JOB_NAME", "run")):
            monkeypatch.setenv(f"SLURM_{name}", value)
    child = start(tmp_path, "--checkpoints.every_n_steps", "3", "--trainer.accumulate_grad_batches", "2")
    wait_for(tmp_path / "checkpoints" / "previous.ckpt")
    os.kill(child, signum)
    assert forked.wait(child, 30) == 75
    output = (tmp_path / "output.txt").read_text()
    step = tiny.load(tiny.last(tmp_path))["global_step"]
    assert output.rstrip().endswith(f"{signum.name}: stopped after step {step:,}; --ckpt_path last goes on from there")
    assert "Traceback" not in output
    assert {path.suffix for path in (tmp_path / "checkpoints").iterdir()} == {".ckpt"}
    if signum == signal.SIGTERM and not slurm:
        cli.main(fit_args(tmp_path / "whole", *QUIET, *quick(step + 2), max_steps=step + 2))
        again = start(tmp_path, "--trainer.accumulate_grad_batches", "2", steps=step + 2)
        assert forked.wait(again) == 0
        a, b = tiny.load(tiny.last(tmp_path / "whole")), tiny.load(tiny.last(tmp_path))
        assert [name for name in SAME if not tiny.identical(a[name], b[name])] == []


def quick(steps: int) -> list[str]:
    frequencies = ["--frechet.every_n_steps", "null", "--sample_grid.every_n_steps", "null"]
    return [*frequencies, "--trainer.log_every_n_steps", "1", "--trainer.accumulate_grad_batches", "2"]


def test_a_signal_to_one_of_two_processes_ends_both(tmp_path: Path) -> None:
    child = start(tmp_path, "--checkpoints.every_n_steps", "3", two=True)
    wait_for(tmp_path / "checkpoints" / "previous.ckpt")
    [other] = Path(f"/proc/{child}/task/{child}/children").read_text().split()
    os.kill(int(other), signal.SIGTERM)
    assert forked.wait(child, 30) == 75
    step = tiny.load(tiny.last(tmp_path))["global_step"]
    assert f"SIGTERM: stopped after step {step:,}" in (tmp_path / "output.txt").read_text()


class Signal(L.Callback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, signum: signal.Signals, at_step: int, times: int = 1) -> None:
        self.signum = signum
        self.at_step = at_step
        self.times = times

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == self.at_step:
            for _ in range(self.times):
                os.kill(os.getpid(), self.signum)


@pytest.mark.parametrize(("times", "steps"), [(1, 3), (2, 2)])
def test_ctrl_c_finishes_the_step_and_a_second_one_does_not(tmp_path: Path, times: int, steps: int) -> None:
    callbacks: list[Any] = [EMA([0.9]), Scalars(), Signal(signal.SIGINT, 2, times), Checkpoints()]
    with pytest.raises(SystemExit):
        tiny.trainer(tmp_path, 9, callbacks).fit(tiny.module(), tiny.data())
    assert tiny.load(tiny.last(tmp_path))["global_step"] == steps


def test_handlers_are_as_before_once_training_has_ended(tmp_path: Path) -> None:
    before = [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    tiny.trainer(tmp_path, 1).fit(tiny.module(), tiny.data())
    assert [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before


@pytest.mark.parametrize("command", ["test", "predict"])
def test_what_does_not_train_ends_at_once(tmp_path: Path, command: str) -> None:
    first = forked.fork(lambda: cli.main(fit_args(tmp_path, *QUIET, *quick(1), max_steps=1)), tmp_path / "first.txt")
    assert forked.wait(first) == 0
    many = ["--evaluation.num_images", "100000"] if command == "test" else ["--num_images", "100000"]
    args = [command, "--ckpt_path", str(tiny.last(tmp_path)), *many, *QUIET, *CPU]
    child = forked.fork(lambda: cli.main(args), tmp_path / "second.txt")
    wait_for(tmp_path / ("evaluation" if command == "test" else "predictions/last_seed_0/000000.png"))
    os.kill(child, signal.SIGTERM)
    assert forked.wait(child, 30) == 75
    said = (tmp_path / "second.txt").read_text()
    assert said.rstrip().endswith("diffusion_lit: SIGTERM: stopped; the same command goes on, or does it again")
    assert "Traceback" not in said
