"""Loggers: curves that are exact whatever happens, and Lightning's loggers by their names alone."""

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import yaml
from lightning.pytorch.loggers import Logger, MLFlowLogger

from diffusion_lit import cli
from diffusion_lit.configuration import build
from diffusion_lit.images import save_png
from diffusion_lit.loggers import (
    METRICS,
    Curves,
    WandB,
    bind_loggers,
    clear_save_dir,
    fill_save_dir,
    log_hyperparams,
    log_image,
    log_metrics,
    logger_state,
    read_curves,
    resume_loggers,
)
from diffusion_lit.loggers.directories import _places
from tests import tiny

CONFIG = {"model": {"class_path": "DiffusionModule", "init_args": {"seed": 3}}, "ema": {"decays": [0.9, 0.5]}}


# Curves


def test_a_line_holds_the_step_and_every_value_also_what_is_not_finite(tmp_path: Path) -> None:
    logger = Curves(str(tmp_path))
    values = {"loss": torch.tensor(0.5), "norm": math.nan, "up": math.inf, "down": -math.inf, "count": 3, "epoch": 1}
    logger.log_metrics(values, 7)
    logger.log_metrics({"loss": 0.25}, 8)
    logger.finalize("success")
    first, second = (tmp_path / METRICS).read_text().splitlines()
    expected = {"step": 7, "loss": 0.5, "norm": "nan", "up": "inf", "down": "-inf", "count": 3.0}
    assert json.loads(first, parse_constant=pytest.fail) == expected
    assert json.loads(second) == {"step": 8, "loss": 0.25}
    curves = read_curves(tmp_path)
    assert curves["loss"] == [(7, 0.5), (8, 0.25)]
    assert curves["up"] == [(7, math.inf)]
    assert curves["down"] == [(7, -math.inf)]
    assert math.isnan(curves["norm"][0][1])
    assert "epoch" not in curves


def test_lines_reach_the_disk_by_steps_passed_also_where_no_value_falls_on_a_multiple(tmp_path: Path) -> None:
    logger = Curves(str(tmp_path), flush_every_n_steps=100)
    written = []
    for step in range(30, 330, 30):
        logger.log_metrics({"loss": 1.0}, step)
        written.append(len(read_curves(tmp_path).get("loss", [])))
    assert written == [0, 0, 0, 4, 4, 4, 4, 8, 8, 8]
    assert logger.lines == 10
    with pytest.raises(ValueError, match="flush_every_n_steps=0 must be at least 1"):
        Curves(flush_every_n_steps=0)


def log(logger: Curves, steps: range) -> None:
    for step in steps:
        logger.log_metrics({"loss": 1 / step}, step)
        if step % 3 == 0:
            logger.log_metrics({"fid": float(step)}, step)


@pytest.mark.parametrize("known", [True, False])
def test_a_run_killed_after_any_byte_continues_to_the_file_of_an_uninterrupted_one(tmp_path: Path, known: bool) -> None:
    """Where a checkpoint does not know the number of lines, its step alone tells, and it is of a whole step."""
    whole = Curves(str(tmp_path / "whole"))
    log(whole, range(1, 6))
    whole.flush()
    lines, size = whole.lines, whole.path.stat().st_size
    log(whole, range(6, 10))
    whole.flush()
    content = whole.path.read_bytes()
    (tmp_path / "parts").mkdir()
    for end in range(size, len(content) + 1):
        (tmp_path / "parts" / METRICS).write_bytes(content[:end])
        logger = Curves(str(tmp_path / "parts"), flush_every_n_steps=2)
        logger.resume(5, lines if known else None)
        log(logger, range(6, 10))
        logger.finalize("success")
        assert logger.path.read_bytes() == content, end


def test_values_of_the_same_step_that_a_checkpoint_does_not_know_are_cut_off(tmp_path: Path) -> None:
    logger = Curves(str(tmp_path))
    log(logger, range(1, 4))
    logger.flush()
    again = Curves(str(tmp_path))
    again.resume(3, 3)
    again.log_metrics({"fid": 3.0}, 3)
    again.flush()
    assert read_curves(tmp_path) == {"loss": [(1, 1.0), (2, 1 / 2), (3, 1 / 3)], "fid": [(3, 3.0)]}
    assert again.lines == 4


