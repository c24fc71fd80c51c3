"""The command line, in this process wherever possible: a start of its own takes seconds."""

import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.utils.data import DataLoader

from diffusion_lit import cli
from diffusion_lit.checkpoint import last_checkpoint, load_model
from diffusion_lit.data import CorruptImage, Folder
from diffusion_lit.diffusion import DDIM
from diffusion_lit.errors import TRACEBACK, report
from diffusion_lit.images import to_uint8
from diffusion_lit.main import COMMANDS, TOOLS, Unbreakable, outlive_terminal
from diffusion_lit.recipes import recipes
from tests import tiny
from tests.tiny import load

CONFIGS = recipes()
CPU = ["--trainer.accelerator", "cpu", "--trainer.devices", "1"]
QUIET = ["--trainer.enable_progress_bar", "false"]
AVERAGES = ["--ema.decays", "[0.9, 0.5]", "--ema.warmup", "false"]
SMALL = [
    *("--model.network.width", "16", "--model.network.num_groups", "8"),
    *("--evaluation.training_num_images", "4", "--evaluation.num_images", "6", "--evaluation.batch_size", "4"),
    *("--sample_grid.num_images", "2", "--sample_grid.sampler.steps", "2"),
    *("--model.sampler.steps", "3", "--data.batch_size", "16"),
]


def fit_args(run_dir: Path | str, *more: str, recipe: str = "digits", max_steps: int = 2) -> list[str]:
    files = ["-c", recipe]
    trainer = ["--trainer.default_root_dir", str(run_dir), "--trainer.max_steps", str(max_steps)]
    return ["fit", *files, *CPU, *trainer, *(SMALL if recipe == "digits" else []), *more]


def tree(*args: str) -> dict[str, Any]:
    """The configuration that a command line makes."""
    command = cli.parse(args, list(COMMANDS))
    return cli.merged(command, cli.command_slots(command.name))


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command line, which must refuse; returns its one line."""

    def run(args: list[str]) -> str:
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main(args)
        assert end.value.code == 2
        error = capfd.readouterr().err
        assert "Traceback" not in error
        [line] = [line for line in error.splitlines() if "error" in line]
        assert error.splitlines()[-1] == line
        assert line.startswith("diffusion_lit: error: ")
        return line.removeprefix("diffusion_lit: error: ")

    return run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps that the command line made."""
    place = tmp_path_factory.mktemp("cli") / "run"
    cli.main(fit_args(place, *QUIET, *AVERAGES))
    return place


@pytest.fixture(scope="module")
def checkpoint(run_dir: Path) -> str:
    return str(last_checkpoint(run_dir))


# What a run leaves behind


def test_a_run_leaves_a_checkpoint_curves_pictures_and_its_configuration(run_dir: Path) -> None:
    files = {str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file()}
    expected = {
        "config.yaml",
        "checkpoints/last.ckpt",
        "checkpoints/best.ckpt",
        "metrics.jsonl",
        "samples/step_00000002.png",
        "samples.png",
        "scores.png",
    }
    assert expected <= files
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert config["data"]["init_args"]["batch_size"] == 16
    assert config["ema"]["decays"] == [0.9, 0.5]


def test_the_configuration_file_of_a_run_makes_the_same_run_again(run_dir: Path, tmp_path: Path) -> None:
    cli.main(["fit", "-c", str(run_dir / "config.yaml"), "--trainer.default_root_dir", str(tmp_path / "again")])
    first, again = (load(last_checkpoint(place)) for place in (run_dir, tmp_path / "again"))
    assert tiny.identical(first["state_dict"], again["state_dict"])
    assert tiny.identical(first["config"], again["config"])


