"""A classifier of noisy images is trained by the command line, and then guides a model that knows no classes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusion_lit import cli
from diffusion_lit.diffusion import DDIM, DiscreteProcess
from diffusion_lit.loggers import read_curves
from diffusion_lit.methods.classifier_guidance import NAMES, NoisyClassifierModule, TrainedClassifier
from diffusion_lit.module import DiffusionModule
from diffusion_lit.types import Batch, Condition

HERE = "tests.methods.test_classifier_guidance"
STEPS = 100


class Linear(nn.Module):
    """A classifier small enough for a test."""

    image_size, in_channels, num_classes = 8, 1, 10

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(65, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        logits: Tensor = self.layers(torch.cat([x.flatten(1), time[:, None] / STEPS], 1))
        return logits


class Blind(nn.Module):
    """A model that takes all for noise and knows no classes."""

    image_size, in_channels = 8, 1

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return x * self.weight


class Larger(Blind):
    image_size = 16


class Timeless(nn.Module):
    image_size, in_channels, num_classes = 8, 1, 10

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :10]


class Oracle(nn.Module):
    """Recognises every image, told by its first pixel, in the first half of the process only."""

    image_size, in_channels, num_classes = 8, 1, 10

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        label = (x[:, 0, 0, 0].sign() > 0).long()
        return torch.eye(10)[torch.where(time < STEPS / 2, label, 9)]


def fit(run: Path, network: str, *more: str) -> None:
    cli.main(
        [
            "fit",
            "--model=NoisyClassifierModule",
            f"--model.network={HERE}.{network}",
            f"--model.process.num_steps={STEPS}",
            "--model.optimizer=torch.optim.AdamW",
            "--model.optimizer.lr=0.01",
            "--data=Digits",
            "--data.batch_size=256",
            f"--trainer.default_root_dir={run}",
            "--trainer.accelerator=cpu",
            "--trainer.devices=1",
            "--trainer.logger=diffusion_lit.loggers.CSV",
            "--trainer.max_epochs=-1",
            "--trainer.check_val_every_n_epoch=null",
            "--trainer.val_check_interval=100",
            "--trainer.num_sanity_val_steps=0",
            "--trainer.log_every_n_steps=20",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
            *more,
        ]
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier trained for 200 steps."""
    run = tmp_path_factory.mktemp("classifier")
    fit(run, "Linear", "--trainer.max_steps=200")
    return run


def checkpoint(run: Path) -> str:
    return str(run / "checkpoints" / "last.ckpt")


def model(**kwargs: Any) -> DiffusionModule:
    return DiffusionModule(Blind(), DiscreteProcess(STEPS), sampler=DDIM(10), **kwargs)


def test_it_learns_and_is_the_surer_the_less_noise_there_is(run: Path) -> None:
    curves = read_curves(run)
    for stage in ("train", "val"):
        quarters = [curves[f"{stage}/accuracy_{name}"][-1][1] for name in NAMES]
        assert quarters[0] > 0.85
        assert quarters == sorted(quarters, reverse=True)
        assert curves[f"{stage}/accuracy"][-1][1] == pytest.approx(sum(quarters) / 4, abs=0.05)
    losses = [value for _, value in curves["train/loss"]]
    assert losses[-1] < losses[0] / 2


def test_accuracy_is_counted_by_quarter_of_the_time() -> None:
    module = NoisyClassifierModule(Oracle(), DiscreteProcess(STEPS))
    module.process.perturb = lambda x0, eps, t: x0  # type: ignore[method-assign]
    label = torch.arange(400) % 2
    image = (label * 2.0 - 1).reshape(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    parts = module.classify({"image": image, "label": label})
    assert torch.equal(parts["correct"], (parts["t"] <= 0.5).float())


def test_a_run_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    fit(tmp_path / "whole", "Linear", "--trainer.max_steps=8", "--trainer.limit_val_batches=0")
    for steps in (4, 8):
        more = ("--trainer.limit_val_batches=0", "--ckpt_path=last")
        fit(tmp_path / "parts", "Linear", f"--trainer.max_steps={steps}", *more)
    whole, parts = (torch.load(checkpoint(tmp_path / name), weights_only=True) for name in ("whole", "parts"))
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, parts["state_dict"][name])