def test_a_start_that_fails_leaves_the_curves_as_they_are(tmp_path: Path) -> None:
    logger = Curves(str(tmp_path))
    log(logger, range(1, 9))
    logger.flush()
    before = logger.path.read_bytes()
    again = Curves(str(tmp_path))
    again.resume(2, 2)
    again.save()
    again.finalize("failed")
    assert logger.path.read_bytes() == before


def test_a_checkpoint_drops_later_lines_even_where_nothing_was_logged_since(tmp_path: Path) -> None:
    logger = Curves(str(tmp_path))
    log(logger, range(1, 9))
    logger.flush()
    again = tiny.trainer(tmp_path, logger=Curves())
    resume_loggers(again, 2, {"curves": 2})
    assert logger_state(again) == {"curves": 2}
    assert read_curves(tmp_path) == {"loss": [(1, 1.0), (2, 0.5)]}


def test_a_logger_writes_to_the_run_directory_unless_it_was_given_another(tmp_path: Path) -> None:
    for given, place in ((None, tmp_path / "run"), (str(tmp_path / "other"), tmp_path / "other")):
        trainer = tiny.trainer(tmp_path / "run", logger=[Curves(given), WandB(given)])
        curves = trainer.loggers[0]
        assert isinstance(curves, Curves)
        assert [logger.save_dir for logger in trainer.loggers] == [str(place), str(place)]
        log_metrics(trainer, {"loss": 1.0})
        curves.flush()
        assert read_curves(place) == {"loss": [(0, 1.0)]}


def test_curves_serve_lightning_s_own_trainer(tmp_path: Path) -> None:
    trainer = L.Trainer(logger=Curves(str(tmp_path)), max_steps=2, accelerator="cpu", log_every_n_steps=1,
                        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)  # fmt: skip
    bind_loggers(trainer)
    trainer.fit(tiny.module(), tiny.data())
    assert trainer.log_dir == str(tmp_path)


# Lightning's loggers


def configured(name: str, run_dir: str, **arguments: Any) -> tuple[dict[str, Any], Logger]:
    """The configuration of a logger with its place filled in, and the logger that it makes."""
    tree: dict[str, Any] = {"class_path": name, "init_args": arguments}
    fill_save_dir(tree, run_dir)
    return tree, build(tree, Logger)  # type: ignore[type-abstract]


@pytest.mark.parametrize("name", ["CSVLogger", "WandbLogger", "Curves", "WandB"])
def test_a_logger_s_name_is_enough(name: str) -> None:
    module = "diffusion_lit" if name in ("Curves", "WandB") else "lightning.pytorch"
    tree, logger = configured(f"{module}.loggers.{name}", "runs/a")
    assert logger.save_dir == "runs/a"
    several = [True, tree]
    clear_save_dir(several, "runs/a")
    assert tree["init_args"] == {}
    fill_save_dir(several, "runs/b")
    assert tree["init_args"] == {"save_dir": "runs/b"}


def test_a_directory_that_the_user_gives_is_kept() -> None:
    tree, logger = configured("lightning.pytorch.loggers.CSVLogger", "runs/a", save_dir="mine")
    clear_save_dir(tree, "runs/a")
    assert logger.save_dir == tree["init_args"]["save_dir"] == "mine"


@pytest.mark.parametrize("uri", [None, "http://127.0.0.1:9"])
def test_mlflow_writes_to_the_run_directory_unless_a_server_is_given(uri: str | None) -> None:
    places = _places(MLFlowLogger, {"tracking_uri": uri}, "/runs/a")
    expected = {"tracking_uri": ("sqlite:////runs/a/mlflow.db", None), "artifact_location": ("/runs/a/mlruns", None)}
    assert places == ({} if uri else expected)


@pytest.mark.parametrize(("given", "place"), [("/mine", "/mine"), ("./mlruns", "/runs/a")])
def test_mlflow_writes_to_a_directory_that_the_user_gives(given: str, place: str) -> None:
    places = _places(MLFlowLogger, {"save_dir": given}, "/runs/a")
    assert places["tracking_uri"] == (f"sqlite:///{place}/mlflow.db", None)
    assert places["artifact_location"] == (f"{place}/mlruns", None)


