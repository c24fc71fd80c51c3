"""What a run shows of itself, with a bar and without."""

import re
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import TQDMProgressBar

from diffusion_lit.callbacks import Checkpoints, ProgressBar, Report, Scalars
from diffusion_lit.main import main
from tests import tiny


def train(run: Path, steps: int, *callbacks: Any, resume: bool = False, **kwargs: Any) -> Any:
    trainer = tiny.trainer(run, steps, callbacks=[Scalars(), *callbacks, Checkpoints()], **kwargs)
    trainer.fit(tiny.module(), tiny.data(), ckpt_path="last" if resume else None)
    return trainer


def test_the_bar_of_a_resumed_run_goes_on_where_it_was_and_knows_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, 3, ProgressBar(1), enable_progress_bar=True)
    first = re.findall(r"\| (\d+)/(\S+) \[", capsys.readouterr().out)
    assert next(count for count in first if count[1] != "?") == ("0", "3")
    bar = ProgressBar(1)
    train(tmp_path, 5, bar, resume=True, enable_progress_bar=True)
    shown = re.findall(r"\| (\d+)/(\S+) \[", capsys.readouterr().out)
    assert list(dict.fromkeys(shown))[1:] == [("3", "5"), ("4", "5"), ("5", "5")]
    # The rate is that of these two steps, not of five.
    assert bar.train_progress_bar.initial == 3


def test_the_bar_counts_steps_and_not_batches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, 2, ProgressBar(1), enable_progress_bar=True, accumulate_grad_batches=2)
    shown = re.findall(r"\| (\d+)/(\S+) \[", capsys.readouterr().out)
    assert list(dict.fromkeys(shown))[1:] == [("0", "2"), ("1", "2"), ("2", "2")]


def test_a_run_without_a_bar_says_how_far_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path, 2, Report(0))
    caplog.clear()
    with caplog.at_level("INFO"):
        train(tmp_path, 4, Report(0), resume=True)
    lines = [record.getMessage() for record in caplog.records]
    parameters = sum(p.numel() for p in tiny.module().parameters())
    assert f"training DiffusionModule, {parameters:,} parameters, from step 2 to step 4" in lines
    said = [line for line in lines if line.startswith("step ")]
    assert [line.partition(":")[0] for line in said] == ["step 3 of 4", "step 4 of 4"]
    assert all(re.fullmatch(r"step . of 4: loss [\d.]+, [\d.e+]+ steps/s, \d\d:\d\d left", line) for line in said)


def test_beside_a_bar_only_the_start_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        train(tmp_path, 2, Report(0), ProgressBar(), enable_progress_bar=True)
    said = [m for m in (record.getMessage() for record in caplog.records) if m.startswith(("step ", "training "))]
    assert [line.split()[0] for line in said] == ["training"]


def test_a_bar_that_the_user_chooses_replaces_the_package_s(tmp_path: Path) -> None:
    other = TQDMProgressBar()
    trainer = tiny.trainer(tmp_path, callbacks=[ProgressBar(), other], enable_progress_bar=True)
    assert trainer.progress_bar_callback is other


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (["ModelCheckpoint", "--trainer.callbacks.save_top_k", "-7"], "Invalid value for save_top_k=-7. Must be >= -1"),
        (["Timer", "--trainer.callbacks.interval", "century"], "Unsupported parameter value `Timer(interval=century)`"),
    ],
)
def test_an_error_of_a_chosen_callback_is_its_own(
    chosen: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "-c", "digits", "--trainer.accelerator", "cpu", "--trainer.callbacks", *chosen])
    assert f"error: {message}" in capsys.readouterr().err
