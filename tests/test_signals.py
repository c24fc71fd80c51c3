"""Signals to a real process: it stops between two steps with a checkpoint, and continues as if nothing had happened."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest

from diffusion_lit.callbacks import EMA, Checkpoints, Scalars
from diffusion_lit.callbacks.signals import Stopped
from diffusion_lit.evaluation import Evaluation
from diffusion_lit.metrics import Pixels
from tests import forked, tiny

SAME = ("state_dict", "current_model_state", "averages", "optimizer_states", "lr_schedulers", "global_step", "curves")
STEPS = 1_000_000


def fit(place: Path, steps: int = STEPS, two: bool = False) -> None:
    """Trains, and prints why it was stopped."""
    callbacks: list[L.Callback] = [EMA([0.9]), Scalars(), Checkpoints(3)]
    settings: dict[str, Any] = {"devices": 2, "strategy": "ddp"} if two else {}
    trainer = tiny.trainer(place, steps, callbacks, accumulate_grad_batches=2, **settings)
    try:
        trainer.fit(tiny.module(), tiny.data(), ckpt_path="last")
    except Stopped as stopped:
        print(stopped)
        raise


def start(place: Path, steps: int = STEPS, two: bool = False) -> int:
    """Starts a run, by default one that does not end."""
    place.mkdir(exist_ok=True)

    def run() -> None:
        fit(place, steps, two)

    return forked.fork((lambda: forked.in_two(run)) if two else run, place / "output.txt")


def wait_for(path: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.01)


@pytest.mark.few(1)
@pytest.mark.parametrize("slurm", [False, True])
@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)],
)
def test_a_signal_ends_a_run_with_a_checkpoint_of_its_last_step(
    tmp_path: Path, signum: signal.Signals, code: int, slurm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if slurm:
        for name, value in (("JOB_ID", "7"), ("NTASKS", "1"), ("PROCID", "0"), ("LOCALID", "0"), ("JOB_NAME", "run")):
            monkeypatch.setenv(f"SLURM_{name}", value)
    child = start(tmp_path)
    wait_for(tmp_path / "checkpoints" / "previous.ckpt")
    os.kill(child, signum)
    assert forked.wait(child, 30) == code
    output = (tmp_path / "output.txt").read_text()
    step = tiny.load(tiny.last(tmp_path))["global_step"]
    expected = f"{signum.name}: stopped after step {step:,}; --ckpt_path last continues from there"
    assert output.rstrip().endswith(expected)
    assert "Traceback" not in output
    assert {path.suffix for path in (tmp_path / "checkpoints").iterdir()} == {".ckpt"}
    if not slurm:
        fit(tmp_path / "whole", step + 2)
        assert forked.wait(start(tmp_path, step + 2)) == 0
        a, b = tiny.load(tiny.last(tmp_path / "whole")), tiny.load(tiny.last(tmp_path))
        assert [name for name in SAME if not tiny.identical(a[name], b[name])] == []


def test_a_signal_to_one_of_two_processes_ends_both(tmp_path: Path) -> None:
    child = start(tmp_path, two=True)
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


def test_ctrl_c_finishes_the_step_and_keeps_it(tmp_path: Path) -> None:
    callbacks: list[Any] = [EMA([0.9]), Scalars(), Signal(signal.SIGINT, 2), Checkpoints()]
    with pytest.raises(Stopped) as stopped:
        tiny.trainer(tmp_path, 9, callbacks).fit(tiny.module(), tiny.data())
    assert stopped.value.code == 130
    assert str(stopped.value) == "SIGINT: stopped after step 3; --ckpt_path last continues from there"
    assert tiny.load(tiny.last(tmp_path))["global_step"] == 3


def test_a_second_ctrl_c_ends_a_run_at_once_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    callbacks: list[Any] = [EMA([0.9]), Scalars(), Signal(signal.SIGINT, 3, times=2), Checkpoints(2)]
    with pytest.raises(SystemExit) as end:
        tiny.trainer(tmp_path, 9, callbacks).fit(tiny.module(), tiny.data())
    assert not isinstance(end.value, Stopped)
    assert end.value.code == 1
    assert tiny.load(tiny.last(tmp_path))["global_step"] == 2


def test_handlers_are_as_before_once_training_has_ended(tmp_path: Path) -> None:
    before = [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    tiny.trainer(tmp_path, 1).fit(tiny.module(), tiny.data())
    assert [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before


@pytest.mark.parametrize("command", ["test", "predict"])
def test_what_does_not_train_ends_at_once(tmp_path: Path, command: str) -> None:
    def run() -> None:
        evaluation = Evaluation(None, Pixels(2), num_images=100_000, batch_size=4)
        trainer = tiny.trainer(tmp_path, callbacks=[evaluation], logger=False, limit_test_batches=1)
        try:
            if command == "test":
                trainer.test(tiny.module(), tiny.data())
            else:
                trainer.predict(tiny.module(), num_images=100_000, batch_size=4)
        except Stopped as stopped:
            print(stopped)
            raise

    child = forked.fork(run, tmp_path / "output.txt")
    wait_for(tmp_path / ("evaluation" if command == "test" else "predictions/seed_0/000000.png"))
    os.kill(child, signal.SIGTERM)
    assert forked.wait(child, 30) == 75
    output = (tmp_path / "output.txt").read_text()
    assert "SIGTERM: stopped; the same command continues, or starts again" in output.splitlines()
    assert "Traceback" not in output


def test_the_command_line_says_where_it_stopped(tmp_path: Path) -> None:
    from diffusion_lit import cli
    from tests.test_cli import CPU, QUIET, fit_args
    from tests.test_lost_processes import RARE

    args = fit_args(tmp_path / "run", *QUIET, *RARE, *CPU, max_steps=STEPS)
    child = forked.fork(lambda: cli.main(args), tmp_path / "output.txt")
    wait_for(tmp_path / "run" / "checkpoints" / "previous.ckpt")
    os.kill(child, signal.SIGINT)
    assert forked.wait(child, 30) == 130
    step = tiny.load(tiny.last(tmp_path / "run"))["global_step"]
    output = (tmp_path / "output.txt").read_text()
    assert output.rstrip().endswith(f"SIGINT: stopped after step {step:,}; --ckpt_path last continues from there")
    assert "Traceback" not in output