@pytest.mark.parametrize("nothing", [True, False, None, []])
def test_where_there_is_no_logger_there_is_nothing_to_fill_in(nothing: Any) -> None:
    before = repr(nothing)
    fill_save_dir(nothing, "runs/a")
    clear_save_dir(nothing, "runs/a")
    assert repr(nothing) == before


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("TensorBoardLogger", "tensorboard", "tensorboard"),
        ("MLFlowLogger", "mlflow", "mlflow"),
        ("CometLogger", "comet_ml", "comet-ml"),
        ("LitLogger", "litlogger", "litlogger"),
    ],
)
def test_a_logger_whose_package_is_missing_says_how_to_install_it(name: str, module: str, package: str) -> None:
    if find_spec(module) is not None:
        pytest.skip(f"{module} is installed")
    command = cli.parse(["fit", "-c", "digits", "--trainer.logger", name], ["fit"])
    chosen = cli.merged(command, cli.command_slots("fit"))["trainer"]["logger"]
    with pytest.raises(ValueError, match=rf"trainer\.logger={name} needs {package}: pip install {package}$"):
        fill_save_dir(chosen, "runs/a")


def test_the_command_line_takes_a_logger_by_its_name_and_keeps_a_configuration_for_other_runs(tmp_path: Path) -> None:
    options = {
        "trainer.default_root_dir": tmp_path / "run",
        "trainer.logger": "CSVLogger",
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 1,
        "trainer.log_every_n_steps": 1,
        "trainer.limit_val_batches": 0,
        "trainer.enable_progress_bar": "false",
        "model.network.width": 32,
        "sample_grid.num_images": 1,
        "evaluation.every_n_steps": "null",
    }
    cli.main(["fit", "-c", "digits", *(f"--{name}={value}" for name, value in options.items())])
    folder = tmp_path / "run" / "lightning_logs" / "version_0"
    assert {path.name for path in folder.iterdir()} == {"metrics.csv", "hparams.yaml"}
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert "save_dir" not in config["trainer"]["logger"]["init_args"]
    kept = yaml.safe_load((folder / "hparams.yaml").read_text())
    assert kept["model"] == config["model"]


def logged(name: str, run_dir: Path) -> None:
    """Sends scalars, a picture and a configuration to one of Lightning's loggers, chosen by name."""
    _, logger = configured(f"lightning.pytorch.loggers.{name}", str(run_dir))
    trainer = tiny.trainer(run_dir, 2, logger=logger)
    trainer.fit(tiny.module(), tiny.data())
    log_hyperparams(trainer, CONFIG)
    save_png(torch.full((1, 4, 6), 128, dtype=torch.uint8), run_dir / "a.png")
    log_image(trainer, "samples", run_dir / "a.png")
    logger.finalize("success")


def test_lightning_s_csv_logger_gets_scalars_and_the_configuration(tmp_path: Path) -> None:
    logged("CSVLogger", tmp_path)
    folder = tmp_path / "lightning_logs" / "version_0"
    assert (folder / "metrics.csv").read_text().count("\n") == 3
    assert yaml.safe_load((folder / "hparams.yaml").read_text()) == CONFIG


def test_tensorboard_gets_scalars_pictures_and_the_configuration(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logged("TensorBoardLogger", tmp_path)
    events = tensorboard.EventAccumulator(str(tmp_path / "lightning_logs" / "version_0")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]
    [picture] = events.Images("samples")
    assert (picture.step, picture.width, picture.height) == (2, 6, 4)


def test_mlflow_gets_scalars_pictures_and_the_configuration(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    logged("MLFlowLogger", tmp_path)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    [experiment] = [e for e in client.search_experiments() if e.name == "lightning_logs"]
    [run] = client.search_runs([experiment.experiment_id])
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 2]
    assert run.data.params["ema/decays"] == "[0.9, 0.5]"
    assert any("samples" in file.path for file in client.list_artifacts(run.info.run_id, "images"))
    assert list((tmp_path / "mlruns").rglob("*.png"))
