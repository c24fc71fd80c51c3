"""The table of fidelity against diversity, for a model that knows the mean of every class and nothing else."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diffusion_lit.data import Digits
from diffusion_lit.images import from_uint8
from diffusion_lit.methods.guidance_table import main, table
from diffusion_lit.types import Condition

HERE = "tests.methods.test_guidance_table"


class Means(nn.Module):
    """Takes every image for the mean digit of its class, and without a class for the mean zero."""

    image_size, in_channels, num_classes, has_null_label = 8, 1, 10, True

    def __init__(self) -> None:
        super().__init__()
        digits = Digits().dataset("train").batch(range(1797))
        images = from_uint8(digits["image"])
        means = [images[digits["label"] == label].mean(0) for label in range(10)]
        self.means = nn.Parameter(torch.stack([*means, means[0]]))

    def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return self.means[condition["label"]]


def checkpoint(folder: Path, **guidance: str) -> str:
    model = {
        "class_path": "diffusion_lit.module.DiffusionModule",
        "init_args": {
            "network": {"class_path": f"{HERE}.Means"},
            "process": {"class_path": "diffusion_lit.diffusion.DiscreteProcess", "init_args": {"num_steps": 20}},
            "parameterization": {"class_path": "diffusion_lit.diffusion.X0"},
            "sampler": {"class_path": "diffusion_lit.diffusion.DDIM", "init_args": {"steps": 2}},
            **{name: {"class_path": path} for name, path in guidance.items()},
        },
    }
    config = {
        "model": model,
        "data": {"class_path": "diffusion_lit.data.Digits"},
        "frechet": {"extractor": {"class_path": "diffusion_lit.metrics.Pixels"}},
    }
    state = {f"denoiser.network.{name}": value for name, value in Means().state_dict().items()}
    path = folder / "last.ckpt"
    torch.save({"state_dict": state, "config": config}, path)
    return str(path)


def test_the_conditional_model_is_recognised_and_the_unconditional_one_is_not(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, guidance="diffusion_lit.diffusion.ClassifierFree")
    seen, (conditional, unconditional) = table(path, [0.0, -1.0], 100)
    assert seen > 0.95
    assert conditional.accuracy == 1
    assert unconditional.accuracy == 0.1
    assert conditional.frechet < unconditional.frechet
    assert conditional.precision == unconditional.precision == 1
    assert conditional.recall < 0.1


def test_it_prints_and_keeps_table_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoint(tmp_path, guidance="diffusion_lit.diffusion.ClassifierFree")
    main([path, "--scales=-1,0.5", "--num_images=30"])
    printed = capsys.readouterr().out
    written = (tmp_path / "guidance.md").read_text()
    assert written in printed
    assert [line.split()[1] for line in written.splitlines()[4:]] == ["-1", "0.5"]
    assert (tmp_path / "guidance.png").stat().st_size > 1000


def test_a_model_without_guidance_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([checkpoint(tmp_path)])
    assert "the model is not guided" in capsys.readouterr().err
