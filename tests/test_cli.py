"""The command line, in this process wherever possible: a start of its own takes seconds."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from diffusion_lit import cli
from diffusion_lit.callbacks.checkpoints import last_checkpoint
from diffusion_lit.diffusion import DDIM
from diffusion_lit.images import to_uint8
from tests import tiny
from tests.tiny import load

CONFIGS = Path(__file__).parent.parent / "configs"
CPU = ["--trainer.accelerator", "cpu", "--trainer.devices", "1"]
QUIET = ["--trainer.enable_progress_bar", "false"]
AVERAGES = ["--ema.decays", "[0.9, 0.5]", "--ema.warmup", "false"]
SMALL = [
    *("--model.network.init_args.width", "16", "--model.network.init_args.num_groups", "8"),
    *("--frechet.num_images", "4", "--evaluation.num_images", "6", "--frechet.batch_size", "4"),
    *("--sample_grid.num_images", "2", "--sample_grid.sampler.init_args.steps", "2"),
    *("--model.sampler.init_args.steps", "3", "--data.init_args.batch_size", "16"),
]


def fit_args(run_dir: Path | str, *more: str, recipe: str = "digits", max_steps: int = 2) -> list[str]:
    files = ["-c", str(CONFIGS / "base.yaml"), "-c", str(CONFIGS / f"{recipe}.yaml")]
    trainer = ["--trainer.default_root_dir", str(run_dir), "--trainer.max_steps", str(max_steps)]
    return ["fit", *files, *CPU, *trainer, *(SMALL if recipe == "digits" else []), *more]


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
        "csv/version_0/metrics.csv",
        "samples/step_00000002.png",
        "samples.png",
        "frechet.png",
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


def test_a_run_goes_on_from_its_last_checkpoint(run_dir: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    same = [*QUIET, *AVERAGES, "--frechet.every_n_steps", "null"]
    cli.main(fit_args(whole, *same, max_steps=3))
    for steps in (1, 3):
        cli.main(fit_args(parts, *same, "--ckpt_path", "last", max_steps=steps))
    a, b = load(last_checkpoint(whole)), load(last_checkpoint(parts))
    for name in ("state_dict", "current_model_state", "averages", "optimizer_states", "global_step"):
        assert tiny.identical(a[name], b[name])


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
        *("grid.png", "images.npz"),
    }
    model = cli.load_model(checkpoint)
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
    cli.main([*args, "--out", str(tmp_path), "--model.sampler.init_args.steps", "7", "--npz", "false"])
    model = cli.load_model(checkpoint)
    assert isinstance(model.sampler, DDIM)
    assert model.sampler.steps == 3
    seven, three = (to_uint8(model.sample([0, 1], sampler=s))[0, 0].numpy() for s in (DDIM(steps=7), None))
    written = np.asarray(Image.open(tmp_path / "000000.png"))
    assert np.array_equal(written, seven)
    assert not np.array_equal(written, three)
    assert not (tmp_path / "images.npz").exists()


def test_a_path_given_with_an_equals_sign_and_a_moved_checkpoint_work_too(checkpoint: str, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "mine.ckpt"
    moved.parent.mkdir()
    moved.write_bytes(Path(checkpoint).read_bytes())
    cli.main(["predict", f"--ckpt_path={moved}", *CPU, *QUIET, "--num_images", "1", "--batch_size", "1"])
    assert (moved.parent / "predictions" / "mine_seed_0" / "000000.png").is_file()


def test_a_loaded_model_holds_the_averaged_weights_in_eval_mode(checkpoint: str) -> None:
    model = cli.load_model(checkpoint)
    assert not model.training
    assert tiny.identical(dict(model.state_dict()), load(Path(checkpoint))["state_dict"])


def test_weights_can_be_chosen_by_name(checkpoint: str, tmp_path: Path) -> None:
    images = {}
    for weights in ("averaged", "0.9", "0.5", "raw"):
        args = ["predict", "--ckpt_path", checkpoint, *CPU, *QUIET, "--num_images", "4", "--batch_size", "4"]
        cli.main([*args, "--weights", weights, "--out", str(tmp_path / weights)])
        images[weights] = np.load(tmp_path / weights / "images.npz")["arr_0"].tobytes()
    assert images["averaged"] == images["0.9"]
    assert len(set(images.values())) == 3


# Bad input


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--model.sampler.init_args.steps", "2000"], ["steps=2000", "1 .. 1000", "--model.sampler.init_args.steps"]),
        (["--model.sampler.init_args.eta", "1.5"], ["eta=1.5", "[0, 1]", "--model.sampler.init_args.eta"]),
        (
            ["--model.network.init_args.multipliers", "[1,1,1,1,1]"],
            ["image_size=8", "halved 4 times", "multiple of 16"],
        ),
        (["--model.network.init_args.width", "20"], ["num_groups=8", "width=20", "multiple"]),
        (["--model.network.init_args.attention", "[5]"], ["attention at 5", "[8, 4]", "choose"]),
        (
            ["--model.network.init_args.image_size", "16", "--model.network.init_args.attention", "[8]"],
            ["(1, 8, 8)", "(1, 16, 16)", "image_size"],
        ),
        (["--model.network.init_args.in_channels", "3"], ["(1, 8, 8)", "(3, 8, 8)", "in_channels"]),
        (["--sample_grid.sampler.init_args.steps", "1001"], ["steps=1001", "1 .. 1000", "--sample_grid.sampler"]),
        (
            ["--frechet.sampler", "DDIM", "--frechet.sampler.init_args.steps", "1001"],
            ["steps=1001", "--frechet.sampler"],
        ),
        (["--ema.decays", "[1.5]"], ["ema.decays=[1.5]", "[0, 1)", "0.9999"]),
        (["--checkpoints.every_n_steps", "0"], ["checkpoints.every_n_steps=0", "at least 1"]),
        (["--data.init_args.batch_size", "0"], ["batch_size=0", "below 1", "--data.init_args.batch_size"]),
        (["--trainer.accumulate_grad_batches", "3"], ["batch_size=16", "3 accumulated", "15 or 18"]),
        (["--frechet.reference", "nowhere.npz"], ["frechet.reference=nowhere.npz", "no such file"]),
        (["--ckpt_path", "nowhere.ckpt"], ["ckpt_path=nowhere.ckpt", "no such file"]),
        (["--trainer.gradient_clip_algorithm", "value"], ["gradient_clip_algorithm='value'", "'norm'"]),
        (["--trainer.gradient_clip_val", "-1"], ["trainer.gradient_clip_val=-1", "at least 0"]),
        (["--trainer.gradient_clip_val", ".nan"], ["trainer.gradient_clip_val=nan", "at least 0"]),
        (["--trainer.val_check_interval", "0.5"], ["trainer.val_check_interval=0.5", "whole number of batches"]),
        (["--frechet.seed", "-1"], ["frechet.seed=-1", "0 .. 2^64 - 1"]),
        (["--evaluation.batch_size", "0"], ["evaluation.batch_size=0", "at least 1"]),
        (["--sample_grid.every_n_steps", "0"], ["sample_grid.every_n_steps=0", "at least 1, or null"]),
        (["--trainer.max_steps", "many"], ["max_steps", "many"]),
        (
            ["--model.lr_scheduler", "torch.optim.lr_scheduler.StepLR"],
            ["required: step_size", "--...init_args.step_size"],
        ),
        (
            ["--trainer.accelerator", "gpu", "--trainer.devices", "99"],
            ["devices=99", f"has {torch.cuda.device_count()} GPUs", "GPUS="],
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


def test_missing_data_are_refused(refused: Callable[[list[str]], str], tmp_path: Path) -> None:
    small = ["--model.network.init_args.width", "32", "--frechet.every_n_steps", "null", *QUIET]
    line = refused(fit_args(tmp_path / "run", *small, "--data.init_args.root", "nowhere", recipe="folder"))
    assert "nowhere" in line
    assert "--data.init_args.root" in line


def test_missing_inception_weights_without_a_network_are_refused_before_training(
    refused: Callable[[list[str]], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No torch.hub folder, and a proxy that does not answer.
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    args = fit_args(tmp_path / "run", *QUIET, "--frechet.extractor", "diffusion_lit.metrics.Inception")
    line = refused(args)
    assert line.startswith("no Inception weights")
    assert "--frechet.extractor.init_args.weights" in line
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
    line = refused(fit_args(run_dir, *QUIET, "--ckpt_path", "last", "--model.network.init_args.width", "24"))
    assert "another architecture" in line
    assert Path(checkpoint).read_bytes() == before


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--model.network.init_args.width", "24"], ["another architecture", "tensors differ", "(16,)", "(24,)"]),
        (["--num_images", "0"], ["num_images=0", "at least 1"]),
        (["--batch_size", "0"], ["batch_size=0", "at least 1"]),
        (["--seed", "-1"], ["seed=-1", "0 .. 2^64 - 1"]),
        (["--weights", "0.3"], ["weights='0.3'", "'0.5', '0.9', 'averaged', 'raw'"]),
        (["--model.sampler.init_args.steps", "1001"], ["steps=1001", "1 .. 1000"]),
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
        cli.load_model(str(bad))
    assert not executed.exists()


@pytest.mark.parametrize(
    ("option", "nearest"),
    [
        ("--modle.seed", "model.seed"),
        ("--trainer.max_stpes", "trainer.max_steps"),
        ("--ema.decys", "ema.decays"),
        ("--frechet.num_image", "frechet.num_images"),
        ("--data.init_args.batchsize", "batch_size"),
        ("--model.sampler.init_args.stpes", "steps"),
        ("--model.network.init_args.widht", "width"),
        ("--model.optimizer.init_args.lrr", "lr"),
        ("--model.process.init_args.schedule.init_args.ofset", "offset"),
    ],
)
def test_a_mistyped_option_names_the_nearest_known_one(
    refused: Callable[[list[str]], str], tmp_path: Path, option: str, nearest: str
) -> None:
    line = refused(fit_args(tmp_path / "run", option, "1"))
    assert line.startswith("unknown key ")
    assert line.endswith(f"did you mean {nearest!r}?") or line.endswith(f".{nearest}'?")


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("trainr: {max_steps: 2}", "trainer.max_steps"),
        ("trainer: {max_stpes: 2}", "trainer.max_steps"),
        ("seed_everthing: 1", "seed_everything"),
        ("ema: {decay: [0.5]}", "ema.decays"),
        ("model: {init_arg: {seed: 2}}", "init_args.seed"),
        ("model: {init_args: {samplr: {class_path: diffusion_lit.diffusion.DDIM}}}", "sampler.class_path"),
        ("model: {init_args: {network: {init_args: {widht: 3}}}}", "width"),
        ("model: {init_args: {process: {init_args: {schedule: {init_args: {ofset: 0.1}}}}}}", "offset"),
        ("data: {init_args: {batchsize: 3}}", "batch_size"),
        ("frechet: {extractor: {class_path: diffusion_lit.metrics.Pixels, init_args: {sise: 3}}}", "size"),
    ],
)
def test_a_mistyped_key_in_a_file_names_the_nearest_known_one_at_every_depth(
    refused: Callable[[list[str]], str], tmp_path: Path, text: str, nearest: str
) -> None:
    (tmp_path / "overlay.yaml").write_text(text + "\n")
    line = refused(fit_args(tmp_path / "run", "-c", str(tmp_path / "overlay.yaml")))
    assert line.startswith("unknown key ")
    assert line.endswith(f"did you mean {nearest!r}?")


@pytest.mark.parametrize(
    ("options", "nearest"),
    [
        (["--model.sampler", "DDMI"], "DDIM"),
        (["--data", "diffusion_lit.data.Digit"], "diffusion_lit.data.Digits"),
    ],
)
def test_a_mistyped_part_names_the_nearest_known_one(
    refused: Callable[[list[str]], str], tmp_path: Path, options: list[str], nearest: str
) -> None:
    line = refused(fit_args(tmp_path / "run", *options))
    assert line.endswith(f"did you mean {nearest!r}?")
    assert options[1] in line


@pytest.mark.parametrize(
    ("args", "part"),
    [([], "fit,validate,test,predict"), (["fitt"], "'fitt'"), (["predict"], "--ckpt_path"), (["fit"], "required")],
)
def test_an_incomplete_command_says_what_is_missing(
    refused: Callable[[list[str]], str], args: list[str], part: str
) -> None:
    assert part in refused(args)


def test_an_option_of_a_part_that_the_model_does_not_have_says_to_choose_one(
    refused: Callable[[list[str]], str], checkpoint: str
) -> None:
    line = refused(["predict", "--ckpt_path", checkpoint, *CPU, "--model.guidance.init_args.scale", "2"])
    assert line == "there is no guidance to give 'scale' to; choose one first, by its class: --...guidance CLASS"


def test_a_traceback_can_be_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(cli.TRACEBACK, "1")
    with pytest.raises(ValueError, match="eta=2"):
        cli.main(fit_args(tmp_path / "run", "--model.sampler.init_args.eta", "2"))


def test_the_module_is_a_program(repository: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "diffusion_lit", "predict", "--ckpt_path", "nowhere.ckpt"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "diffusion_lit: error: ckpt_path=nowhere.ckpt: there is no such file\n"


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
        "--model.sampler.init_args.steps",
        "1",
    ]
    root = ["--trainer.default_root_dir", str(tmp_path)]
    for count in ("3", "1"):
        cli.main([*args, *root, "--num_images", count])
    (directory,) = (tmp_path / "predictions").iterdir()
    assert [path.name for path in sorted(directory.glob("0*.png"))] == ["000000.png"]
    with pytest.raises(SystemExit):
        cli.main([*args, "--num_images", "1", "--out", str(directory)])
    assert "holds 1 images already" in capsys.readouterr().err.splitlines()[-1]
    assert (directory / "000000.png").is_file()


def test_a_run_s_configuration_serves_for_another_run(run_dir: Path, tmp_path: Path) -> None:
    cli.main(["fit", "-c", str(run_dir / "config.yaml"), *CPU, "--trainer.default_root_dir", str(tmp_path / "other")])
    assert (tmp_path / "other" / "config.yaml").is_file()
    assert (tmp_path / "other" / "csv").is_dir()


def test_a_refused_run_leaves_the_configuration_of_the_run_before(run_dir: Path) -> None:
    before = (run_dir / "config.yaml").read_text()
    network = "--model.network.init_args.num_blocks"
    with pytest.raises(SystemExit):
        cli.main(["fit", "-c", str(run_dir / "config.yaml"), *CPU, "--ckpt_path", "last", network, "2"])
    assert (run_dir / "config.yaml").read_text() == before
