"""Weights & Biases: online only where that can work, never in the way, and one run for one run."""

import socket
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch

from diffusion_lit.callbacks import EMA, Checkpoints, SampleGrid, Scalars
from diffusion_lit.diffusion import DDIM
from diffusion_lit.images import save_png
from diffusion_lit.loggers import WandB, log_hyperparams, logger_state, resume_loggers, why_offline
from tests import tiny

VARIABLES = ("MODE", "API_KEY", "PROJECT", "NAME", "ENTITY", "RUN_ID", "BASE_URL", "TAGS", "RUN_GROUP")


@pytest.fixture
def logged_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user without a key, whose home is empty."""
    for name in VARIABLES:
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb"))


def offline_runs(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "wandb").glob("offline-run-*"))


# Where it runs


def test_a_user_who_is_not_logged_in_stays_offline(logged_out: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        reason = why_offline()
    assert reason is not None
    assert "wandb login" in reason


def test_a_server_that_does_not_answer_means_offline(logged_out: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert why_offline(timeout=1) == "127.0.0.1 does not answer"


def test_the_environment_s_mode_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    for mode in ("offline", "disabled"):
        monkeypatch.setenv("WANDB_MODE", mode)
        assert why_offline() == f"WANDB_MODE={mode}"


@pytest.mark.parametrize("options", [{"mode": "offline"}, {"offline": True}])
def test_an_option_wins_over_the_environment_s_mode(
    logged_out: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    logger = WandB(str(tmp_path / "run"), **options)
    logger.start()
    assert logger.experiment.offline
    logger.experiment.finish()


# What it is given


def test_a_run_gets_scalars_pictures_the_configuration_and_wandb_s_own_options(
    logged_out: None, tmp_path: Path
) -> None:
    run_dir = tmp_path / "runs" / "mine"
    logger = WandB(entity="team", tags=["a", "b"], group="g", job_type="train", notes="n", prefix="p", save_code=False)
    grid = SampleGrid(every_n_steps=1, num_images=1, batch_size=1, sampler=DDIM(1))
    trainer = tiny.trainer(run_dir, 2, [EMA(), grid, Scalars(), Checkpoints()], logger=logger)
    trainer.fit(tiny.module(), tiny.data())
    log_hyperparams(trainer, {"ema": {"decays": [0.9, 0.5]}})
    run = logger.experiment
    assert (run.offline, run.name, run.project) == (True, "mine", "diffusion_lit")
    assert (run.entity, run.tags, run.group, run.job_type, run.notes) == ("team", ("a", "b"), "g", "train", "n")
    assert run.config["ema"] == {"decays": [0.9, 0.5]}
    assert "p-train/loss" in dict(run.summary)
    run.finish()
    [kept] = offline_runs(run_dir)
    assert list(kept.glob("*.wandb"))
    assert len(list(kept.glob("files/media/images/*.png"))) == 2


def test_the_environment_s_names_win_over_our_defaults_and_options_over_both(
    logged_out: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"PROJECT": "theirs", "NAME": "called", "ENTITY": "team", "RUN_ID": "abc"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    first = WandB(str(tmp_path / "a"))
    first.start()
    run = first.experiment
    assert (run.project, run.name, run.entity, run.id) == ("theirs", "called", "team", "abc")
    run.finish()
    second = WandB(str(tmp_path / "b"), project="ours", name="mine", entity="us", id="xyz")
    second.start()
    run = second.experiment
    assert (run.project, run.name, run.entity, run.id) == ("ours", "mine", "us", "xyz")
    run.finish()


def test_checkpoints_are_not_uploaded_and_who_asks_for_it_is_told() -> None:
    with pytest.raises(ValueError, match="log_model=True: checkpoints are not uploaded"):
        WandB(log_model=True)


# When it starts, and which run it is


def test_a_start_that_is_refused_leaves_no_run_behind(logged_out: None, tmp_path: Path) -> None:
    class Refuses(L.Callback):
        def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            raise ValueError("refused")

    logger = WandB()
    with pytest.raises(ValueError, match="refused"):
        tiny.trainer(tmp_path, 1, [Scalars(), Refuses()], logger=logger).fit(tiny.module(), tiny.data())
    assert logger.id is None
    assert not (tmp_path / "wandb").exists()
    logger.experiment.log({"nothing": 1})


def test_a_resumed_run_is_the_same_w_and_b_run(logged_out: None, tmp_path: Path) -> None:
    first = WandB()
    tiny.trainer(tmp_path, 1, logger=first).fit(tiny.module(), tiny.data())
    first.experiment.finish()
    assert tiny.load(tiny.last(tmp_path))["wandb"] == first.id
    again = WandB()
    tiny.trainer(tmp_path, 2, logger=again).fit(tiny.module(), tiny.data(), ckpt_path="last")
    again.experiment.finish()
    assert again.id == again.experiment.id == first.id
    assert len(offline_runs(tmp_path)) == 2
    assert all(f"-{first.id}" in path.name for path in offline_runs(tmp_path))


def test_an_id_that_the_user_gives_wins_over_the_checkpoint_s(tmp_path: Path) -> None:
    for given, expected in (("mine", "mine"), (None, "kept")):
        trainer = tiny.trainer(tmp_path, logger=WandB(id=given))
        resume_loggers(trainer, 3, {"wandb": "kept"})
        assert logger_state(trainer) == {"wandb": expected}


def test_a_disabled_run_has_no_id_to_keep(tmp_path: Path) -> None:
    logger = WandB(str(tmp_path), mode="disabled")
    trainer = tiny.trainer(tmp_path, logger=logger)
    logger.start()
    assert logger_state(trainer) == {}
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_in_one_process_is_a_run_of_its_own(tmp_path: Path) -> None:
    first, second = WandB(str(tmp_path / "a")), WandB(str(tmp_path / "b"))
    for logger in (first, second):
        logger.log_metrics({"loss": 1.0}, 1)
    assert first.experiment is not second.experiment


# What goes wrong


def test_what_cannot_be_started_is_switched_off_with_a_warning(logged_out: None, tmp_path: Path) -> None:
    logger = WandB(project="a/project/has/no/slashes", mode="offline")
    with pytest.warns(UserWarning, match="W&B is switched off: UsageError: Invalid project name"):
        tiny.trainer(tmp_path / "run", 1, logger=logger).fit(tiny.module(), tiny.data())
    assert logger.experiment.disabled


def test_an_empty_mode_in_the_environment_is_none(
    logged_out: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "")
    logger = WandB(str(tmp_path))
    logger.log_metrics({"loss": 1.0}, 1)
    assert not logger.experiment.disabled
    logger.experiment.finish()


def test_where_there_is_no_place_for_its_files_it_is_switched_off(logged_out: None, tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    logger = WandB(str(tmp_path / "run"), mode="offline")
    with pytest.warns(UserWarning, match="W&B is switched off: FileExistsError"):
        logger.log_metrics({"train/loss": 1.0}, 1)


def test_an_error_while_logging_is_one_warning_and_does_not_end_a_run(logged_out: None, tmp_path: Path) -> None:
    logger = WandB(str(tmp_path / "run"), mode="offline")
    save_png(torch.zeros(1, 4, 4, dtype=torch.uint8), tmp_path / "a.png")
    logger.start()
    logger.experiment.finish()
    with pytest.warns(UserWarning, match=r"W&B: UsageError: .* is finished"):
        logger.log_metrics({"train/loss": 1.0}, step=1)
    logger.log_metrics({"train/loss": 1.0}, step=2)
    logger.log_image("samples", [str(tmp_path / "a.png")], step=2)
