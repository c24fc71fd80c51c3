"""Weights & Biases: online only where that can work, and never in the way."""

import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb

from diffusion_lit.callbacks import EMA, Checkpoints, SampleGrid, Scalars
from diffusion_lit.diffusion import DDIM
from diffusion_lit.images import save_png
from diffusion_lit.loggers import WandB, why_offline
from tests import tiny


@pytest.fixture
def logged_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user without a key, at home nowhere."""
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb"))


def test_a_user_who_is_not_logged_in_stays_offline(logged_out: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        reason = why_offline()
    assert reason is not None
    assert "wandb login" in reason


def test_a_server_that_does_not_answer_means_offline_within_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    start = time.perf_counter()
    reason = why_offline(timeout=1)
    assert time.perf_counter() - start < 5
    assert reason == "127.0.0.1 does not answer"


def test_the_environment_s_mode_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    for mode in ("offline", "disabled"):
        monkeypatch.setenv("WANDB_MODE", mode)
        assert why_offline() == f"WANDB_MODE={mode}"


def test_an_offline_run_is_kept_in_the_run_s_directory(logged_out: None, tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "mine"
    logger = WandB(str(run_dir))
    grid = SampleGrid(every_n_steps=1, num_images=1, batch_size=1, sampler=DDIM(1))
    callbacks = [EMA(), grid, Scalars(), Checkpoints()]
    tiny.trainer(run_dir, 2, callbacks, logger=logger).fit(tiny.module(), tiny.data())
    assert logger.experiment.settings._offline
    assert logger.experiment.name == "mine"
    logger.experiment.finish()
    [kept] = (run_dir / "wandb").glob("offline-run-*")
    assert list(kept.glob("*.wandb"))
    assert len(list(kept.glob("files/media/images/*.png"))) == 2


def test_what_cannot_be_started_is_switched_off_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = wandb.init

    def init(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("mode") != "disabled":
            raise wandb.errors.CommError("no answer")
        return real(*args, **kwargs)

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = WandB(str(tmp_path / "run"))
    with pytest.warns(UserWarning, match="W&B is switched off: CommError: no answer"):
        logger.log_metrics({"train/loss": 1.0}, step=1)
    tiny.trainer(tmp_path / "run", 1, [EMA(), Scalars()], logger=logger).fit(tiny.module(), tiny.data())


def test_an_error_while_logging_does_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = WandB(str(tmp_path / "run"))
    save_png(torch.zeros(1, 4, 4, dtype=torch.uint8), tmp_path / "a.png")

    def fails(*_: object, **__: object) -> None:
        raise wandb.errors.UsageError("gone")

    monkeypatch.setattr(type(logger.experiment), "log", fails)
    with pytest.warns(UserWarning, match="W&B: UsageError: gone"):
        logger.log_metrics({"train/loss": 1.0}, step=1)
    logger.log_metrics({"train/loss": 1.0}, step=2)
    logger.log_image("samples", [str(tmp_path / "a.png")], step=2)


def test_a_second_run_in_one_process_is_a_run_of_its_own(tmp_path: Path) -> None:
    first, second = WandB(str(tmp_path / "a")), WandB(str(tmp_path / "b"))
    assert first.experiment is not second.experiment