@pytest.mark.further
def test_a_run_goes_on_from_its_last_checkpoint(run_dir: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    same = [*QUIET, *AVERAGES, "--evaluation.every_n_steps", "null"]
    cli.main(fit_args(whole, *same, max_steps=3))
    for steps in (1, 3):
        cli.main(fit_args(parts, *same, "--ckpt_path", "last", max_steps=steps))
    a, b = load(last_checkpoint(whole)), load(last_checkpoint(parts))
    for name in ("state_dict", "current_model_state", "averages", "optimizer_states", "global_step"):
        assert tiny.identical(a[name], b[name])


@pytest.mark.further
def test_another_seed_makes_another_run(run_dir: Path, tmp_path: Path) -> None:
    cli.main(fit_args(tmp_path / "run", *QUIET, *AVERAGES, "--seed_everything", "1"))
    a, b = (load(last_checkpoint(place))["current_model_state"] for place in (run_dir, tmp_path / "run"))
    assert not tiny.identical(a, b)


# A checkpoint is enough


def test_a_checkpoint_alone_is_enough_to_sample(checkpoint: str, run_dir: Path) -> None:
    cli.main(["predict", "--ckpt_path", checkpoint, *CPU, *QUIET, "--num_images", "3", "--batch_size", "2"])
    out = run_dir / "predictions" / "last_seed_0"
    assert {path.name for path in out.iterdir()} == {
        *("000000.png", "000001.png", "000002.png"),
    }
    assert (out.parent / "last_seed_0_grid.png").is_file()
    assert (out.parent / "last_seed_0.npz").is_file()
    model: Any = load_model(checkpoint)
    expected = to_uint8(model.sample([0, 1]))[1, 0].numpy()
    assert np.array_equal(np.asarray(Image.open(out / "000001.png")), expected)
    assert not list(Path.cwd().iterdir())
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["trainer"]["max_steps"] == 2


def test_a_checkpoint_alone_is_enough_to_score(
    checkpoint: str, run_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*.ckpt")}
    cli.main(["test", "--ckpt_path", checkpoint, *CPU, *QUIET])
    out = capfd.readouterr().out
    assert "test/loss" in out
    assert "frechet/pixels" in out
    assert before == {path: path.stat().st_mtime_ns for path in run_dir.rglob("*.ckpt")}
    assert {path.name for path in Path.cwd().iterdir()} <= {"cache"}


def test_the_command_line_overrides_what_a_checkpoint_carries(checkpoint: str, tmp_path: Path) -> None:
    args = ["predict", "--ckpt_path", checkpoint, *CPU, *QUIET, "--num_images", "2", "--batch_size", "2"]
    cli.main([*args, "--out", str(tmp_path), "--model.sampler.steps", "7", "--npz", "false"])
    model: Any = load_model(checkpoint)
    assert isinstance(model.sampler, DDIM)
    assert model.sampler.steps == 3
    seven, three = (to_uint8(model.sample([0, 1], sampler=s))[0, 0].numpy() for s in (DDIM(steps=7), None))
    written = np.asarray(Image.open(tmp_path / "000000.png"))
    assert np.array_equal(written, seven)
    assert not np.array_equal(written, three)
    assert not list(tmp_path.parent.glob("*.npz"))


def test_a_path_given_with_an_equals_sign_and_a_moved_checkpoint_work_too(checkpoint: str, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "mine.ckpt"
    moved.parent.mkdir()
    moved.write_bytes(Path(checkpoint).read_bytes())
    cli.main(["predict", f"--ckpt_path={moved}", *CPU, *QUIET, "--num_images", "1", "--batch_size", "1"])
    assert (moved.parent / "predictions" / "mine_seed_0" / "000000.png").is_file()


def test_a_loaded_model_holds_the_averaged_weights_in_eval_mode(checkpoint: str) -> None:
    model: Any = load_model(checkpoint)
    assert not model.training
    assert tiny.identical(dict(model.state_dict()), load(Path(checkpoint))["state_dict"])


def test_weights_can_be_chosen_by_name(checkpoint: str, tmp_path: Path) -> None:
    images = {}
    for weights in ("averaged", "0.9", "0.5", "raw"):
        args = ["predict", "--ckpt_path", checkpoint, *CPU, *QUIET, "--num_images", "4", "--batch_size", "4"]
        cli.main([*args, "--weights", weights, "--out", str(tmp_path / weights)])
        images[weights] = np.load(tmp_path / f"{weights}.npz")["arr_0"].tobytes()
    assert images["averaged"] == images["0.9"]
    assert len(set(images.values())) == 3


# Bad input


@pytest.mark.few(6)
@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--model.sampler.steps", "2000"], ["steps=2000", "1 .. 1000", "--model.sampler.steps"]),
        (["--model.sampler.eta", "1.5"], ["eta=1.5", "[0, 1]", "--model.sampler.eta"]),
        (
            ["--model.network.multipliers", "[1,1,1,1,1]"],
            ["image_size=8", "halved 4 times", "multiple of 16"],
        ),
        (["--model.network.width", "20"], ["num_groups=8", "width=20", "multiple"]),
        (["--model.network.attention", "[5]"], ["attention at 5", "[8, 4]", "choose"]),
        (
            ["--model.network.image_size", "16", "--model.network.attention", "[8]"],
            ["(1, 8, 8)", "(1, 16, 16)", "image_size"],
        ),
        (["--model.network.in_channels", "3"], ["(1, 8, 8)", "(3, 8, 8)", "in_channels"]),
        (["--sample_grid.sampler.steps", "1001"], ["steps=1001", "1 .. 1000", "--sample_grid.sampler"]),
        (
            ["--evaluation.sampler", "DDIM", "--evaluation.sampler.steps", "1001"],
            ["steps=1001", "--evaluation.sampler"],
        ),
        (["--ema.decays", "[1.5]"], ["ema.decays=[1.5]", "[0, 1)", "0.9999"]),
        (["--checkpoints.every_n_steps", "0"], ["checkpoints.every_n_steps=0", "at least 1"]),
        (["--data.batch_size", "0"], ["batch_size=0", "below 1", "--data.batch_size"]),
        (["--trainer.accumulate_grad_batches", "3"], ["batch_size=16", "3 accumulated", "15 or 18"]),
        (["--evaluation.reference", "nowhere.npz"], ["evaluation.reference=nowhere.npz", "no such file"]),
        (["--ckpt_path", "nowhere.ckpt"], ["ckpt_path=nowhere.ckpt", "no such file"]),
        (["--trainer.gradient_clip_algorithm", "value"], ["gradient_clip_algorithm='value'", "'norm'"]),
        (["--trainer.gradient_clip_val", "-1"], ["trainer.gradient_clip_val=-1", "at least 0"]),
        (["--trainer.gradient_clip_val", ".nan"], ["trainer.gradient_clip_val=nan", "at least 0"]),
        (["--trainer.val_check_interval", "0.5"], ["trainer.val_check_interval=0.5", "whole number of batches"]),
        (["--evaluation.seed", "-1"], ["evaluation.seed=-1", "0 .. 2^64 - 1"]),
        (["--evaluation.batch_size", "0"], ["evaluation.batch_size=0", "at least 1"]),
        (["--sample_grid.every_n_steps", "0"], ["sample_grid.every_n_steps=0", "at least 1, or null"]),
        (["--trainer.max_steps", "many"], ["max_steps", "many"]),
        (
            ["--model.lr_scheduler", "torch.optim.lr_scheduler.StepLR"],
            ["model.lr_scheduler.step_size is missing", "--model.lr_scheduler.step_size"],
        ),
        (
            ["--trainer.accelerator", "gpu", "--trainer.devices", "99"],
            ["devices=99", f"has {torch.cuda.device_count()} GPUs", "use --trainer."],
        ),
    ],
)
def test_a_bad_setting_is_refused_by_value_bound_and_remedy_before_anything_is_kept(
    refused: Callable[[list[str]], str], tmp_path: Path, options: list[str], parts: list[str]
) -> None:
    line = refused(fit_args(tmp_path / "run", *QUIET, *options))
    assert len(line) < 400
    assert [part for part in parts if part not in line] == []
    assert not list(tmp_path.rglob("*.ckpt"))


TABLED = ["--model.network", "tests.faults.Tabled", "--model.network.image_size", "8", "--trust", "tests.faults"]


def test_a_mistake_in_a_part_of_ones_own_is_named_by_its_kind_and_line_unless_it_says_more(
    refused: Callable[[list[str]], str], tmp_path: Path
) -> None:
    args = ["fit", "-c", "digits", *CPU, *QUIET, "--trainer.default_root_dir", str(tmp_path), *TABLED]
    assert re.match(r"KeyError: 8 \(.*faults\.py, line \d+\); for more set", refused(args))
    assert refused([*args, "--model.network.explains", "true"]) == "no width for image_size=8; add it to table"


def test_a_checkpoint_carries_mappings_of_whole_numbers_as_they_were_given() -> None:
    made = cli.CLI.parts(["fit", "-c", "digits", *CPU, *TABLED, "--model.network.table", "{8: 2}"])
    assert made.model.config["model"]["init_args"]["network"]["init_args"]["table"] == {8: 2}


def test_missing_data_are_refused(refused: Callable[[list[str]], str], tmp_path: Path) -> None:
    small = ["--model.network.width", "32", "--evaluation.every_n_steps", "null", *QUIET]
    line = refused(fit_args(tmp_path / "run", *small, "--data.source.root", "nowhere", recipe="folder"))
    assert "nowhere" in line
    assert "--data.source.root" in line


def test_missing_inception_weights_without_a_network_are_refused_before_training(
    refused: Callable[[list[str]], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No torch.hub folder, and a proxy that does not answer.
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    args = fit_args(tmp_path / "run", *QUIET, "--evaluation.extractor", "diffusion_lit.metrics.Inception")
    line = refused(args)
    assert line.startswith("no Inception weights")
    assert "--evaluation.extractor.weights" in line
    assert not list((tmp_path / "run").rglob("*.ckpt"))


def test_a_run_directory_that_cannot_be_written_to_is_refused(
    refused: Callable[[list[str]], str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    line = refused(fit_args(tmp_path / "file" / "run", *QUIET))
    assert str(tmp_path / "file" / "run") in line
    assert "--trainer.default_root_dir" in line


def test_a_directory_that_holds_a_run_is_not_overwritten(
    refused: Callable[[list[str]], str], run_dir: Path, checkpoint: str
) -> None:
    before = Path(checkpoint).read_bytes()
    line = refused(fit_args(run_dir, *QUIET))
    assert str(run_dir) in line
    assert "--ckpt_path last" in line
    assert Path(checkpoint).read_bytes() == before


def test_a_run_that_cannot_go_on_keeps_its_checkpoint(
    refused: Callable[[list[str]], str], run_dir: Path, checkpoint: str
) -> None:
    before = Path(checkpoint).read_bytes()
    line = refused(fit_args(run_dir, *QUIET, "--ckpt_path", "last", "--model.network.width", "24"))
    assert "another architecture" in line
    assert Path(checkpoint).read_bytes() == before


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--model.network.width", "24"], ["another architecture", "tensors differ", "(16,)", "(24,)"]),
        (["--num_images", "0"], ["num_images=0", "at least 1"]),
        (["--batch_size", "0"], ["batch_size=0", "at least 1"]),
        (["--seed", "-1"], ["seed=-1", "0 .. 2^64 - 1"]),
        (["--weights", "0.3"], ["weights='0.3'", "'0.5', '0.9', 'averaged', 'raw'"]),
        (["--model.sampler.steps", "1001"], ["steps=1001", "1 .. 1000"]),
        (["--num_imagse", "3"], ["'num_imagse'", "'num_images'"]),
    ],
)
def test_what_cannot_be_sampled_is_refused(
    refused: Callable[[list[str]], str], checkpoint: str, options: list[str], parts: list[str]
) -> None:
    line = refused(["predict", "--ckpt_path", checkpoint, *CPU, *QUIET, *options])
    assert [part for part in parts if part not in line] == []


def test_a_directory_for_images_that_cannot_be_written_to_is_refused(
    refused: Callable[[list[str]], str], checkpoint: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    line = refused(["predict", "--ckpt_path", checkpoint, *CPU, "--out", str(tmp_path / "file" / "images")])
    assert "--out" in line


def test_missing_and_damaged_checkpoints_are_refused(
    refused: Callable[[list[str]], str], checkpoint: str, tmp_path: Path
) -> None:
    whole = Path(checkpoint).read_bytes()
    cases = {
        "half.ckpt": whole[: len(whole) // 2],
        "empty.ckpt": b"",
        "text.ckpt": b"hello",
        "zeros.ckpt": bytes(5000),
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        line = refused(["predict", "--ckpt_path", str(tmp_path / name), *CPU])
        assert name in line
        assert "damaged" in line
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.ckpt")
    assert "no state_dict" in refused(["predict", "--ckpt_path", str(tmp_path / "other.ckpt"), *CPU])
    assert "no such file" in refused(["test", "--ckpt_path", str(tmp_path / "nowhere.ckpt"), *CPU])
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    line = refused(["test", "--ckpt_path", str(tmp_path / "foreign.ckpt"), *CPU])
    assert "foreign.ckpt" in line
    assert "configuration" in line


class Malicious:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def test_a_malicious_checkpoint_is_refused_and_not_executed(
    refused: Callable[[list[str]], str], tmp_path: Path
) -> None:
    executed, bad = tmp_path / "executed", tmp_path / "bad.ckpt"
    for content in ({"state_dict": {}, "config": Malicious(executed)}, Malicious(executed)):
        torch.save(content, bad)
        for command in ("predict", "test"):
            assert "bad.ckpt" in refused([command, "--ckpt_path", str(bad), *CPU])
        assert "bad.ckpt" in refused(fit_args(tmp_path / "run", *QUIET, "--ckpt_path", str(bad)))
        bad.write_bytes(pickle.dumps(content))
        assert "bad.ckpt" in refused(["predict", "--ckpt_path", str(bad), *CPU])
    with pytest.raises(ValueError, match=r"bad\.ckpt is damaged, or no checkpoint"):
        load_model(str(bad))
    assert not executed.exists()


@pytest.mark.parametrize(
    ("option", "right"),
    [
        ("modle.seed", "model.seed"),
        ("trainer.max_stpes", "trainer.max_steps"),
        ("ema.decys", "ema.decays"),
        ("evaluation.num_image", "evaluation.num_images"),
        ("data.batchsize", "data.batch_size"),
        ("data.source.rot", "data.source.root"),
        ("model.sampler.stpes", "model.sampler.steps"),
        ("model.samplr.steps", "model.sampler.steps"),
        ("model.network.widht", "model.network.width"),
        ("model.optimizer.lrr", "model.optimizer.lr"),
        ("model.process.schedule.ofset", "model.process.schedule.offset"),
        ("model.init_args.process.init_args.schedule.init_args.ofset", "model.process.schedule.offset"),
        ("ckpt_pat", "ckpt_path"),
    ],
)
def test_a_mistyped_option_names_the_nearest_known_one(option: str, right: str) -> None:
    with pytest.raises(ValueError, match=f"^unknown key .*; did you mean {right!r}\\?$"):
        tree("fit", "-c", "folder", "--model.process.schedule", "Cosine", f"--{option}", "1")


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("trainr: {max_steps: 2}", "trainer"),
        ("trainer: {max_stpes: 2}", "trainer.max_steps"),
        ("seed_everthing: 1", "seed_everything"),
        ("ema: {decay: [0.5]}", "ema.decays"),
        ("model: {init_arg: {seed: 2}}", "model.init_args"),
        ("model: {samplr: {class_path: DDIM}}", "model.sampler"),
        ("model: {network: {widht: 3}}", "model.network.width"),
        ("model: {process: {init_args: {schedule: {init_args: {ofset: 0.1}}}}}", "model.process.schedule.offset"),
        ("data: {init_args: {batchsize: 3}}", "data.batch_size"),
        ("evaluation: {extractor: {class_path: Pixels, sise: 3}}", "evaluation.extractor.size"),
    ],
)
def test_a_mistyped_key_in_a_file_names_the_file_and_the_nearest_known_one(
    tmp_path: Path, text: str, nearest: str
) -> None:
    (tmp_path / "overlay.yaml").write_text(text + "\n")
    with pytest.raises(ValueError, match=f"overlay.yaml: unknown key .*; did you mean {nearest!r}\\?$"):
        tree("fit", "-c", "digits", "-c", str(tmp_path / "overlay.yaml"))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("frechet.num_images", "evaluation.training_num_images"),
        ("frechet.every_n_steps", "evaluation.every_n_steps"),
        ("data.root", "data.source.root"),
        ("model.learning_rate", "model.optimizer.lr"),
        ("lr", "model.optimizer.lr"),
        ("max_steps", "trainer.max_steps"),
        ("model.network.label_dropout", "model.conditioner.dropout"),
        ("model.init_args.network.init_args.label_dropout", "model.conditioner.dropout"),
    ],
)
def test_an_option_that_has_another_name_now_says_the_new_one(old: str, new: str) -> None:
    with pytest.raises(ValueError, match=f"it is called {new!r}$"):
        tree("fit", "-c", "digits", f"--{old}", "1")


@pytest.mark.parametrize(
    ("options", "right"),
    [
        (["--model.sampler", "DDMI"], "did you mean 'DDIM'"),
        (["--model.sampler", "diffusion_lit.diffusion.DDMI"], "did you mean 'DDIM'"),
        (["--data.source", "diffusion_lit.data.Digit"], "did you mean 'Digits'"),
        (["--model.sampler", "UNet"], "UNet is no Sampler; there are Ancestral, DDIM, DPMSolver, Heun"),
        (
            ["--model.network", "torch.nn.Conv2d"],
            "derive it from diffusion_lit.types.Network, or choose one of ADMUNet",
        ),
        (["--model.sampler", "Sampler"], "Sampler is abstract; choose one of Ancestral, DDIM"),
        (["--model.network", "my.pkg.Net"], "there is no my.pkg.Net: No module named 'my'"),
        (["--model.network", "my pkg"], "'my pkg' is not the name of a class"),
    ],
)
def test_a_mistyped_part_names_the_nearest_known_ones(options: list[str], right: str) -> None:
    with pytest.raises(ValueError, match=right) as refusal:
        tree("fit", "-c", "digits", *options)
    assert options[1] in str(refusal.value)


@pytest.mark.parametrize(
    ("args", "part"),
    [
        ([], "no command given"),
        (["fitt"], "did you mean 'fit'"),
        (["fit", "digits"], "'digits' is not an option; options are written --key value"),
        (["fit", "--trainer.max_steps"], "--trainer.max_steps needs a value"),
        (["fit", "--trainer.max_steps", "--ema.warmup", "true"], "--trainer.max_steps needs a value"),
    ],
)
def test_a_command_line_that_is_none_says_what_is_wrong(args: list[str], part: str) -> None:
    with pytest.raises(ValueError, match=re.escape(part)):
        cli.parse(args, ["fit", "predict"])


def test_an_incomplete_command_says_what_is_missing(refused: Callable[[list[str]], str]) -> None:
    assert "there is no model; give a recipe by -c, such as -c cifar10" in refused(["fit"])
    assert "there is no model; give a recipe by -c" in refused(["predict"])
    assert "there is no data" in refused(["fit", "--model", "DiffusionModule", "--model.network", "UNet"])
    line = refused(["fit", "-c", "digits", "--model.network", "ConvClassifier"])
    assert "model.network" in line
    line = refused(["fit", "-c", "digits", "--data.source", "Folder"])
    assert "data.source.root is missing, which Folder needs; give --data.source.root" in line


def test_a_file_name_that_is_too_long_is_said_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["plot", 300 * "v"])
    assert "v... is too long (3" in capsys.readouterr().err


def test_an_option_of_a_part_that_the_model_does_not_have_says_to_choose_one(
    refused: Callable[[list[str]], str], checkpoint: str
) -> None:
    line = refused(["predict", "--ckpt_path", checkpoint, *CPU, "--model.guidance.scale", "2"])
    assert line == "there is no model.guidance to give 'scale' to; choose it by --model.guidance CLASS"


def test_a_traceback_can_be_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(TRACEBACK, "1")
    with pytest.raises(ValueError, match="eta=2"):
        cli.main(fit_args(tmp_path / "run", "--model.sampler.eta", "2"))


def program(repository: Path, *args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "diffusion_lit", *args]
    return subprocess.run(command, env=environment, text=True, timeout=100, **{"capture_output": True, **options})


def test_the_module_is_a_program(repository: Path) -> None:
    done = program(repository, "predict", "--ckpt_path", "nowhere.ckpt")
    assert done.returncode == 2
    assert done.stderr == "diffusion_lit: error: ckpt_path=nowhere.ckpt: there is no such file\n"


def test_the_program_s_help_names_every_command_and_imports_next_to_nothing(repository: Path) -> None:
    for args in (["--help"], ["-h"], ["help"]):
        done = program(repository, *args)
        assert done.returncode == 0
        assert done.stdout.startswith("usage: diffusion_lit ")
        assert [name for name in (*COMMANDS, *TOOLS) if f"\n  {name} " not in done.stdout] == []
    code = "import sys; from diffusion_lit.main import main; main(['--help']); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    assert not {"torch", "lightning", "jsonargparse", "numpy"} & set(re.findall(r"'(\w+)'", done.stdout))


@pytest.mark.further
def test_completion_offers_commands_options_classes_and_recipes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["completion"])
    (tmp_path / "script").write_text(capsys.readouterr().out)

    def offered(*words: str) -> list[str]:
        line = " ".join(f"'{word}'" for word in ("diffusion-lit", *words))
        run = f"COMP_WORDS=({line}); COMP_CWORD={len(words)}; _diffusion_lit; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        code = f"source {tmp_path / 'script'}; {run}"
        return subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True).stdout.split()

    assert offered("pre") == ["predict", "prepare"]
    assert offered("fit", "-c", "dig") == ["digits", "digits_cfg"]
    assert offered("fit", "--model.sampler", "D") == ["DDIM", "DPMSolver"]
    assert offered("predict", "--per") == ["--per_class"]
    assert set(offered("fit", "--model.sampler.")) >= {"--model.sampler.steps", "--model.sampler.order"}


