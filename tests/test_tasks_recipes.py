"""Recipes of conditional tasks say what is published, and every name in them is found."""

from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_lit.conditioners import Joint, LowResolution, MaskedImage
from diffusion_lit.types import Condition
from tests.test_configs import instantiate

# Dhariwal & Nichol 2021, table 13, and guided-diffusion's commands: parameters, steps, size, small size.
UPSAMPLERS = {
    "adm_upsampler_256": (311_795_910, 500_000, 256, 64),
    "adm_upsampler_512": (308_835_270, 1_050_000, 512, 128),
}


def of(part: Any, kind: type) -> Any:
    """The conditioner of a kind inside a joint one."""
    assert isinstance(part, Joint)
    [found] = [inner for inner in part.conditioners if isinstance(inner, kind)]
    return found


@pytest.mark.parametrize("recipe", UPSAMPLERS)
def test_an_upsampler_s_recipe_is_the_paper_s_to_the_number(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters, steps, size, small = UPSAMPLERS[recipe]
    made = instantiate(recipe, monkeypatch)
    model, data = made.model, made.datamodule
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert (made.trainer.max_steps, data.batch_size) == (steps, 256)
    optimizer = model.make_optimizer([torch.nn.Parameter(torch.zeros(1))])
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (1e-4, 0)
    assert model.image_shape == (3, size, size)
    assert model.shape_of("low_res") == (3, small, small)
    assert model.entries == ("low_res",)
    assert (model.num_classes, type(data.source.degradation).__name__) == (1000, "Area")
    assert of(model.conditioner, LowResolution).augmentation is None


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("recipe", "entries"), [("superresolution_digits", ("low_res",)), ("inpainting_digits", ("image", "mask"))]
)
def test_the_recipes_of_the_digits_train_a_step(
    recipe: str, entries: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as context:
        made = instantiate(recipe, context)
    assert made.model.entries == entries
    assert isinstance(made.model.conditioner, LowResolution | MaskedImage)
    data = made.datamodule
    assert len(data.dataset("train")) == 1400
    for parameter in made.model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    batch: Condition = {**data.examples([0, 1, 2], "train")}
    loss: Tensor = made.model.losses(batch)["loss"]
    assert loss.isfinite()


def test_a_conditioner_s_options_are_found_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    made = instantiate(
        "superresolution_digits",
        monkeypatch,
        "--model.conditioner.augmentation",
        "NoiseAugmentation",
        "--model.conditioner.augmentation.most",
        "0.3",
        "--model.network.concat_channels",
        "2",
    )
    assert made.model.conditioner.augmentation.most == 0.3
    other = instantiate("inpainting_digits", monkeypatch, "--model.conditioner.convention", "GLIDE")
    assert type(other.model.conditioner.convention).__name__ == "GLIDE"