def test_a_trained_classifier_guides_a_model_without_classes(run: Path) -> None:
    classifier = checkpoint(run)
    module = NoisyClassifierModule(Linear(), DiscreteProcess(STEPS))
    module.load_state_dict(torch.load(classifier, weights_only=True)["state_dict"])
    indices = list(range(20))

    def agreement(images: Tensor) -> float:
        found = module(images, torch.zeros(20)).argmax(1)
        return float((found == torch.arange(20) % 10).float().mean())

    guided = model(guidance=TrainedClassifier(classifier, scale=20.0)).sample(indices)
    assert agreement(model().sample(indices)) < 0.4
    assert agreement(guided) > 0.9


def test_predict_takes_the_guidance_and_labels_on_the_command_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guidance = "--model.init_args.guidance"
    args = [
        "predict",
        "--model=DiffusionModule",
        f"--model.network={HERE}.Blind",
        f"--model.process.num_steps={STEPS}",
        "--model.sampler=DDIM",
        "--model.sampler.steps=5",
        "--data=Digits",
        f"--trainer.default_root_dir={tmp_path}",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        "--trainer.enable_progress_bar=false",
    ]
    guided = [f"{guidance}=TrainedClassifier", f"{guidance}.init_args.checkpoint={checkpoint(run)}"]
    cli.main([*args, *guided, "--labels=3,3,7"])
    assert len(list((tmp_path / "predictions" / "seed_0").glob("0*.png"))) == 3
    with pytest.raises(SystemExit):
        cli.main([*args, "--labels", "3,3,7"])
    assert "labels: the model is unconditional" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(SystemExit):
        cli.main([*args, *guided, "--labels", "3,12"])
    assert "labels: 12 must lie in 0 .. 9" in capsys.readouterr().err.splitlines()[-1]
    misfits = {
        "--model.process.num_steps=50": "another noise schedule or number of steps than the model; train one with",
        f"--model.network={HERE}.Larger": "image_size=8, the model has image_size=16; train a classifier with",
        f"{guidance}=ClassifierFree": "Blind takes no labels; leave --model.init_args.guidance out, or train",
        f"{guidance}.init_args.checkpoint=none.ckpt": "there is no such file; train a classifier",
    }
    for option, message in misfits.items():
        with pytest.raises(SystemExit):
            cli.main([*args, *([] if "ClassifierFree" in option else guided), option, "--labels=3"])
        [line] = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert message in line


def test_a_classifier_of_another_schedule_is_refused(run: Path) -> None:
    guidance = TrainedClassifier(checkpoint(run))
    with pytest.raises(ValueError, match="another noise schedule or number of steps"):
        DiffusionModule(Blind(), DiscreteProcess(50), sampler=DDIM(5), guidance=guidance)


def test_what_is_no_trained_classifier_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"guidance.checkpoint=.*there is no such file; train a classifier"):
        TrainedClassifier(str(tmp_path / "none.ckpt"))
    bare = tmp_path / "bare.ckpt"
    torch.save({"state_dict": {}}, bare)
    with pytest.raises(ValueError, match="carries no configuration"):
        TrainedClassifier(str(bare))
    other = tmp_path / "other.ckpt"
    config = {
        "class_path": "diffusion_lit.module.DiffusionModule",
        "init_args": {"network": {"class_path": f"{HERE}.Blind"}},
    }
    torch.save({"state_dict": {}, "config": {"model": config}}, other)
    with pytest.raises(ValueError, match=r"is of diffusion_lit.module.DiffusionModule, no NoisyClassifierModule; give"):
        TrainedClassifier(str(other))
    with pytest.raises(ValueError, match=r"Timeless takes no time: it was trained on clean images.*; train a Noisy"):
        NoisyClassifierModule(Timeless())


def test_data_without_labels_are_refused() -> None:
    batch: Batch = {"image": torch.zeros(2, 1, 8, 8)}
    with pytest.raises(ValueError, match="no labels to train a classifier on"):
        NoisyClassifierModule(Linear()).classify(batch)


def test_a_classifier_generates_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["predict", "--ckpt_path", checkpoint(run), "--trainer.accelerator=cpu"])
    assert "a classifier generates nothing" in capsys.readouterr().err.splitlines()[-1]
