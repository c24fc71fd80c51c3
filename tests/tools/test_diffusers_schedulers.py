"""Schedulers of diffusers for latents: for the same noise, samplers here draw the same images."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler

from diffusion_lit.diffusion import PLMS
from tests.tools.diffusers_models import T, assert_close, images, imported, pipeline, same_noise, theirs

OFFSETS: list[dict[str, Any]] = [
    {"steps_offset": 1},
    {"steps_offset": 1, "set_alpha_to_one": False},
    {"set_alpha_to_one": False},
    {"steps_offset": 1, "set_alpha_to_one": False, "prediction_type": "v_prediction"},
]


@pytest.mark.few(5)
@pytest.mark.parametrize("steps", [10, 6, 1])
@pytest.mark.parametrize("changes", OFFSETS)
def test_ddim_from_an_offset_or_to_the_first_time_draws_the_same_images_here(
    changes: dict[str, Any], steps: int, tmp_path: Path
) -> None:
    """Also where steps do not divide those of the process."""
    made_by, unet = DDIMScheduler(num_train_timesteps=T, beta_end=0.3, **changes), theirs()
    model = imported(pipeline(tmp_path, unet, made_by))
    assert_close(*same_noise(made_by, unet, model, steps, use_clipped_model_output=True), tolerance=1e-4)


@pytest.mark.parametrize(
    ("steps", "changes"), [(10, {}), (4, {"steps_offset": 1}), (5, {"set_alpha_to_one": True}), (1, {})]
)
@torch.no_grad()
def test_diffusers_pndm_draws_the_same_images_here(steps: int, changes: dict[str, Any], tmp_path: Path) -> None:
    made_by = PNDMScheduler(T, 0.02, 0.3, skip_prk_steps=True, **changes)
    unet = theirs()
    model = imported(pipeline(tmp_path, unet, made_by))
    assert isinstance(model.sampler, PLMS)
    x = start = images(unet)
    made_by.set_timesteps(steps)
    for t in made_by.timesteps:
        x = made_by.step(unet(x, t).sample, t, x).prev_sample
    model.sampler.steps = steps
    assert model.sampler.evaluations(model.process) == len(made_by.timesteps)
    ours = model.sampler(model.bind({}), start, model.process, lambda: torch.randn(start.shape))
    assert_close(ours, x, tolerance=1e-4)