def test_a_pipe_that_closes_ends_the_program_quietly(repository: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = program(repository, "--help", capture_output=False, stdout=writer, stderr=subprocess.PIPE)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_program_without_streams_works(repository: Path) -> None:
    code = (
        "import os, sys; os.close(1); os.close(2); sys.stdout = sys.stderr = None\n"
        "from diffusion_lit.main import main; main(['--help'])"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=repository, timeout=60).returncode == 0


def test_progress_that_nobody_reads_ends_no_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as broken:
        monkeypatch.setattr(sys, "stderr", broken)
        cli.main(["prepare", "-c", "digits", "--out", str(tmp_path / "digits.images")])
        assert sys.stderr is broken
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)
    assert (tmp_path / "digits.images").stat().st_size > 1797 * 64


def test_an_image_that_a_worker_cannot_read_is_one_line_with_a_remedy(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    images = Folder(str(tmp_path), 8, channels=1, in_memory=False).load("train")
    for workers in (0, 1):
        with pytest.raises(CorruptImage) as error:
            list(DataLoader(cast(Any, images), batch_size=None, num_workers=workers))
        with pytest.raises(SystemExit):
            report(error.value)
        line = capfd.readouterr().err
        assert line.startswith(f"diffusion_lit: error: {tmp_path / 'a.png'}: ")
        assert line.endswith("; --data.on_corrupt skip leaves such images out\n")
        assert "Traceback" not in line


def test_training_outlives_the_pipe_that_it_writes_to() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    broken = os.fdopen(writer, "w", buffering=1)
    stream = Unbreakable(broken)
    print("a step is done", file=cast(Any, stream))
    stream.flush()
    assert stream.fileno() == writer
    with pytest.raises(BrokenPipeError):
        broken.flush()
    with pytest.raises(BrokenPipeError):
        broken.close()


def test_a_closed_terminal_does_not_end_training_and_all_is_as_before_afterwards() -> None:
    before = (sys.stdout, sys.stderr, signal.getsignal(signal.SIGHUP))
    with outlive_terminal():
        os.kill(os.getpid(), signal.SIGHUP)
        assert isinstance(sys.stdout, Unbreakable)
    assert before == (sys.stdout, sys.stderr, signal.getsignal(signal.SIGHUP))


def raised(error: Exception, name: str) -> Exception:
    """An error as if raised in a module of some name."""
    scope = {"__name__": name, "error": error}
    with pytest.raises(type(error)) as caught:
        exec("raise error", scope)
    return caught.value


@pytest.mark.parametrize(
    ("error", "module", "code", "part"),
    [
        (ValueError("sampler.steps=0 must be"), "diffusion_lit.module", 2, "error: sampler.steps=0 must be"),
        (ValueError("model.init_args.seed is"), "diffusion_lit.module", 2, "error: model.seed is"),
        (RuntimeError("no kernel"), "torch.nn", 2, "error: RuntimeError: no kernel"),
        (KeyError("momentum"), "torch.optim.sgd", 2, "error: KeyError: 'momentum'"),
        (IndexError("list index"), "lightning.pytorch", 2, "error: IndexError: list index"),
        (AttributeError("no lr"), "my.model", 2, "error: AttributeError: no lr"),
        (MemoryError(), "diffusion_lit.module", 2, "not enough memory"),
        (ModuleNotFoundError("No module named 'x'", name="x"), "lightning.pytorch", 2, "install it with pip"),
        (KeyError("eps"), "diffusion_lit.diffusion.denoiser", 1, "report it"),
        (AttributeError("no lr"), "diffusion_lit.system", 1, "report it"),
        (NotImplementedError("later"), "diffusion_lit.system", 1, "report it"),
        (RuntimeError("Gloo: connection closed"), "torch", 2, "another process has failed"),
    ],
)
def test_a_user_s_error_is_one_line_and_one_of_ours_keeps_its_traceback(
    error: Exception, module: str, code: int, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        report(raised(error, module))
    said = capsys.readouterr().err
    assert end.value.code == code
    assert part in said
    assert ("Traceback" in said) == (code == 1)
    assert said.count("\n") == 1 or code == 1


@pytest.mark.further
def test_images_of_two_predictions_never_mix(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [
        "predict",
        "--ckpt_path",
        checkpoint,
        *CPU,
        *QUIET,
        "--batch_size",
        "1",
        "--model.sampler.steps",
        "1",
    ]
    root = ["--trainer.default_root_dir", str(tmp_path)]
    for count in ("3", "1"):
        cli.main([*args, *root, "--num_images", count])
    (directory,) = (path for path in (tmp_path / "predictions").iterdir() if path.is_dir())
    assert [path.name for path in sorted(directory.glob("0*.png"))] == ["000000.png"]
    with pytest.raises(SystemExit):
        cli.main([*args, "--num_images", "1", "--out", str(directory)])
    assert "is not empty (1 entries, first 000000.png)" in capsys.readouterr().err.splitlines()[-1]
    assert (directory / "000000.png").is_file()


def test_samples_go_into_no_folder_of_other_files_and_the_empty_one_that_one_stands_in_will_do(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["predict", "--ckpt_path", checkpoint, *CPU, *QUIET, "--num_images", "1", "--model.sampler.steps", "1"]
    for name in ("full", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "holiday.png").touch()
    with pytest.raises(SystemExit):
        cli.main([*args, "--out", str(tmp_path / "full")])
    assert "is not empty (1 entries, first holiday.png)" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.chdir(tmp_path / "empty")
    cli.main([*args, "--out", "."])
    assert [path.name for path in (tmp_path / "empty").iterdir()] == ["000000.png"]
    assert (tmp_path / "empty_grid.png").is_file()


@pytest.mark.further
def test_a_run_s_configuration_serves_for_another_run(run_dir: Path, tmp_path: Path) -> None:
    cli.main(["fit", "-c", str(run_dir / "config.yaml"), *CPU, "--trainer.default_root_dir", str(tmp_path / "other")])
    assert (tmp_path / "other" / "config.yaml").is_file()
    assert (tmp_path / "other" / "metrics.jsonl").is_file()


@pytest.mark.further
def test_a_changed_option_wins_on_resuming_and_another_optimiser_leaves_everything_as_it_was(
    refused: Callable[[list[str]], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rare = ["--evaluation", "null", "--sample_grid", "null", "--trainer.logger", "Curves", *QUIET]
    rare = [*rare, "--trainer.default_root_dir", str(tmp_path / "run")]
    fit = ["fit", "-c", "digits", *CPU, *rare, "--ckpt_path", "last", "--trainer.max_steps"]
    cli.main([*fit, "2"])
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    assert "--init_from" in refused([*fit, "4", "--model.optimizer", "SGD"])
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before
    with caplog.at_level("INFO"):
        cli.main([*fit, "4", "--model.optimizer.lr", "1e-5", "--data.batch_size", "32"])
    said = [record.getMessage() for record in caplog.records if " -> " in record.getMessage()]
    assert said == [
        "data.batch_size: 64 -> 32, from step 3 on",
        "model.optimizer.lr: 0.002 -> 1e-05, from step 3 on",
    ]
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["init_args"]["batch_size"] == 32
    [group] = load(last_checkpoint(tmp_path / "run"))["optimizer_states"][0]["param_groups"]
    assert 0.99e-5 < group["lr"] < 1e-5


def test_a_refused_run_leaves_the_configuration_of_the_run_before(run_dir: Path) -> None:
    before = (run_dir / "config.yaml").read_text()
    network = "--model.network.num_blocks"
    with pytest.raises(SystemExit):
        cli.main(["fit", "-c", str(run_dir / "config.yaml"), *CPU, "--ckpt_path", "last", network, "2"])
    assert (run_dir / "config.yaml").read_text() == before


def test_a_run_that_ends_in_its_first_batch_leaves_the_configuration_of_the_run_before(
    refused: Callable[[list[str]], str], run_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    image = tmp_path / "images" / "a.png"
    image.parent.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)).save(image)
    image.write_bytes(image.read_bytes()[:2000])
    folder = ["--data.source", "Folder", "--data.source.root", str(image.parent), "--data.source.image_size", "8"]
    folder = [*folder, "--data.source.channels", "1", "--data.source.in_memory", "false"]
    line = refused(fit_args(tmp_path / "run", *QUIET, *AVERAGES, *folder, "--ckpt_path", "last", max_steps=4))
    assert "a.png" in line
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before
